"""What all tests share: golden files, one cache directory per test, two threads."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from memplan.solvers.jit.compiled import code_directory

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # `strategies` and `exact` are for every test file

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the tests got")


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or writes the user's measurements. What numba has compiled is kept, for processes that tests start, and
    how fast this machine is has been asked once; a test marked `cold` asks anew."""
    if os.environ.get("NUMBA_CACHE_DIR") is None and (folder := code_directory()) is not None:
        monkeypatch.setenv("NUMBA_CACHE_DIR", folder)
    cache = tmp_path_factory.mktemp("cache")
    if request.node.get_closest_marker("cold") is None:
        for path in request.getfixturevalue("probed").glob("*.json"):
            shutil.copy(path, cache)
    monkeypatch.setenv("MEMPLAN_CACHE", str(cache))


@pytest.fixture(scope="session")
def probed(two_threads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with this machine's rates."""
    from memplan.planner.cost.local import local_machine

    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMPLAN_CACHE", str(folder))
        local_machine("cpu")
    return folder


@pytest.fixture(scope="module", name="hasty")
def cut_short() -> Iterator[None]:
    """For a module whose tests ask what plans do: `pytestmark = pytest.mark.usefixtures("hasty")`."""
    from quick import hasty

    with hasty():
        yield


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Torch may use two cores; a test that needs one says so itself."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


class Golden:
    """Stands for the text in `tests/golden/<file>/<test>.txt`: `assert golden == text`."""

    def __init__(self, path: Path, update: bool):
        self.path, self.update = path, update

    def __eq__(self, text: object) -> bool:
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(str(text))
        if not self.path.is_file():
            pytest.fail(f"{self.path} does not exist: run pytest --update-golden, review what it wrote, and add it to git")
        return self.path.read_text() == text

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return self.path.read_text() if self.path.is_file() else f"<no {self.path}>"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden text of the test that asks for it."""
    path = HERE / "golden" / request.path.stem / f"{request.node.name}.txt"
    return Golden(path, request.config.getoption("--update-golden"))

"""The names of the package, and the ways in."""

import os
import subprocess
import sys
from pathlib import Path

import memplan
import pytest


def test_the_package_lists_its_names():
    """For completion in a notebook: the names, and not what they are made with."""
    assert set(memplan.__all__) <= set(dir(memplan))
    assert not [name for name in dir(memplan) if name in ("Any", "TYPE_CHECKING", "_FACE")]
    assert all(getattr(memplan, name) is not None for name in memplan.__all__)


def test_a_name_that_is_nearly_right_is_told():
    """And none where nothing is near; introspection asks for names that nobody misspelled."""
    with pytest.raises(AttributeError, match=r"no attribute 'plann'; did you mean 'plan'\?"):
        memplan.plann  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '__wrapped__'$"):
        memplan.__wrapped__  # noqa: B018
    assert not hasattr(memplan, "xyzzy")


def test_the_package_can_be_run():
    """`python -m memplan` is the command line."""
    done = subprocess.run([sys.executable, "-P", "-m", "memplan", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"memplan {memplan.__version__}\n", "")


def test_a_child_runs_its_parents_code(tmp_path):
    """Whatever else is called memplan where Python looks first: a clone beside the script, say."""
    from memplan.backends.measure.fresh import python_running

    (tmp_path / "memplan").mkdir()
    (tmp_path / "memplan" / "__init__.py").write_text("raise SystemExit('another memplan')")
    (tmp_path / "memplan" / "__main__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*python_running("memplan"), "--version"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"memplan {memplan.__version__}\n", "")


def test_the_version_is_pyprojects():
    """One number in two places."""
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == memplan.__version__

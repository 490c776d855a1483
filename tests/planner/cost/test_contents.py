"""What the cache holds is listed by kind, and removed by kind."""

import json

import pytest
from memplan.planner.cli import app as cli
from memplan.planner.cost.cache import cache_directory
from memplan.planner.cost.contents import KINDS, clear, contents

pytestmark = pytest.mark.cold


@pytest.fixture(autouse=True)
def filled() -> None:
    """One file of each kind, and one of nobody's."""
    for name in ("costs-a.json", "schedules/b.found", "floors/c.floor", "numba/d/e.nbi", "other.txt"):
        path = cache_directory() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"four")


def test_a_cleared_kind_is_gone_and_the_others_stay():
    """What is no kind's is nobody's to remove."""
    assert {each.kind: (each.files, each.bytes) for each in contents()} == {
        "costs": (1, 4),
        "schedules": (2, 8),
        "code": (1, 4),
    }

    assert clear("schedules") == 2
    assert {each.kind: each.files for each in contents()} == {"costs": 1, "schedules": 0, "code": 1}
    assert [clear(kind) for kind in KINDS] == [1, 0, 1]
    assert (cache_directory() / "other.txt").exists()


def test_the_command_lists_and_clears(capsys: pytest.CaptureFixture[str]):
    """As an object for programs, with what was removed."""
    cli.main(["cache", "--json"])
    before = json.loads(capsys.readouterr().out)
    cli.main(["cache", "--clear", "costs", "--clear", "code", "--json"])
    after = json.loads(capsys.readouterr().out)

    assert before["directory"] == str(cache_directory())
    assert [kind["files"] for kind in before["kinds"]] == [1, 2, 1]
    assert (after["removed"], [kind["files"] for kind in after["kinds"]]) == (2, [0, 2, 0])

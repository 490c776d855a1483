"""What is shown while a command works: never nothing, never on standard output."""

import io
import re
import sys
import time

import pytest
from memplan.planner.cli import progress as shown
from memplan.planner.cli.progress import RunningLine, progress
from rich.console import Console


@pytest.fixture
def quick(monkeypatch):
    """Lines come ten times a second, and from the beginning."""
    monkeypatch.setattr(shown, "SHORT", 0.0)
    monkeypatch.setattr(shown, "PERIOD", 0.1)
    monkeypatch.setattr(shown, "TICK", 0.02)


def test_a_stage_is_told_once_and_then_by_the_clock(capsys, quick):
    """With its share, though the work says nothing meanwhile; where it comes again, it is not news."""
    with progress("loading") as report:
        report("searching", 0.0)
        report("searching", 0.25)
        time.sleep(0.5)
        report("loading", 0.0)
        report("searching", 1.0)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[:2] == ["memplan: 0 s: loading", "memplan: 0 s: searching"]
    assert 1 <= len(lines) - 2 <= 6
    assert set(lines[2:]) == {"memplan: 0 s: searching, 25%"}


def test_the_clock_stops_with_the_work(capsys, quick):
    """Also where that fails."""
    with pytest.raises(ValueError, match="no"), progress("loading"):
        raise ValueError("no")
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_what_ends_soon_says_nothing(capsys):
    """An error is then the only line."""
    with progress("loading") as report:
        report("searching", 0.5)
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_meanwhile_is_beside_the_answer(capsys, quick):
    """Loud or quiet."""
    for quiet in (False, True):
        with progress("loading", quiet):
            print("a user's line")
        out, err = capsys.readouterr()
        assert out == ""
        assert "a user's line" in err
        assert ("loading" in err) is not quiet


def test_nobody_reading_is_no_error(monkeypatch):
    """Standard error may be closed, or a pipe whose reader is gone."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("loading") as report:
            report("searching", 0.5)


@pytest.mark.parametrize("ended", [0.0, 1.0])
def test_the_time_runs_on_after_a_stage_has_ended(monkeypatch, ended):
    """rich stops the clock of a task that has reached its total, as after the ops were measured; ours runs."""
    now = [100.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    screen = io.StringIO()
    with RunningLine(Console(file=screen, force_terminal=True, width=100)) as line:
        for done in (0.5, ended):
            line.tell("measuring ops", done)
        now[0] += 83
        line.bars.refresh()
        line.tell("bounding", 0.0)
        now[0] += 1
        line.bars.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"measuring ops .* 1:23 min", plain)
    assert re.search(r"bounding .* 1:24 min", plain)

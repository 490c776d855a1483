"""Two runs in turns: real processes on a tiny model, and the rounds with scripted ones."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from memplan.backends.measure import compare as turns
from memplan.backends.measure.compare import Child, Comparison, compare, in_turns
from memplan.backends.measure.training import Request, Trial, in_fresh_process
from memplan.planner.ir.errors import MemplanError

FACTORY = """
import torch
print("a model may print")
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)), (torch.ones(4, 8),)
class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make()[0]
    def forward(self, x):
        return self.inner(x).square().mean()
def model():
    return Loss(), (torch.ones(4, 8),)
def broken():
    raise ValueError("no such model today")
"""
TOLD: list[tuple[str, float]] = []


def tell(stage: str, share: float) -> None:
    """Progress."""
    TOLD.append((stage, share))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a model."""
    (tmp_path / "tiny.py").write_text(FACTORY)
    return tmp_path / "tiny.py"


def test_runs_in_turns_give_the_numbers_of_runs_alone(file: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses and gradients to the bit; each its own times and, where the system tells, its own peak."""
    monkeypatch.setattr(turns, "SETTLE", 0.0)
    request = Request(f"{file}:model", None, 2, "sgd")
    found = in_turns(request, request, tell)
    alone = in_fresh_process(request)
    assert found.first.losses == found.second.losses == alone.losses
    assert found.first.gradients == found.second.gradients == alone.gradients
    assert (found.first.peak is None) == (alone.peak is None)
    assert found.first.seconds > 0
    assert found.ratio is not None
    assert found.ratio > 0
    assert found.rounds in (1, 2)


def test_what_goes_wrong_in_a_process_is_told_in_one_line(file: Path):
    """And the process has ended then, as has the other one."""
    with pytest.raises(MemplanError, match=r"the unplanned run of .*broken failed: .*no such model today"):
        in_turns(Request(f"{file}:model", None, 1), Request(f"{file}:broken", None, 1), tell)


def test_a_process_that_dies_says_how(monkeypatch: pytest.MonkeyPatch):
    script = "import os, sys; print('no library', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(turns, "COMMAND", [sys.executable, "-c", script])
    with pytest.raises(MemplanError, match="the unplanned run of m failed: no library"):
        Child(Request("m", None, 1)).__enter__()
    monkeypatch.setattr(turns, "COMMAND", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(MemplanError, match="killed by signal 9: is there memory for it"):
        Child(Request("m", None, 1)).__enter__()


class Scripted:
    """A process whose steps take given times, disturbed or not."""

    asked: ClassVar[list[str]] = []
    steps: ClassVar[dict[str, list[tuple[float, bool]]]] = {}

    def __init__(self, request: Request):
        self.name = request.model

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, line: str) -> dict[str, Any]:
        if line == "end":
            return {"peak": 1, "seconds": 0.0, "losses": [], "gradients": []}
        Scripted.asked.append(self.name)
        seconds, disturbed = Scripted.steps[self.name].pop(0)
        return {"seconds": seconds, "disturbed": disturbed}


def scripted(monkeypatch: pytest.MonkeyPatch, steps: int, **times: list[tuple[float, bool]]) -> Comparison:
    """What comes of scripted steps of `a` and of `b`, after one each to warm up."""
    monkeypatch.setattr(turns, "SETTLE", 0.0)
    monkeypatch.setattr(turns, "Child", Scripted)
    Scripted.asked, Scripted.steps = [], {name: [(9.0, True), *each] for name, each in times.items()}
    return in_turns(Request("a", None, steps), Request("b", "plan", steps), tell)


def test_steps_alternate_and_each_round_begins_with_another(monkeypatch: pytest.MonkeyPatch):
    """What slows the machine more and more slows both alike: 1.5 in every round."""
    found = scripted(monkeypatch, 3, a=[(1.0, False), (2.0, False), (4.0, False)], b=[(1.5, False), (3.0, False), (6.0, False)])
    assert "".join(Scripted.asked) == "ab" + "ab" + "ba" + "ab"
    assert (found.ratio, found.first.seconds, found.second.seconds) == (1.5, 2.0, 3.0)
    assert (found.rounds, found.disturbed) == (3, 0)


def test_disturbed_rounds_are_run_again(monkeypatch: pytest.MonkeyPatch):
    found = scripted(monkeypatch, 2, a=[(1.0, False), (8.0, True), (1.0, False)], b=[(1.0, False)] * 3)
    assert (found.ratio, found.rounds, found.disturbed) == (1.0, 2, 0)


def test_a_machine_that_is_never_quiet_is_said(monkeypatch: pytest.MonkeyPatch):
    """After twice the rounds what there is counts."""
    found = scripted(monkeypatch, 2, a=[(1.0, True)] * 4, b=[(2.0, False)] * 4)
    assert (found.ratio, found.rounds, found.disturbed) == (2.0, 2, 2)


def test_without_memory_for_both_they_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "room_of", lambda device: float(4 << 30))
    monkeypatch.setattr(turns, "in_turns", lambda *_: "in turns")
    monkeypatch.setattr(turns, "in_fresh_process", lambda request: Trial(1, 1.0, (), (), {}, 3))
    requests = Request("a", None, 5), Request("b", "plan", 5)
    assert compare(*requests, (1 << 30, 1 << 29), "cpu", tell) == "in turns"
    found = compare(*requests, (1 << 30, 1 << 30), "cpu", tell)
    assert (found.ratio, found.rounds, found.disturbed) == (None, 5, 3)

"""A handful of schedules for every size: which is taken, and what of it the referee says."""

from functools import cache

import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import BudgetError, CaptureError, InvalidSchedule, MemplanError
from memplan.planner.ir.family import rebound
from memplan.planner.ir.referee import referee
from memplan.planner.verbs.session import Session
from memplan.planner.verbs.sizes import SizedPlans
from size_cases import equal, step
from torch import nn

DYNAMIC = {"x": {0: "batch", 1: "length"}}


class Step(nn.Module):
    """A chain with its loss."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(16, 16), nn.Tanh(), nn.GELU())))

    def forward(self, x):
        return self.inner(x).square().sum()


@cache
def model() -> Step:
    """Kept as long as its plans."""
    return Step()


@cache
def plans() -> SizedPlans:
    """Four ways of a chain."""
    session = Session(model(), (torch.randn(4, 32, 16),), machine="h100-80gb", time_limit=2, dynamic=DYNAMIC)
    made = SizedPlans(session)
    made.prepare(4)
    return made


def test_ways_reach_from_all_kept_down_to_the_smallest():
    """The fastest first."""
    peaks = [plans().side(way, (4, 32)).peak for way in plans().ways]
    planner = plans().session.planner

    assert 3 <= len(peaks) <= 4
    assert (max(peaks), min(peaks)) == (planner.kept.peak, planner.quick_floor.peak)
    seconds = [way.seconds(plans().program) for way in plans().ways]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("sizes", [(4, 32), (2, 17), (7, 64), (2, 2)])
def test_the_fastest_way_that_fits_is_taken(sizes: tuple[int, int]):
    """Of those that the referee accepts at these sizes."""
    sides = [plans().side(way, sizes) for way in plans().ways]
    for budget in sorted(side.peak for side in sides):
        choice = plans().fitting(sizes, budget)

        assert choice is not None
        assert choice.side.peak <= budget
        assert choice.side.time == pytest.approx(min(side.time for side in sides if side.peak <= budget))
        assert choice.side.program.digest == plans().at(sizes).digest
    assert plans().fitting(sizes, min(side.peak for side in sides) - 1) is None


def test_the_program_is_that_of_a_session_there():
    """Bytes as the machine rounds them, and what an op costs that nobody has measured."""
    other = Session(model(), (torch.randn(3, 9, 16),), machine="h100-80gb")
    found = plans().at((3, 9))

    assert plans().check_against(other.captured) == (3, 9)
    assert [op.seconds for op in found.ops] == pytest.approx([op.seconds for op in other.planner.program.ops])
    assert [op.workspace for op in found.ops] == [op.workspace for op in other.planner.program.ops]
    assert [buffer.bytes for buffer in found.buffers] == [buffer.bytes for buffer in other.planner.program.buffers]


def test_a_schedule_is_for_the_sizes_that_the_referee_has_judged():
    """By its digest: that for other sizes it refuses."""
    schedule = plans().ways[0].schedule
    with pytest.raises(InvalidSchedule, match="bound"):
        referee(plans().at((3, 9)), plans().machine, schedule)

    made = rebound(schedule, plans().program, plans().at((3, 9)))
    referee(plans().at((3, 9)), plans().machine, made)
    with pytest.raises(InvalidSchedule, match="bound"):
        rebound(made, plans().program, plans().at((5, 9)))
    other = capture(nn.Linear(4, 4), (torch.randn(2, 4),), loss=lambda out: out.sum()).program
    with pytest.raises(InvalidSchedule, match="other ops"):
        rebound(schedule, plans().program, other)


def test_a_size_can_be_solved_without_tracing():
    """Its schedule is one more way, for all sizes."""
    sizes, known = (9, 40), len(plans().ways)
    budget = (plans().side(plans().ways[0], sizes).peak + plans().side(plans().ways[-1], sizes).peak) // 2
    choice = plans().solve(sizes, budget, time_limit=0.5)

    assert choice.side.peak <= budget
    assert choice.way in plans().ways
    assert len(plans().ways) <= known + 1
    with pytest.raises(BudgetError):
        plans().solve(sizes, 1000, time_limit=0.5)


def test_every_way_has_eagers_bits():
    """At sizes other than the example's."""
    inputs = {"x": torch.randn(3, 9, 16)}
    known = step(model(), model(), inputs)

    for way in plans().ways:
        assert equal(known, step(plans().module(way), model(), inputs))


def test_sizes_of_a_call():
    """By its arguments, however they are passed."""
    assert plans().sizes_of((torch.randn(3, 9, 16),)) == (3, 9)
    assert plans().sizes_of((), {"x": torch.randn(3, 9, 16)}) == (3, 9)
    assert plans().sizes_of(()) is None
    assert plans().sizes_of((1,)) is None
    assert [plans().holds((1, 9)), plans().holds((2, 9))] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow": ("offload",)}, "allow='offload' holds for one shape"),
        ({"lend_gradients": True}, "lend_gradients holds for one shape"),
        ({"optimizer": "sgd", "optimizer_in_backward": True}, "optimizer_in_backward holds for one shape"),
    ],
)
def test_what_holds_for_one_shape_is_refused(options: dict, message: str):
    """Before anything is traced."""
    with pytest.raises(MemplanError, match=message):
        Session(model(), (torch.randn(4, 32, 16),), machine="h100-80gb", dynamic=DYNAMIC, **options)


def test_a_session_for_one_shape_has_no_sizes():
    """Nor is a model served that is another at other sizes."""
    linear = nn.Linear(4, 4)
    with pytest.raises(MemplanError, match="captured for one shape"):
        SizedPlans(Session(linear, (torch.randn(2, 4),), machine="h100-80gb", loss=lambda out: out.sum()))
    other = capture(nn.Linear(16, 16), (torch.randn(3, 9, 16),), loss=lambda out: out.sum())
    with pytest.raises(CaptureError, match="plan for each shape"):
        plans().check_against(other)


def test_the_optimizers_state_counts_at_all_sizes():
    """It does not depend on them."""
    options = {"machine": "h100-80gb", "optimizer": "adamw", "time_limit": 1}
    made = SizedPlans(Session(model(), (torch.randn(4, 32, 16),), dynamic=DYNAMIC, **options))
    other = Session(model(), (torch.randn(3, 9, 16),), **options)

    assert made.check_against(other.captured) == (3, 9)
    assert made.at((3, 9)).resident_bytes == other.planner.program.resident_bytes


def test_nothing_is_measured_for_a_machine_that_this_is_not():
    """Its figures are estimates at all sizes."""
    with pytest.raises(MemplanError, match="not at hand"):
        plans().learn((3, 9))

"""Schedules on disk: the same question is not searched twice, and what no longer holds is not taken."""

import msgspec
import pytest
import torch
from memplan.planner.cost.cache import cache_directory
from memplan.planner.ir.errors import BudgetError
from memplan.planner.pipeline.planner import Planner
from memplan.planner.verbs.kept import Asked, Found, known_plan, plan_path, unpacked, write
from memplan.planner.verbs.session import Session
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")


def session(**options: object) -> Session:
    """A chain that has to be recomputed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(16, 16), nn.Tanh(), nn.GELU())))
    known: dict = {"machine": "h100-80gb", "loss": lambda out: out.sum(), "time_limit": 60} | options
    made = Session(model, (torch.randn(64, 16),), **known)
    vars(made)["model"] = model  # as long as the session
    return made


def budget_of(known: Session) -> int:
    """Less than keeping everything takes."""
    planner = known.planner
    return (planner.kept.peak + planner.quick_floor.peak) // 2


def test_the_same_question_is_searched_once(monkeypatch: pytest.MonkeyPatch):
    """Another session of the same model gets the same schedule, and the same smallest budget, without a search."""
    first = session()
    budget = budget_of(first)
    plan = first.plan(budget)

    def searched(self: Planner, budget: int) -> None:
        raise AssertionError("a search")

    monkeypatch.setattr(Planner, "solve", searched)
    again = session().plan(budget)

    assert again.schedule == plan.schedule
    assert (again.minimum, again.status) == (plan.minimum, plan.status)


@pytest.mark.parametrize("other", [{"seed": 1}, {"allow": "recompute"}, {"machine": "a100-80gb"}, {"solver": "cbc"}])
def test_another_question_is_searched(other: dict):
    """Other levers, seeds, solvers and machines find other schedules."""
    first = session()
    budget = budget_of(first)
    first.plan(budget)
    second = session(**other)
    second.begin()

    assert first.known_plan(first.planner, budget) is not None
    assert first.known_plan(first.planner, budget - 1) is None
    assert second.known_plan(second.planner, budget) is None


def test_what_is_worse_by_now_is_not_taken():
    """With costs that have changed, a search that was broken off sooner, or bytes that make no sense."""
    first = session()
    planner, budget = first.planner, budget_of(first)
    first.plan(budget)
    path = plan_path(planner.program, first.machine, first.allowed, Asked(budget))
    found = msgspec.json.decode(unpacked(path), type=Found)

    def known(limit: float) -> bool:
        return known_plan(planner.program, first.machine, first.allowed, (), Asked(budget), limit) is not None

    assert path.is_relative_to(cache_directory())
    assert found.limit is None
    assert known(1e9)
    write(path, msgspec.structs.replace(found, limit=5.0))
    assert (known(5.0), known(5.1)) == (True, False)
    write(path, msgspec.structs.replace(found, ratio=found.ratio - 0.02))
    assert not known(0.0)
    write(path, msgspec.structs.replace(found, schedule=planner.kept.schedule))  # passes the budget
    assert not known(0.0)
    path.write_bytes(b"nonsense")
    assert not known(0.0)


def test_what_cannot_be_met_is_refused_again():
    """Nothing is kept of a budget below the floor."""
    for _ in range(2):
        with pytest.raises(BudgetError, match="smallest budget"):
            session().plan(session().program.resident_bytes)


def test_more_levers_look_for_a_smaller_step():
    """What fewer have found is a beginning: the smallest budget that is told is that of all."""
    few = session(allow="recompute")
    few.plan(budget_of(few))
    more = session()
    planner = more.begin()

    assert planner.known is not None
    assert more.floor_of(planner).peak <= planner.known.peak
    assert planner.begun  # a search
    more.plan(budget_of(more))
    again = session()
    planner = again.begin()
    assert again.floor_of(planner) is planner.known
    assert not planner.begun

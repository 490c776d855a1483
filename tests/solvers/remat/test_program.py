"""The keep-or-recompute program over the timeline."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from memplan.planner.pipeline.planner import Planner
from memplan.solvers.programs.linear import highs_model
from memplan.solvers.remat.problem import score
from strategies import ROOMY, make_program

SEEDS = range(12)


def planner_of(seed: int, **options: object) -> Planner:
    """A planner for a random program."""
    rng = random.Random(seed)
    return Planner(make_program(rng, rng.randint(4, 10), repeat=rng.choice([1, 3]), **options), ROOMY)


@pytest.mark.parametrize("seed", SEEDS)
def test_slots_are_gaps(seed):
    """Each slot is a gap of its own; one that a use ends is of a buffer that a repeatable op makes."""
    planner = planner_of(seed)
    problem, slots = planner.flat.problem, planner.master.slots

    assert len(set(slots.gap.tolist())) == len(slots.gap)
    for gap, buffer, before, at, last in zip(slots.gap, slots.buffer, slots.before, slots.at, slots.last, strict=True):
        assert problem.use_start[buffer] + buffer <= gap <= problem.last_gap[buffer]
        assert problem.producer[buffer] <= before < at
        assert last or problem.repeatable[problem.producer[buffer]]
        assert bool(last) == (gap == problem.last_gap[buffer])
        assert at == len(problem.seconds) if last else problem.use[gap - buffer] == at


@pytest.mark.parametrize("seed", SEEDS)
def test_with_room_for_everything_everything_is_kept(seed):
    """A budget of the peak without repetition costs no second."""
    planner = planner_of(seed)
    found = planner.master.iterate(planner.flat.problem.keep_all(), planner.kept.peak, rounds=2, seconds=1.0)

    assert found
    assert score(planner.flat.problem, found[0], planner.kept.peak).time == pytest.approx(planner.base_seconds)


@pytest.mark.parametrize("seed", SEEDS)
def test_tighter_budgets_never_break_the_iteration(seed):
    """Every answer, down to budgets that nothing fits, is a solution that can run, no faster than the bound at its own peak."""
    planner = planner_of(seed)
    problem = planner.flat.problem
    for share in (0.9, 0.6, 0.3, 0.05):
        budget = int(problem.resident + (planner.kept.peak - problem.resident) * share)
        for since in planner.master.iterate(problem.keep_all(), budget, rounds=3, seconds=1.0):
            found = score(problem, since, budget)
            assert planner.bound(found.peak) <= found.time * (1 + 1e-9) < np.inf


@pytest.mark.parametrize("integer", [True, False])
def test_each_program_is_given_its_share_of_the_time(monkeypatch, integer):
    """Integer or relaxed, the solver has a limit, and all limits together are what was asked for."""
    planner = planner_of(0)
    master, base = planner.master, planner.flat.problem.keep_all()
    limits = []

    def solve(base, moments, room, time_limit, integer):
        limits.append(time_limit)
        now[0] += time_limit
        return None if len(limits) == 3 else np.ones((1, len(planner.flat.problem.size)))

    now = [0.0]
    monkeypatch.setattr("memplan.solvers.remat.exact.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(master, "solve", solve)
    master.iterate(base, planner.kept.peak, rounds=4, seconds=8.0, integer=integer)
    assert limits == ([2.0, 2.0, 2.0] if integer else [8.0, 0.0, 0.0])


@pytest.mark.parametrize("integer", [True, False])
def test_the_limit_reaches_the_solver(monkeypatch, integer):
    """The option is set in both kinds of program."""
    made = []
    monkeypatch.setattr(
        "memplan.solvers.programs.linear.highs_model", lambda *given: made.append(highs_model(*given)) or made[-1]
    )
    planner = planner_of(0)
    moments, used = planner.master.worst(planner.flat.problem.keep_all())
    planner.master.solve(planner.flat.problem.keep_all(), moments, used, 7.5, integer)
    assert made[0].getOptionValue("time_limit")[1] == 7.5

"""The search: the same seed gives the same answer, and what it says fits does."""

import dataclasses
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.planner.ir.program import Program
from memplan.planner.ir.referee import referee
from memplan.planner.pipeline.planner import Planner
from memplan.solvers.remat.anneal import anneal, segment_open
from memplan.solvers.remat.problem import score
from strategies import ROOMY, make_program


def planner_of(seed: int) -> Planner:
    """A planner for a random program that has something to choose."""
    rng = random.Random(seed)
    return Planner(make_program(rng, rng.randint(5, 10), repeat=rng.choice([1, 3])), ROOMY, effort=2000)


def some_budget(planner: Planner, share: float) -> int:
    """A budget between the resident bytes and the peak without repetition."""
    resident = planner.program.resident_bytes
    return int(resident + (planner.kept.peak - resident) * share)


def nothing_chosen(planner: Planner) -> np.ndarray:
    """The solution that keeps everything."""
    return planner.flat.problem.keep_all()


@pytest.mark.parametrize("seed", range(10))
def test_what_the_search_says_fits_does(seed):
    """A finite time comes with a solution whose schedule, replayed by the referee, takes that time and fits the budget."""
    planner = planner_of(seed)
    for share in (0.95, 0.8, 0.6, 0.3):
        budget = some_budget(planner, share)
        found, seconds = anneal(planner.flat.problem, planner.search.space, nothing_chosen(planner), budget, 1500, 0.02, seed)
        if not np.isfinite(seconds):
            continue
        assert score(planner.flat.problem, found, budget).time == pytest.approx(seconds)
        side = planner.finish(found, budget)
        assert side.peak <= budget
        assert side.time == pytest.approx(seconds)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_solution(seed):
    """Nothing but its arguments decides what the search returns."""
    planner = planner_of(seed)
    arguments = (planner.flat.problem, planner.search.space, nothing_chosen(planner), some_budget(planner, 0.8), 1000, 0.02)
    (found, seconds), (again, other) = anneal(*arguments, seed), anneal(*arguments, seed)

    assert found.tolist() == again.tolist()
    assert seconds == other


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_the_start_is_a_candidate(steps):
    """What fits already is never lost, however short the search, nor where nothing leaves a choice."""
    planner = planner_of(3)
    problem, start = planner.flat.problem, nothing_chosen(planner)
    budget = planner.kept.peak
    _, seconds = anneal(problem, planner.search.space, start, budget, steps, 0.02, 0)
    assert seconds <= score(problem, start, budget).time == pytest.approx(planner.base_seconds)
    alone = dataclasses.replace(planner.search.space, uses=0)
    assert anneal(problem, alone, start, budget, steps, 0.02, 0)[1] == score(problem, start, budget).time
    assert anneal(problem, alone, start, budget - 1, steps, 0.02, 0)[1] == float("inf")


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_take_no_time_are_planned(seed):
    """Where every op takes 0 s, and where there are no ops, nothing is divided by that."""
    program = make_program(random.Random(seed), 8)
    idle = msgspec.structs.replace(program, ops=tuple(msgspec.structs.replace(op, seconds=0.0) for op in program.ops))
    planner = Planner(idle, ROOMY, effort=300)
    assert planner.solve(max(planner.kept.peak - 1, planner.floor.peak)).found.time == 0.0
    empty = Planner(Program("none", (), (), ()), ROOMY, effort=300)
    assert (empty.floor.peak, empty.solve(0).found.time, empty.search.fastest(0, 0.0) is not None) == (0, 0.0, True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 12), max_size=6))
def test_what_the_backward_pass_makes_belongs_to_the_segment_opened_last(opened, times):
    """As by looking at all of them: the nearest opened before, the first of several; the first of all if there is none."""
    found = segment_open(np.array(opened), np.array(times, np.int64))
    for time, segment in zip(times, found.tolist(), strict=True):
        before = [at for at in opened if at <= time]
        assert segment == (opened.index(max(before)) if before else 0)


def test_the_start_is_left_as_it_was():
    """The caller's solution is not written to."""
    planner = planner_of(3)
    start = nothing_chosen(planner)
    anneal(planner.flat.problem, planner.search.space, start, some_budget(planner, 0.7), 500, 0.02, 0)

    assert (start == nothing_chosen(planner)).all()


@pytest.mark.parametrize("seed", range(4))
def test_planning_twice_gives_the_same_schedule(seed):
    """Two planners with one seed and no deadline agree on every instruction."""
    first, second = planner_of(seed), planner_of(seed)
    budget = first.floor.peak + (first.kept.peak - first.floor.peak) // 3

    assert first.floor.schedule == second.floor.schedule
    assert first.solve(budget).found.schedule == second.solve(budget).found.schedule


@pytest.mark.parametrize("seed", range(6))
def test_the_floor_is_feasible_and_more_room_is_never_slower_than_the_floor(seed):
    """The referee accepts the floor's schedule at its own peak; every larger budget is planned, and no slower."""
    planner = planner_of(seed)
    floor = planner.floor

    assert referee(planner.program, ROOMY, floor.schedule, floor.peak).peak[0] == floor.peak
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(floor.peak + (planner.kept.peak - floor.peak) * share)
        answer = planner.solve(budget)
        assert answer.found.peak <= budget
        assert answer.found.time <= floor.time * (1 + 1e-9)
        assert planner.bound(budget) <= answer.found.time * (1 + 1e-9)

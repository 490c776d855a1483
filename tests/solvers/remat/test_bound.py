"""The lower bound: no schedule in base order is faster."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.passes.liveness import Liveness
from memplan.planner.ir.referee import referee
from memplan.planner.pipeline.planner import Planner
from memplan.solvers.remat.problem import EAGER, HOLD, SINCE, events_of, score
from strategies import ROOMY, make_order, make_program


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 10))
def test_no_random_schedule_beats_the_bound(seed, forward):
    """For any valid order with repetitions, the bound at its own peak is at most its time."""
    rng = random.Random(seed)
    program = make_program(rng, forward)
    planner = Planner(program, ROOMY)
    for _ in range(4):
        order = make_order(rng, program, False, rng.randint(0, 8))
        report = referee(program, ROOMY, Liveness()(program, order))

        assert planner.bound(report.peak[0]) <= report.time * (1 + 1e-9)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(3, 12), st.floats(0.05, 0.9))
def test_no_random_solution_beats_the_bound(seed, forward, share):
    """The same for solutions of the simulator, whose repetitions do save bytes."""
    rng = random.Random(seed)
    program = make_program(rng, forward)
    planner = Planner(program, ROOMY)
    problem = planner.flat.problem
    for _ in range(6):
        solution = problem.keep_all()
        for buffer, gap in enumerate(problem.last_gap):
            for index in range(problem.use_start[buffer], problem.use_start[buffer + 1]):
                if rng.random() < share:
                    solution[SINCE, index + buffer] = rng.randint(int(problem.producer[buffer]), int(problem.use[index]))
                    solution[EAGER, index + buffer] = rng.randint(0, 1)
            if rng.random() < share / 4:
                solution[HOLD, gap] = rng.randint(0, len(program.ops))
        found = score(problem, solution, 0)
        if np.isfinite(found.time) and len(events_of(problem, solution).order):
            assert planner.bound(found.peak) <= found.time * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_falls_with_the_budget_to_the_base_time(seed):
    """More room never raises the bound; with room for everything it is the time without repetition."""
    rng = random.Random(seed)
    planner = Planner(make_program(rng, rng.randint(3, 10)), ROOMY)
    resident, peak = planner.program.resident_bytes, planner.kept.peak
    bounds = [planner.bound(int(resident + (peak - resident) * share)) for share in (0.1, 0.4, 0.7, 0.9, 1.0)]

    assert all(tight >= loose - 1e-12 for tight, loose in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(planner.base_seconds)


def test_nothing_fits_in_less_than_one_op_needs():
    """A budget below a single op's own bytes has an infinite bound."""
    planner = Planner(make_program(random.Random(0), 6), ROOMY)

    assert planner.bound(planner.program.resident_bytes + 1) == float("inf")

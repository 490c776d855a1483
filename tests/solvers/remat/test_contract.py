"""Every way to choose what is resident on every small instance: it keeps its word, and only what is impossible is called so."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from contract import keeps_its_word
from exact import cheapest
from memplan.passes.problem import flatten
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.remat.methods import METHODS, method
from memplan.solvers.remat.problem import SINCE, fault, score
from memplan.solvers.warm import smallest_problem
from quick import hasty
from strategies import make_program

SHARES = (1.0, 0.8, 0.6, 0.4, 0.1)  # of what lives at the peak without repetition, beside what is resident
INSTANCES = {f"random {seed}": make_program(random.Random(seed), 2 + seed % 3, reuse=False) for seed in range(10)}


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_keeps_its_word(name, instance):
    """Within budgets from all that the step takes to less than an op does; brute force is never beaten."""
    program = INSTANCES[instance]
    problem = flatten(program).problem
    peak = score(problem, problem.keep_all(), 0).peak
    for share in SHARES:
        budget = int(problem.resident + share * (peak - problem.resident))
        least = cheapest(program, budget, in_turn=True)
        with hasty():
            answer = method(name)(problem, Limit(budget, 0.5))
        fits = np.isfinite(least)
        keeps_its_word(
            answer,
            least if fits else None,
            lambda solution, budget=budget: score(problem, solution, budget).time,
            partial(fault, problem, budget=budget),
        )
        assert share < 1 or answer.status is Status.OPTIMAL
        assert answer.best is None or fits


@pytest.mark.parametrize("name", METHODS)
def test_without_a_budget_nothing_is_repeated(name):
    """The fastest of all, and known to be."""
    problem = flatten(INSTANCES["random 3"]).problem
    answer = method(name)(problem, Limit(seconds=0.5))
    assert answer.status is Status.OPTIMAL
    assert score(problem, answer.found, 0).time == pytest.approx(problem.seconds.sum())


def test_the_check_names_what_is_wrong():
    """Bytes beyond the budget; an op that is to run again and may not."""
    problem = smallest_problem()
    kept, peak = problem.keep_all(), score(problem, problem.keep_all(), 0).peak
    assert not fault(problem, kept, peak)
    assert fault(problem, kept, peak - 1) == f"it takes {peak} bytes, and the budget is {peak - 1}"
    dropped = kept.copy()
    dropped[SINCE, 1] = 4  # what the first op makes, from its use forward to its use backward
    assert not fault(problem, dropped)
    once = replace(problem, repeatable=np.zeros_like(problem.repeatable))
    assert "may not be repeated" in fault(once, dropped)

"""Plans whose integer programs another solver solves."""

import random

import memplan
import numpy as np
import pytest
import torch
from memplan.planner.ir.referee import referee
from memplan.planner.pipeline.planner import Planner
from memplan.solvers.programs import linear
from memplan.solvers.programs.names import NAMES, why_not
from memplan.solvers.remat.exact import GAP, Master
from strategies import ROOMY, make_program
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")
OTHERS = [name for name in NAMES if name != "highs" and not why_not(name)]


@pytest.mark.parametrize("solver", OTHERS)
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_other_solvers_keep_as_much(solver, integer, seed):
    """The keep-or-recompute program costs no more than HiGHS's answer, but for the gap that either may leave."""
    rng = random.Random(seed)
    planner = Planner(make_program(rng, rng.randint(4, 14), repeat=rng.choice([1, 3])), ROOMY)
    base = planner.flat.problem.keep_all()
    moments, used = planner.master.worst(base)
    room = np.maximum(0.5 * (planner.kept.peak + planner.flat.problem.resident) - used + planner.master.weight.sum(), 0.0)
    costs, solve = [], linear.solve

    def noted(program, solver, seconds, **options):
        found = solve(program, solver, seconds, **options)
        costs.append(float(program.cost @ found.values))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memplan.solvers.programs.linear.solve", noted)
        for name in ("highs", solver):
            master = Master(planner.flat.problem, planner.segments, planner.master.slots, name)
            assert master.solve(base, moments, room, 10.0, integer) is not None
    assert costs[0] * (1 - GAP) <= costs[1] + 1e-6
    assert costs[1] * (1 - GAP) <= costs[0] + 1e-6


@pytest.mark.parametrize("solver", OTHERS)
def test_a_plan_by_another_solver_is_a_plan(monkeypatch, solver):
    """Through `memplan.plan` and `memplan.sweep`: the solver is asked, and the referee accepts what comes of it, in budget."""
    asked, solve = [], linear.solve
    monkeypatch.setattr(
        "memplan.solvers.programs.linear.solve", lambda *given, **rest: asked.append(given[1]) or solve(*given, **rest)
    )
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())])
    facts = {"loss": torch.sum, "machine": "h100-80gb", "time_limit": 5.0, "solver": solver}
    made = memplan.plan(model, "70%", (torch.ones(512, 64),), **facts)
    assert set(asked) == {solver}
    assert made.peak <= made.budget
    assert made.bound <= made.time
    report = referee(made.program, made.machine, made.planned.schedule, made.budget)
    assert report.time == made.time
    asked.clear()
    assert all(each.peak <= each.budget for each in memplan.sweep(model, ["80%", "70%"], (torch.ones(512, 64),), **facts))
    assert set(asked) == {solver}

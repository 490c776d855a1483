"""What `plan` refuses before it traces."""

import memplan
import pytest
import torch


@pytest.mark.parametrize(
    ("budget", "options", "told"),
    [
        ("lots", {}, "cannot read the budget 'lots'"),
        (0, {}, "less than one byte|cannot read the budget 0"),
        (None, {"host_budget": "lots"}, "cannot read the host budget 'lots'"),
        (None, {"strategy": "mimo"}, "strategy='mimo'"),
        (None, {"strategy": "memo", "arena": True}, "without arena"),
        (None, {"lend_gradients": True}, "plan with arena=True"),
        (None, {"allow": ["magic"]}, "allow='magic'"),
        (None, {"machine": "h1000"}, "no machine 'h1000'"),
        (None, {"time_limit": float("nan")}, "time_limit=nan"),
        (None, {"solver": "glpk"}, "solver='glpk' is not known: the solvers are highs, cbc, scip, gurobi, cplex"),
        (None, {"solver": 5}, "solver=5 is not known"),
        (None, {"solver": "cplex"}, "solver='cplex' is not installed: pip install cplex"),
        (None, {"solver": "cbc", "strategy": "memo"}, "plan without solver"),
        (None, {"solver": "cbc", "allow": ["reorder"]}, "leaves nothing to solve"),
    ],
)
def test_arguments_are_checked_before_the_model_is_traced(monkeypatch, budget, options, told):
    """A mistake in them costs no minutes."""
    monkeypatch.setattr("memplan.planner.capture.capture.capture", lambda *_, **__: pytest.fail("traced"))
    monkeypatch.setattr("memplan.solvers.programs.names.find_class", lambda name: None if name == "cplex" else name)
    with pytest.raises(memplan.MemplanError, match=told):
        memplan.plan(torch.nn.Linear(2, 2), budget, (torch.ones(1, 2),), **options)
    if "solver" in options:
        with pytest.raises(memplan.MemplanError, match=told):
            memplan.sweep(torch.nn.Linear(2, 2), 2, (torch.ones(1, 2),), **options)
    if list(options) == ["solver"]:
        with pytest.raises(memplan.MemplanError, match=told):
            memplan.map_model(torch.nn.Linear(2, 2), "M_R", (torch.ones(1, 2),), **options)

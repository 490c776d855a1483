"""A minimum that is stated holds, in another process too; more levers never do worse; a refusal names what would do."""

import json
import os
import subprocess
import sys
from itertools import combinations

import memplan
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.planner.cli.terminal import fail
from memplan.planner.ir.errors import BudgetError
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.models.byname import load_model
from memplan.planner.pipeline.planner import SMALL, WORTH, Planner
from memplan.planner.verbs.session import Session
from strategies import programs
from torch import nn

MOVING = Machine(
    "moving", "cpu", (Tier("device", 1 << 50, 1e9), Tier("host", 1 << 50, 1e9)), (Unit("core", "device", {"default": 1e9}),),
    (Link("device", "host", 1e5, 1e-4), Link("host", "device", 1e5, 1e-4)),
)  # fmt: skip
LEVERS = ("recompute", "reorder", "offload")
SIZES = "num_hidden_layers=2&hidden_size=64&intermediate_size=128&num_attention_heads=2&num_key_value_heads=2&vocab_size=512"
MODEL = f"hf:llama?{SIZES}&batch=2&seq=64"
CODE = f"""
import sys, memplan
from memplan.planner.models.byname import load_model
model, args, kwargs = load_model("{MODEL}", meta=True)
levers, limit, budget = sys.argv[1].split(","), float(sys.argv[2]), int(sys.argv[3])
try:
    plan = memplan.plan(model, budget, args, kwargs, machine="h100-80gb", allow=levers, time_limit=limit)
    print(plan.peak)
except memplan.BudgetError as error:
    print(error.minimum)
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Nothing is known from before."""
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))


def net() -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(32, 32), nn.GELU())))


X = (torch.randn(64, 32),)


def refused(budget, **options) -> BudgetError:
    """What planning the small model at a budget that cannot be met says."""
    options = {"machine": "rtx4090", "time_limit": 1.0, "loss": torch.sum, **options}
    with pytest.raises(BudgetError) as caught:
        memplan.plan(net(), budget, X, **options)
    return caught.value


@pytest.mark.parametrize("limit", [0, 0.5])
@pytest.mark.parametrize("allow", [(), ("recompute",), ("recompute", "reorder"), LEVERS])
@pytest.mark.parametrize("arena", [False, True])
def test_a_stated_minimum_works(limit, allow, arena):
    """Planned at the minimum that an error or a plan states, the step fits it, whatever the time, and says the same minimum."""
    options = {"allow": allow, "time_limit": limit, "arena": arena, "machine": "rtx4090", "loss": torch.sum}
    minimum = refused(1, **options).minimum
    plan = memplan.plan(net(), minimum, X, **options)

    assert plan.peak <= minimum
    assert plan.minimum <= minimum
    assert memplan.plan(net(), str(plan.minimum), X, **options).peak <= plan.minimum


@pytest.mark.parametrize("cached", [True, False])
def test_a_schedule_that_is_kept_is_only_a_beginning(cached, monkeypatch):
    """What was found once is found again from disk; a file that makes no sense, or none at all, does no harm."""
    minimum = refused(1).minimum
    folder = [path for path in memplan_files() if path.suffix == ".floor"]
    assert len(folder) == 1
    if not cached:
        folder[0].write_bytes(b"nonsense")
    plan = memplan.plan(net(), minimum, X, machine="rtx4090", time_limit=30, loss=torch.sum)

    assert plan.peak <= minimum


def memplan_files():
    """What lies in the cache."""
    from memplan.planner.cost.cache import cache_directory

    return sorted(path for path in cache_directory().rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["0", "0.5", "5"])
@pytest.mark.parametrize("allow", ["recompute,reorder", "recompute,reorder,offload", "offload"])
def test_a_stated_minimum_works_in_another_process(limit, allow):
    """For a real model; what one process says, another can do."""

    def answer(budget: str) -> int:
        command = [sys.executable, "-c", CODE, allow, limit, budget]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout)

    minimum = answer("1000")

    assert answer(str(minimum)) <= minimum


def planners(program, tiered: bool = True) -> dict[frozenset[str], Planner]:
    """A planner for every set of levers."""
    sets = [frozenset(some) for count in range(len(LEVERS) + 1) for some in combinations(LEVERS, count)]
    machine = MOVING
    return {
        some: Planner(program, machine, "recompute" in some, "reorder" in some, "offload" in some, effort=400)
        for some in sets
        if tiered or "offload" not in some
    }


@settings(deadline=None, max_examples=8)
@given(programs(6), st.sampled_from([0.2, 0.6]))
def test_a_lever_more_never_does_worse(program, share):
    """The smallest budget, and the time at any budget that fewer levers meet, are no larger; moving is left out where it saves
    less than it is worth."""
    assert len(program.ops) <= SMALL
    found = planners(program)
    floors = {some: planner.floor.peak for some, planner in found.items()}
    top = found[frozenset()].kept.peak
    budget = int(min(floors.values()) + share * (top - min(floors.values())))
    times = {some: planner.solve(budget).found.time for some, planner in found.items() if floors[some] <= budget}
    for more in found:
        for fewer in [some for some in found if some < more]:
            assert floors[more] <= floors[fewer]
            if fewer in times:
                assert times[more] <= times[fewer] / (1 - WORTH if "offload" in more else 1) + 1e-12


def test_a_refusal_names_the_levers_that_would_do():
    """AdamW's state fits no budget below it; with updates in backward and offload the same budget is met, as estimated."""
    model, args, kwargs = load_model(MODEL, meta=True)
    options = {"kwargs": kwargs, "machine": "rtx4090", "time_limit": 2.0, "optimizer": "adamw"}
    budget = 16 * sum(value.numel() for value in model.parameters()) - 1  # less than weights, gradients and AdamW's state
    with pytest.raises(BudgetError, match="with optimizer_in_backward and offload: about ") as caught:
        memplan.plan(model, budget, args, **options)
    levers = caught.value.levers
    plan = memplan.plan(model, budget, args, **options, allow=LEVERS, optimizer_in_backward=True)

    assert set(levers) == {"optimizer_in_backward", "offload", "optimizer_in_backward and offload"}
    assert levers["optimizer_in_backward and offload"] <= budget
    assert plan.peak <= budget
    session = Session(model, args, kwargs, machine="rtx4090", optimizer="adamw", time_limit=0.0, optimizer_in_backward=True)
    assert levers["optimizer_in_backward"] == session.planner.search.descent.peak  # the program is the one that tracing gives


def test_a_refusal_says_what_was_typed():
    """The budget in the user's words, and in bytes; and the machine, where that is what is too small."""
    assert "fits the budget '10%', " in str(refused("10%"))
    assert "fits the budget '3KiB', 3 KiB (3072 bytes)" in str(refused("3KiB"))
    assert "no arena" in refused("3KiB", arena=True).levers
    assert set(refused("3KiB", allow=()).levers) >= {"recompute", "reorder", "offload", "recompute and reorder"}
    assert "a smaller batch or another machine is needed" in str(refused(1, allow=LEVERS))


def test_the_command_line_says_them_too(capsys):
    """`levers` is a key of the error as JSON."""
    with pytest.raises(SystemExit) as status:
        fail(BudgetError("none fits", 7, {"offload": 5}), True)

    assert status.value.code == 3
    assert json.loads(capsys.readouterr().out) == {
        "error": "none fits", "kind": "BudgetError", "minimum_budget": 7, "levers": {"offload": 5}
    }  # fmt: skip


def test_sweep_is_public():
    """`memplan.sweep` gives a plan for each budget that it is given."""
    plans = memplan.sweep(net(), 3, X, loss=torch.sum, machine="h100-80gb", time_limit=1.0)

    assert len(plans) == 3
    assert all(plan.peak <= plan.budget for plan in plans)

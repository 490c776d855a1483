"""`memplan plan`."""

from pathlib import Path
from typing import Annotated

from .asked import planning
from .options import (
    Allow,
    Budget,
    Counted,
    HostBudget,
    InBackward,
    Infer,
    Json,
    Lent,
    MachineName,
    Model,
    Placed,
    Quiet,
    Seed,
    Solver,
    Strategy,
    TimeLimit,
    output,
)
from .progress import progress
from .tables import after, plan_facts, plan_table
from .terminal import answer


def plan(
    model: Model,
    budget: Budget = None,
    machine: MachineName = None,
    allow: Allow = None,
    infer: Infer = False,
    optimizer: Counted = None,
    in_backward: InBackward = False,
    arena: Placed = False,
    lend_gradients: Lent = False,
    strategy: Strategy = None,
    host_budget: HostBudget = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    solver: Solver = None,
    out: Annotated[Path | None, output("Write the plan here, as JSON.", "-o", "--output")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Plan a step within a budget."""
    options = planning(
        allow, optimizer, time_limit, seed, infer=infer, machine=machine, arena=arena, lend_gradients=lend_gradients,
        strategy=strategy, host_budget=host_budget, in_backward=in_backward, solver=solver,
    )  # fmt: skip
    with progress("loading torch", quiet) as report:
        from ..models.byname import load_model
        from ..verbs import plan as api

        report("building the model", 0.0)
        module, args, kwargs = load_model(model, meta=True)
        made = api.plan(module, budget, args, kwargs, **options, progress=report)
    if out is not None:
        made.save(out)
    facts = plan_facts(made) | ({"output": str(out)} if out else {})
    answer(as_json, facts, plan_table(made), *([after(made, out)] if out else []))

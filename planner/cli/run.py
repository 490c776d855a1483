"""`memplan run`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .asked import planning
from .options import (
    Allow,
    Budget,
    HostBudget,
    InBackward,
    Json,
    Lent,
    Model,
    Optimizer,
    Placed,
    Quiet,
    Seed,
    Solver,
    Strategy,
    TimeLimit,
)
from .progress import progress
from .tables import run_facts, run_table
from .terminal import answer


def run(
    model: Model,
    budget: Budget = None,
    steps: Annotated[int, typer.Option(metavar="NUMBER", help="Steps to measure.", min=1)] = 5,
    optimizer: Annotated[
        Optimizer | None, typer.Option(metavar="NAME", help="Step this optimizer of torch's; left out: gradients only.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu or cuda; left out: where the model is.")] = None,
    allow: Allow = None,
    in_backward: InBackward = False,
    arena: Placed = False,
    lend_gradients: Lent = False,
    strategy: Strategy = None,
    host_budget: HostBudget = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    solver: Solver = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train for real, without the plan and with it, and compare."""
    options = planning(
        allow, optimizer, time_limit, seed, arena=arena, lend_gradients=lend_gradients, strategy=strategy,
        host_budget=host_budget, in_backward=in_backward, solver=solver,
    )  # fmt: skip
    stepped = options["optimizer"]
    with progress("loading torch", quiet) as report, tempfile.TemporaryDirectory() as folder:
        from ...backends.measure import compare as turns
        from ...backends.measure import training as trial
        from ..models.byname import load_model
        from ..verbs import plan as api

        report("building the model", 0.0)
        module, args, kwargs = trial.to_device(device, *load_model(model, meta=False))
        made = api.plan(module, budget, args, kwargs, **options, progress=report)
        del module, args, kwargs  # the runs want the memory
        file = Path(folder) / "plan.json"
        made.save(file)
        plain, planned = (trial.Request(model, plan, steps, stepped, device, in_backward) for plan in (None, str(file)))
        found = turns.compare(plain, planned, (made.unplanned.peak, made.peak), made.machine.device, report)
    answer(as_json, run_facts(made, found), run_table(made, found))

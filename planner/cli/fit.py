"""`memplan fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from .asked import planning
from .options import (
    Allow,
    Counted,
    HostBudget,
    InBackward,
    Infer,
    Json,
    MachineName,
    Model,
    Over,
    Quiet,
    Seed,
    Solver,
    picture,
    searching,
    whole_budget,
)
from .progress import progress
from .tables import table
from .terminal import answer

if TYPE_CHECKING:
    from ..ir.fit import Fit


def fit(
    model: Model,
    budget: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="24GB, or bytes; left out: all that the machine has.", callback=whole_budget),
    ] = None,
    over: Annotated[Over, typer.Option(help="What is made larger.")] = Over.BATCH,
    machine: MachineName = None,
    allow: Allow = None,
    infer: Infer = False,
    optimizer: Counted = None,
    in_backward: InBackward = False,
    host_budget: HostBudget = None,
    most: Annotated[int | None, typer.Option(metavar="NUMBER", help="The largest size to try.", min=1)] = None,
    points: Annotated[int, typer.Option(metavar="NUMBER", help="How many sizes to plan for.", min=1)] = 6,
    time_limit: Annotated[float, searching("Of search, about; tracing comes on top.")] = 30.0,
    seed: Seed = 0,
    solver: Solver = None,
    png: Annotated[Path | None, picture("Peaks and rates over the sizes, as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The largest batch, sequence or depth that trains within a budget."""
    options = planning(
        allow, optimizer, time_limit, seed, infer=infer, machine=machine, host_budget=host_budget, in_backward=in_backward,
        solver=solver,
    )  # fmt: skip
    for name in ("arena", "lend_gradients", "strategy"):
        del options[name]
    with progress("loading torch", quiet) as report:
        from ..verbs import fit as api

        found = api.fit(model, budget, over=over.value, most=most, points=points, **options, progress=report)
        for path in (png, svg):
            if path is not None:
                from ...backends.report.pictures import save
                from ...backends.report.sizes import sizes

                save(sizes(found), path)
    answer(as_json, facts(found), Group(table(found.heads, found.rows), Text("\n".join(found.remarks))))


def facts(found: "Fit") -> dict[str, Any]:
    """The figures for programs."""
    return {
        "over": found.over,
        "budget": found.budget,
        "machine": found.machine,
        "largest": found.largest,
        "peak": found.peak,
        "time": found.time,
        "rate": found.best.rate,
        "unit": found.unit,
        "why": found.why,
        "unplanned": found.unplanned,
        "points": [
            {"size": point.size, "peak": point.peak, "time": point.time, "fits": point.fits, "rate": point.rate,
             "unplanned": point.unplanned}
            for point in found.points
        ],
        "levers": found.levers,
        "allowed": sorted(found.allowed),
        "modules": found.modules,
        "estimated": found.estimated,
        "traces": found.traces,
        "capture_seconds": found.capture_seconds,
        "search_seconds": found.search_seconds,
    }  # fmt: skip

"""`memplan sweep`."""

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import MemplanError
from ..ir.files import write_file
from ..ir.units import show_bytes, show_change, show_seconds, show_share
from .asked import planning
from .options import (
    Allow,
    Counted,
    InBackward,
    Infer,
    Json,
    MachineName,
    Model,
    Quiet,
    Seed,
    Solver,
    TimeLimit,
    output,
    picture,
)
from .progress import progress
from .tables import overhead, table
from .terminal import answer


def sweep(
    model: Model,
    points: Annotated[int, typer.Option(metavar="NUMBER", help="How many budgets.", min=2)] = 10,
    machine: MachineName = None,
    allow: Allow = None,
    infer: Infer = False,
    optimizer: Counted = None,
    in_backward: InBackward = False,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    solver: Solver = None,
    png: Annotated[Path | None, picture("The curve as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    table_file: Annotated[Path | None, output("The table as CSV.", "--csv")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Peak against step time over the whole range of budgets."""
    options = planning(allow, optimizer, time_limit, seed, infer=infer, machine=machine, in_backward=in_backward, solver=solver)
    with progress("loading torch", quiet) as report:
        from ..models.byname import load_model
        from ..verbs import plan as api

        report("building the model", 0.0)
        module, args, kwargs = load_model(model, meta=True)
        plans = api.sweep(module, points, args, kwargs, **options, progress=report)
        if not plans:
            raise MemplanError("no budget between the unplanned peak and the floor was met: give a longer --time-limit")
        for path in (png, svg):
            if path is not None:
                from ...backends.report.pictures import curve, save

                save(curve(plans), path)
    facts = [
        {
            "budget": made.budget,
            "peak": made.peak,
            "time": made.time,
            "overhead": overhead(made),
            "gap": made.gap,
            "status": made.status,
        }
        for made in plans
    ]
    if table_file is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(facts[0]))
        writer.writeheader()
        writer.writerows(facts)
        write_file(table_file, text.getvalue())
    first = plans[0]
    whole = {
        "machine": first.machine.name,
        "unplanned": {"peak": first.unplanned.peak, "time": first.unplanned.time},
        "minimum_budget": min(made.minimum for made in plans),
        "points": facts,
    }
    rows = [
        (
            "none" if made.budget is None else show_bytes(made.budget),
            show_bytes(made.peak),
            show_seconds(made.time),
            show_change(made.time, made.unplanned.time),
            "0%" if made.status == "optimal" else show_share(made.gap),
        )
        for made in plans
    ]
    rows.append(("unplanned", show_bytes(first.unplanned.peak), show_seconds(first.unplanned.time), "", ""))
    heads = ("budget", "peak memory", "step time (predicted)", "beside unplanned", "a better plan saves at most")
    answer(as_json, whole, table(heads, rows))

"""`memplan alloc`: addresses for the buffers of a file."""

from pathlib import Path
from typing import Annotated

import typer

from ...solvers.programs.names import NAMES
from .asked import refuse
from .options import (
    Json,
    Method,
    Quiet,
    SearchLimit,
    Seed,
    output,
    picture,
    readable_capacity,
    solver,
)
from .progress import progress
from .tables import table
from .terminal import answer, end

AUTO = Method("auto")


def alloc(
    file: Annotated[Path, typer.Argument(metavar="IN.CSV", help="Columns id, lower, upper, size; lifetimes half-open.")],
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="To fit into, or fast=1MiB,slow=4GiB by pool; left out: the smallest peak.",
            callback=readable_capacity,
        ),
    ] = None,
    align: Annotated[int, typer.Option(metavar="BYTES", help="Every offset is a multiple of it.", min=1, max=2**40)] = 1,
    out: Annotated[Path | None, output("Write the file again, with offsets.", "-o", "--output")] = None,
    png: Annotated[Path | None, picture("The packing as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    time_limit: SearchLimit = 10.0,
    method: Annotated[Method, typer.Option(help="auto, or a solver to compare it with.")] = AUTO,
    named: Annotated[str | None, solver(f"Of --method mip, which it implies: {', '.join(NAMES)}.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Addresses for buffers with known lifetimes."""
    refuse((
        named is not None and method.value not in ("auto", "mip"),
        f"--solver {named} solves an integer program, and --method {method} is none: leave one of them out",
    ))  # fmt: skip
    with progress("reading the file", quiet) as report:
        from ..verbs.alloc import find_places, write_places

        places = find_places(file, capacity, align, method.value, time_limit, seed, report, named)
        if not places.reason:
            write_places(places, out, [path for path in (png, svg) if path is not None])
    facts = places.facts()
    if places.reason:
        end(facts, f"{file}: {places.reason}", 3, as_json)
    answer(as_json, facts, table((), places.rows()))

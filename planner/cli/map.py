"""`memplan map`: an inference on a scratchpad."""

from pathlib import Path
from typing import Annotated

import typer

from ...solvers.programs.names import NAMES
from ..ir.files import write_file
from ..ir.units import show_bytes, show_seconds
from .asked import refuse
from .options import (
    Json,
    Model,
    Quiet,
    SearchLimit,
    Seed,
    a_machine,
    a_scratchpad,
    complete_machine,
    output,
    picture,
    solver,
)
from .progress import progress
from .tables import after, table
from .terminal import answer


def map_(
    model: Model,
    scratchpad: Annotated[
        str,
        typer.Option(
            metavar="BYTES",
            help="1MiB, bytes, or M_R (the largest op), M_P (the smallest peak), M_H (halfway).",
            callback=a_scratchpad,
        ),
    ],
    machine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A preset or TOML file with a memory behind its first tier.",
            callback=a_machine,
            autocompletion=complete_machine,
        ),
    ] = "scratchpad",
    weights: Annotated[bool, typer.Option("--weights", help="Parameters take room in the scratchpad, too.")] = False,
    bits: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Of every element: 8, 16 or 32; left out: the model's own.")
    ] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Let ops run again where that spares bytes.")] = False,
    execute: Annotated[bool, typer.Option("--run", help="Run it on the scratchpad machine, beside the model.")] = False,
    time_limit: SearchLimit = 60.0,
    seed: Seed = 0,
    named: Annotated[str | None, solver(f"Of what stays in the scratchpad: {', '.join(NAMES)}; left out: CP-SAT.")] = None,
    out: Annotated[Path | None, output("Write the program: .json, or text.", "-o", "--output")] = None,
    png: Annotated[Path | None, picture("Addresses over time as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    save: Annotated[Path | None, output("Write a plan, for `memplan show` and `memplan check`.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Map an inference onto a scratchpad accelerator."""
    refuse(
        (bits not in (None, 8, 16, 32), f"--bits {bits}: choose from 8, 16, 32, or leave it out for the model's own types"),
        (execute and bits is not None, "--bits is for mappings of another element size, which cannot be run: leave out --run"),
    )
    with progress("loading torch", quiet) as report:
        from ..models.byname import load_model
        from ..verbs.map import compared, map_model

        report("building the model", 0.0)
        module, args, kwargs = load_model(model, meta=not execute)
        made = map_model(module.eval(), scratchpad, args, kwargs, machine=machine, weights=weights, bits=bits,
                         recompute=recompute, time_limit=time_limit, seed=seed, solver=named, progress=report)  # fmt: skip
        if execute:
            report("running on the scratchpad machine", 0.0)
        ran = compared(made, args, kwargs) if execute else {}
        if out is not None:
            write_file(out, made.assembly.to_json() if out.suffix == ".json" else str(made.assembly))
        for path in (png, svg):
            if path is not None:
                made.save_picture(path)
        if save is not None:
            made.plan.save(save)
        facts, rows = made.facts() | ran | ({"output": str(out)} if out else {}), made.rows()
    if ran:
        same = "bit-equal" if ran["equal"] else f"differs by {ran['difference']:.1e}"
        rows.append(("run", same, f"{show_bytes(ran['counted'])} moved, {show_seconds(ran['counted_time'])} by its clock"))
    answer(as_json, facts, table((), rows), *([after(made.plan, save)] if save else []))

"""`memplan show`: a plan as a table, as pictures, and for other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .options import Json, PlanFile, Quiet, output, picture
from .progress import progress
from .tables import plan_facts, plan_table
from .terminal import answer

if TYPE_CHECKING:
    from ..ir.plan import Plan


def show(
    file: PlanFile,
    png: Annotated[Path | None, picture("The memory timeline as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    trace: Annotated[Path | None, output("A Chrome trace, for ui.perfetto.dev.")] = None,
    snapshot: Annotated[Path | None, output("A memory snapshot, for pytorch.org/memory_viz.")] = None,
    html: Annotated[Path | None, output("A self-contained report.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the schedule, an instruction a line.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show a plan: summary, pictures, exports."""
    with progress("reading the plan", quiet) as report:
        from ..ir.plan import load
        from ..ir.text import show_schedule

        made = load(file)
        if png or svg or trace or snapshot or html:
            report("writing", 0.0)
            export(made, png=png, svg=svg, trace=trace, snapshot=snapshot, html=html)
    written = [str(path) for path in (png, svg, trace, snapshot, html) if path]
    schedule = show_schedule(made.program, made.schedule) if text else None
    facts = plan_facts(made) | {"written": written} | ({"text": schedule} if text else {})
    parts = [plan_table(made), *([Text(f"written: {', '.join(written)}")] if written else [])]
    answer(as_json, facts, *parts, *([Text("\n" + schedule.rstrip())] if schedule is not None else []))


def export(
    made: "Plan", *, png: Path | None, svg: Path | None, trace: Path | None, snapshot: Path | None, html: Path | None
) -> None:
    """Write the files asked for."""
    from ...backends.report import exports, pictures

    for path in (png, svg):
        if path is not None:
            pictures.save(pictures.timeline(made), path)
    if trace is not None:
        exports.save_trace(made, trace)
    if snapshot is not None:
        exports.save_snapshot(made, snapshot)
    if html is not None:
        exports.save_html(made, html)

"""`memplan show` and `memplan check`: what is done with a plan's file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..options import Json, PlanFile, Quiet, output, picture
from ..progress import progress
from ..tables import plan_facts, plan_table, table
from ..terminal import answer
from ..units import show_bytes, show_seconds

if TYPE_CHECKING:
    from ..plan import Plan


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
        from ..plan import load
        from ..text import show_schedule

        made = load(file)
        if png or svg or trace or snapshot or html:
            report("writing", 0.0)
            export(made, png=png, svg=svg, trace=trace, snapshot=snapshot, html=html)
    written = [str(path) for path in (png, svg, trace, snapshot, html) if path]
    schedule = show_schedule(made.program, made.schedule) if text else None
    facts = plan_facts(made) | {"written": written} | ({"text": schedule} if text else {})
    parts = [plan_table(made), *([Text(f"written: {', '.join(written)}")] if written else [])]
    answer(as_json, facts, *parts, *([Text("\n" + schedule.rstrip())] if schedule is not None else []))


def check(file: PlanFile, quiet: Quiet = False, as_json: Json = False) -> None:
    """Have the referee replay a plan."""
    with progress("replaying the plan", quiet):
        from ..plan import load

        made = load(file)
    report = made.planned.report
    links = [f"{link.source}->{link.target}" for link in made.machine.links]
    moved = dict(zip(links, report.moved, strict=True))
    facts = {
        "valid": True,
        "peak": made.peak,
        "time": made.time,
        "budget": made.budget,
        "moved": moved,
        "repeated": report.repeated,
        "recompute_time": report.recompute,
        "instructions": len(made.schedule.instructions),
    }
    budget = [] if made.budget is None else [("budget", show_bytes(made.budget))]
    rows = [
        ("peak memory", show_bytes(made.peak)),
        *budget,
        ("step time (predicted)", show_seconds(made.time)),
        ("instructions", str(len(made.schedule.instructions))),
        ("of them, ops run again", str(report.repeated)),
        *((f"moved {link}", show_bytes(size)) for link, size in made.moved.items()),
    ]
    answer(as_json, facts, Text(f"{file}: valid, every rule is kept", style="green"), table((), rows))


def export(
    made: "Plan", *, png: Path | None, svg: Path | None, trace: Path | None, snapshot: Path | None, html: Path | None
) -> None:
    """Write the files asked for."""
    from ...backends import exports, pictures

    for path in (png, svg):
        if path is not None:
            pictures.save(pictures.timeline(made), path)
    if trace is not None:
        exports.save_trace(made, trace)
    if snapshot is not None:
        exports.save_snapshot(made, snapshot)
    if html is not None:
        exports.save_html(made, html)

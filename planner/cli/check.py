"""`memplan check`: the referee replays a plan."""

from typing import TYPE_CHECKING

from rich.text import Text

from ..ir.units import show_bytes, show_seconds
from .options import Json, PlanFile, Quiet
from .progress import progress
from .tables import table
from .terminal import answer

if TYPE_CHECKING:
    pass


def check(file: PlanFile, quiet: Quiet = False, as_json: Json = False) -> None:
    """Have the referee replay a plan."""
    with progress("replaying the plan", quiet):
        from ..ir.plan import load

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

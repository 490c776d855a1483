"""What commands answer: a plan's and a run's figures, for programs and for people."""

import math
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..ir.summary import figures, headings, remarks
from ..ir.units import show_bytes, show_change, show_seconds

if TYPE_CHECKING:
    from ...backends.measure.compare import Comparison
    from ...backends.measure.training import Trial
    from ..ir.plan import Plan

WAYS = {"out": "out of the device", "in": "back to it"}  # what a trial calls the ways of copies


def overhead(made: "Plan") -> float:
    """How much longer than unplanned: 0.25 for a quarter."""
    return made.time / made.unplanned.time - 1 if made.unplanned.time > 0 else 0.0


def plan_facts(made: "Plan") -> dict[str, Any]:
    """A plan's figures for programs."""
    counts = made.counts
    return {
        "budget": made.budget,
        "peak": made.peak,
        "time": made.time,
        "unplanned": {"peak": made.unplanned.peak, "time": made.unplanned.time},
        "eager_peak": made.eager_peak,
        "status": made.status,
        "gap": made.gap,
        "minimum_budget": made.minimum,
        "capture_seconds": made.capture_seconds,
        "solve_seconds": made.solve_seconds,
        "compile_seconds": made.compile_seconds,
        "counts": {"keep": counts.keep, "recompute": counts.recompute, "offload": counts.offload},
        "machine": made.machine.name,
        "measured": None if made.coverage is None else made.coverage.facts(),
        "ops": len(made.program.ops),
        "buffers": len(made.program.buffers),
        **({"arena": made.arena} if made.arena else {}),
        **({"moved": made.moved} if made.moved else {}),
    }


def plan_table(made: "Plan") -> RenderableType:
    """A plan's figures for people: its summary, with the names of the columns set off."""
    return Group(table(headings(made), figures(made)), Text("\n".join(remarks(made))))


def after(made: "Plan", path: Path) -> Text:
    """What can be done with a plan that has been written."""
    rows = [(f"memplan show {quote(str(path))}", "this summary again; with --png, --html, --text and more, what happens when")]
    rows += [(f"memplan check {quote(str(path))}", "the referee replays it")]
    if not made.recipe.mapped:
        rows.append((f'memplan.load("{path}").apply(model)', "in Python, the planned model"))
    width = max(len(call) for call, _ in rows)
    return Text("\n".join([f"written to {path}:", *(f"  {call:{width}}  {what}" for call, what in rows)]))


def run_facts(made: "Plan", found: "Comparison") -> dict[str, Any]:
    """Predictions beside measurements, and whether the numbers agree."""
    plain, planned = found.first, found.second

    def side(predicted: Any, trial: "Trial") -> dict[str, Any]:
        losses = [float.fromhex(loss) for loss in trial.losses]
        return {
            "peak": {"predicted": predicted.peak, "measured": trial.peak},
            "time": {"predicted": predicted.time, "measured": trial.seconds},
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        }

    return {
        "budget": made.budget,
        "machine": made.machine.name,
        "unplanned": side(made.unplanned, plain),
        "planned": side(made.planned, planned),
        "ratio": {"predicted": made.time / made.unplanned.time if made.unplanned.time > 0 else None, "measured": found.ratio},
        "rounds": {"counted": found.rounds, "in_turns": found.ratio is not None, "disturbed": found.disturbed},
        "measured": None if made.coverage is None else made.coverage.facts(),
        "losses_equal": plain.losses == planned.losses,
        "parameters_equal" if made.recipe.in_backward else "gradients_equal": plain.gradients == planned.gradients,
        **({"copies": msgspec.to_builtins(planned.copies)} if planned.copies else {}),
    }


def run_table(made: "Plan", found: "Comparison") -> RenderableType:
    """The same for people."""
    plain, planned = found.first, found.second

    def measured(peak: int | None) -> str:
        return "unknown here" if peak is None else show_bytes(peak)

    asked = "no budget" if made.budget is None else f"budget {show_bytes(made.budget)}"
    before = made.unplanned
    less = "" if planned.peak is None or plain.peak is None else show_change(planned.peak, plain.peak)
    rows = [
        ("peak memory, measured", measured(planned.peak), measured(plain.peak), less),
        ("peak memory, predicted", show_bytes(made.peak), show_bytes(before.peak), show_change(made.peak, before.peak)),
        ("step time, measured", show_seconds(planned.seconds), show_seconds(plain.seconds),
         show_change(planned.seconds, plain.seconds)),
        ("step time, predicted", show_seconds(made.time), show_seconds(before.time), show_change(made.time, before.time)),
    ]  # fmt: skip
    pairs = enumerate(zip(planned.losses, plain.losses, strict=True), 1)
    rows += [(f"loss, step {number}", *(f"{float.fromhex(loss):.6f}" for loss in pair), "") for number, pair in pairs]
    copies = [
        Text(f"copied {WAYS.get(way, way)} in a step: {show_bytes(way_of.bytes)} in {show_seconds(way_of.busy)}, "
             f"{way_of.bytes / max(way_of.busy, 1e-9) / 1e9:.1f} GB/s; the step waited {show_seconds(way_of.stalled)} for it")
        for way, way_of in planned.copies.items() if way_of.bytes
    ]  # fmt: skip
    verdicts = [
        equality("losses", planned.losses == plain.losses),
        equality("parameters" if made.recipe.in_backward else "gradients", planned.gradients == plain.gradients),
    ]
    return Group(table((asked, "planned", "unplanned", ""), rows), *copies, *verdicts, *timing(made, found))


def timing(made: "Plan", found: "Comparison") -> list[Text]:
    """How a run's times came about, and what they were predicted by."""
    lines = [Text("times: one run after the other, for there is no memory for both at once")]
    if found.ratio is not None:
        lines = [Text(f"times: {found.ratio:.3f} of unplanned, the median of {found.rounds} rounds with a step of each")]
    if found.disturbed:
        lines.append(Text(f"other work held the cores in {found.disturbed} of {found.rounds}: times are too long, and differ "
                          "by more than the plan; run again when the machine is quiet", style="yellow"))  # fmt: skip
    if made.coverage is not None:
        lines.append(Text(f"predicted {made.coverage.describe(made.machine.name)}"))
    return lines


def equality(what: str, equal: bool) -> Text:
    """Whether both runs have the same bits, in colour."""
    words = "bit-equal to the unplanned run's" if equal else "not bit-equal to the unplanned run's"
    return Text(f"{what}: {words}", style="green" if equal else "yellow")


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A table whose figures are flush right."""
    drawn = Table(box=None, show_header=bool(heads), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, [heads, *rows]))):
        drawn.add_column(heads[column] if heads else "", justify="right" if column else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn

"""What commands answer: a plan's and a run's figures, for programs and for people."""

import math
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .units import show_bytes, show_seconds

if TYPE_CHECKING:
    from ..backends.trial import Trial
    from ..backends.turns import Comparison
    from .plan import Plan


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
    """A plan's figures for people."""
    saved = made.peak / made.unplanned.peak - 1 if made.unplanned.peak else 0.0
    rows = [
        ("peak", show_bytes(made.peak), show_bytes(made.unplanned.peak), f"{saved:+.1%}"),
        ("step time (predicted)", show_seconds(made.time), show_seconds(made.unplanned.time), f"{overhead(made):+.1%}"),
    ]
    words = made.summary().splitlines()[len(rows) + 1 :]
    return Group(table((made.program.name, "planned", "unplanned", ""), rows), Text("\n".join(words)))


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
    rows = [
        ("peak, measured", measured(planned.peak), measured(plain.peak)),
        ("peak, predicted", show_bytes(made.peak), show_bytes(made.unplanned.peak)),
        ("step time, measured", show_seconds(planned.seconds), show_seconds(plain.seconds)),
        ("step time, predicted", show_seconds(made.time), show_seconds(made.unplanned.time)),
    ]
    pairs = enumerate(zip(planned.losses, plain.losses, strict=True), 1)
    rows += [(f"loss, step {number}", *(f"{float.fromhex(loss):.6f}" for loss in pair)) for number, pair in pairs]
    rows += [(f"copies {way}, a step", f"{show_bytes(way_of.bytes)} in {show_seconds(way_of.busy)}, "
              f"{way_of.bytes / max(way_of.busy, 1e-9) / 1e9:.1f} GB/s, stalled {show_seconds(way_of.stalled)}", "")
             for way, way_of in planned.copies.items()]  # fmt: skip
    verdicts = [
        equality("losses", planned.losses == plain.losses),
        equality("parameters" if made.recipe.in_backward else "gradients", planned.gradients == plain.gradients),
    ]
    return Group(table((asked, "planned", "unplanned"), rows), *verdicts, *timing(made, found))


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
    """`losses: bit-equal`, in colour."""
    return Text(f"{what}: {'bit-equal' if equal else 'not bit-equal'}", style="green" if equal else "yellow")


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A table whose figures are flush right."""
    drawn = Table(box=None, show_header=bool(heads), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, [heads, *rows]))):
        drawn.add_column(heads[column] if heads else "", justify="right" if column else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn

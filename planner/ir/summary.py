"""A plan in words: what `Plan.summary`, `repr` and the commands say of it. Every line is to be understood on its own."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .units import show_bytes, show_change, show_count, show_seconds, show_share

if TYPE_CHECKING:
    from .plan import Plan

ALIKE = 0.03  # the eager peak is told where it is further than this share from the unplanned one
COMPILED = 1.0  # seconds: to load what was compiled before takes less


def summary(plan: "Plan") -> str:
    """The figures as a table, and what is to be said of them, a line each."""
    return "\n".join([*columns([headings(plan), *figures(plan)]), *remarks(plan)])


def one_line(plan: "Plan") -> str:
    """The same, short: for `repr`."""
    if plan.recipe.mapped:
        moved = sum(plan.planned.report.moved)
        what = f"{show_bytes(moved)} moved with {show_bytes(plan.peak)} of scratchpad, {show_seconds(plan.time)}"
    else:
        peak = f"peak {show_bytes(plan.peak)} (unplanned {show_bytes(plan.unplanned.peak)})"
        what = f"{peak}, step {show_seconds(plan.time)} (unplanned {show_seconds(plan.unplanned.time)})"
    return f"<memplan.Plan of {plan.program.name} on {plan.machine.name}: {what}, {plan.status}>"


def headings(plan: "Plan") -> tuple[str, ...]:
    """Of the columns. A mapping is compared with nothing: unplanned, there is no scratchpad to be spared."""
    return (plan.program.name, "mapped") if plan.recipe.mapped else (plan.program.name, "planned", "unplanned", "")


def figures(plan: "Plan") -> list[tuple[str, ...]]:
    """Peak and time, beside those of the step as eager PyTorch runs it."""
    if plan.recipe.mapped:
        return [("peak in the scratchpad", show_bytes(plan.peak)), ("time (predicted)", show_seconds(plan.time))]
    before = plan.unplanned
    return [
        ("peak memory", show_bytes(plan.peak), show_bytes(before.peak), show_change(plan.peak, before.peak)),
        ("step time (predicted)", show_seconds(plan.time), show_seconds(before.time), show_change(plan.time, before.time)),
    ]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with their cells one below the other, figures flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            .rstrip() for row in rows]  # fmt: skip


def remarks(plan: "Plan") -> list[str]:
    """What the figures do not say, a line each."""
    parts = (budget, eager, quality, activations, moves, homes, arena, lent, times, effort)
    return [line for line in (part(plan) for part in parts) if line]


def budget(plan: "Plan") -> str:
    """What was asked for, and what could have been."""
    room, what = show_bytes(plan.machine.tiers[0].capacity), plan.machine.name
    if plan.recipe.mapped:
        return f"scratchpad: {room} of {what}"
    asked = f"none asked for; {what} has {room}" if plan.budget is None else f"{show_bytes(plan.budget)} on {what}"
    return f"budget: {asked}; smallest budget known to work: {show_bytes(plan.minimum)}"


def eager(plan: "Plan") -> str:
    """What the model takes as it is written, where that is something else than the unplanned step."""
    found, before = plan.eager_peak, plan.unplanned.peak
    if found is None or abs(found / before - 1) < ALIKE:
        return ""
    return f"eager mode takes {show_bytes(found)}: unplanned, no variable outlives its last use and nothing is checkpointed"


def quality(plan: "Plan") -> str:
    """How good the plan is known to be."""
    mapped = plan.recipe.mapped
    if plan.status == "optimal":
        return "optimal: " + (
            "no mapping moves fewer bytes" if mapped else "no plan within the budget is predicted to be faster"
        )
    most = show_share(plan.gap) if plan.gap < 0.0005 else f"at most {show_share(plan.gap)}"
    better = "mapping would spare" if mapped else "plan within the budget would save"
    return f"feasible: a better {better} {most} of the {'bytes moved' if mapped else 'time'}"


def activations(plan: "Plan") -> str:
    """What becomes of what the backward pass reads."""
    counts = plan.counts
    total = counts.keep + counts.recompute + counts.offload
    if plan.recipe.mapped or not plan.recipe.train or not total:
        return ""
    parts = [(counts.keep, "kept"), (counts.recompute, "recomputed"), (counts.offload, "moved out and back")]
    return f"{show_count(total, 'activation')} for the backward pass: " + listed(f"{n} {what}" for n, what in parts if n)


def moves(plan: "Plan") -> str:
    """Bytes over each link."""
    return "moved in a step: " * bool(plan.moved) + listed(f"{show_bytes(size)} {link}" for link, size in plan.moved.items())


def homes(plan: "Plan") -> str:
    """What lies elsewhere between its uses."""
    if not plan.schedule.homes:
        return ""
    size = sum(plan.program.buffers[buffer].bytes for buffer, _ in plan.schedule.homes)
    where = listed(sorted({plan.machine.tiers[tier].name for _, tier in plan.schedule.homes}))
    what = "inputs and outputs" if plan.recipe.mapped else "parameters and optimizer state"
    return f"between their uses {show_bytes(size)} of {what} are on {where}"


def arena(plan: "Plan") -> str:
    """The arena, and what lies beside it."""
    if not plan.arena:
        return ""
    outside, mapped = len(plan.schedule.outside), plan.recipe.mapped
    beside = ["other gradients" if plan.schedule.lent else "gradients"] if plan.recipe.train else []
    beside += ["outputs", *([show_count(outside, "short-lived result")] if outside else [])]
    return f"arena: {show_bytes(plan.arena)}, every address planned" + f"; {listed(beside)} lie outside it" * (not mapped)


def lent(plan: "Plan") -> str:
    """What the caller has to do."""
    count = len(plan.schedule.lent)
    return f"{show_count(count, 'gradient')} in the arena: drop them before the next forward pass" if count else ""


def times(plan: "Plan") -> str:
    """Where the times of the ops come from."""
    return "" if plan.coverage is None else plan.coverage.describe(plan.machine.name)


def effort(plan: "Plan") -> str:
    """What it took."""
    size = f"{show_count(len(plan.program.ops), 'op')} on {show_count(len(plan.program.buffers), 'buffer')}"
    once = f", solvers compiled in {show_seconds(plan.compile_seconds)}" if plan.compile_seconds > COMPILED else ""
    return f"traced in {show_seconds(plan.capture_seconds)}, planned in {show_seconds(plan.solve_seconds)}{once}: {size}"


def listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last

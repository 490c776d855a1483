"""Pictures: the memory and the copies of a step over time, and peak against time. Matplotlib without global state."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from ...planner.ir.errors import MemplanError
from ...planner.ir.files import write_file
from ...planner.ir.machine import Machine
from ...planner.ir.program import Kind, Phase, Program
from ...planner.ir.schedule import Wait
from ...planner.ir.units import show_bytes, show_seconds
from .queues import INTO, OUT, RUNS, Lane, boxes, lanes
from .replay import RECOMPUTED, WORKSPACE, held, layers, phases

if TYPE_CHECKING:
    from ...planner.ir.plan import Plan, Side

# After Okabe and Ito, "Color Universal Design". What the caller owns is grey: no plan changes it.
COLOURS = {
    Kind.PARAMETER: "#5b6770",
    Kind.STATE: "#8e9aa3",
    Kind.INPUT: "#b7c0c7",
    Kind.CONSTANT: "#d9dee2",
    Kind.GRADIENT: "#0072b2",
    Kind.OUTPUT: "#56b4e9",
    Kind.ACTIVATION: "#009e73",
    RECOMPUTED: "#8fd6bf",
    Kind.TEMPORARY: "#e69f00",
    WORKSPACE: "#f0d98c",
    RUNS: "#4d4d4d",
    OUT: "#d55e00",
    INTO: "#cc79a7",
}
HATCHES = {RECOMPUTED: "////"}
INK = "#333333"
COLUMNS = 1600  # a picture's resolution in time; longer schedules are thinned to it


def timeline(plan: "Plan") -> Figure:
    """The step's live bytes, planned above unplanned on the same scales, stacked by kind of tensor.

    Below them, where the plan copies: what runs and what is copied when, and the bytes in each further tier that is used.
    """
    queues = lanes(plan.program, plan.machine, plan.planned)
    behind = {
        tier.name: values
        for index, tier in enumerate(plan.machine.tiers)
        if index and queues and (values := held(plan.program, plan.machine, plan.schedule, index)).any()
    }
    heights = [2.8, 2.8]
    if queues:
        heights += [0.2 + 0.25 * len(queues), *[1.0] * len(behind)]
    figure = new_figure(10.0, 6.2 + 1.25 * sum(heights[2:]))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[row]) for row in range(len(heights))]
    used: set[str] = set()
    sides = [("planned", plan.planned), ("unplanned", plan.unplanned)]
    for ax, (title, side) in zip(axes[:2], sides, strict=True):
        used |= draw_side(ax, side.program, plan.machine, side)
        ax.set_title(f"{title}: {show_bytes(side.peak)}, {show_seconds(side.time)}", loc="left", fontsize=10, color=INK)
    top = 1.12 * max(side.peak for _, side in sides)
    longest = max(span(side)[1] for _, side in sides)
    for ax in axes[:2]:
        ax.set_ylim(0, top)
        ax.set_yticks(byte_ticks(top))
        if plan.budget is not None and plan.budget <= top:
            ax.axhline(plan.budget, color="#b3261e", linestyle=(0, (5, 3)), linewidth=1.2)
            ax.annotate(
                f"budget {show_bytes(plan.budget)}",
                (1, plan.budget),
                (-4, 3),
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                color="#b3261e",
                ha="right",
                va="bottom",
                fontsize=8,
            )
    if queues:
        draw_queues(axes[2], plan.planned, queues)
    for ax, (name, values) in zip(axes[len(axes) - len(behind) :], behind.items(), strict=True):
        draw_behind(ax, plan.planned, name, values)
    for ax in axes:
        ax.set_xlim(0, longest)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("predicted time" if plan.unplanned.time > 0 else "instruction", fontsize=9)
    names = [layer for layer in COLOURS if layer in used]
    figure.legend(
        handles=[
            Patch(facecolor=COLOURS[name], edgecolor="white", hatch=HATCHES.get(name), label=str(name))
            for name in reversed(names)
        ],
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
    )
    figure.suptitle(f"{plan.program.name} on {plan.machine.name}", x=0.01, ha="left", fontsize=12, color=INK)
    return figure


def span(side: "Side") -> tuple[NDArray[np.float64], float]:
    """When each instruction starts and when the last ends: seconds, or instructions where no op has a cost."""
    if side.time > 0:
        return np.asarray(side.report.starts), side.time
    count = len(side.schedule.instructions)
    return np.arange(count, dtype=float), float(max(count, 1))


def draw_side(ax: Axes, program: Program, machine: Machine, side: "Side") -> set[str]:
    """One schedule's stack and its phases. Returns the layers drawn."""
    starts, end = span(side)
    stacked = layers(program, machine, side.schedule)
    shown = thinned(starts, end, np.asarray(side.report.timeline))
    edges = np.append(starts[shown], end)
    floor = np.zeros(len(edges))
    for name, values in stacked.items():
        # The last value is repeated, for a step drawn "post" ends where its last point is.
        stack = floor + np.append(values[shown], values[shown][-1:] if len(shown) else 0)
        ax.fill_between(
            edges,
            floor,
            stack,
            step="post",
            facecolor=COLOURS[name],
            hatch=HATCHES.get(name),
            edgecolor="white" if name in HATCHES else "none",
            linewidth=0.0,
        )
        floor = stack
    ax.step(edges, floor, where="post", color=INK, linewidth=0.7)
    # A peak can fall on an instruction that takes no time, such as the loss: a point shows it all the same.
    top = int(np.argmax(side.report.timeline)) if side.report.timeline else 0
    ax.plot(starts[top : top + 1], [side.peak][: len(starts)], marker="o", markersize=3.5, color=INK)
    begins: dict[str, int] = {}
    for phase, at in phases(program, side.schedule):
        begins.setdefault("backward" if phase is Phase.LOSS else phase.value, at)
    for name, at in begins.items():
        if starts[at] > 0:
            ax.axvline(starts[at], color=INK, linewidth=0.8, linestyle=":")
        ax.annotate(
            name,
            (starts[at], 1),
            (3, -3),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8,
            color=INK,
        )
    dress(ax, show_seconds if side.time > 0 else "{:.0f}".format, show_bytes)
    return set(stacked)


def draw_queues(ax: Axes, side: "Side", queues: dict[str, Lane]) -> None:
    """A lane of bars for the compute and for each link, on the time of the memory above."""
    for row, lane in enumerate(queues.values()):
        for name, bars in boxes(lane, row, side.time):
            edge = 0.3 if len(bars) < COLUMNS / 10 else 0.0
            look = {"facecolors": COLOURS[name], "hatch": HATCHES.get(name), "edgecolors": "white", "linewidths": edge}
            ax.add_collection(PolyCollection(bars, **look))
    dress(ax, show_seconds, str)
    ax.grid(visible=False)
    ax.set_ylim(0.5 - len(queues), 0.5)
    ax.set_yticks([-row for row in range(len(queues))], list(queues))
    ax.tick_params(axis="y", length=0)
    starts = np.append(side.report.starts, side.time)
    waits = [isinstance(step, Wait) for step in side.schedule.instructions]
    waited = float(np.diff(starts)[waits].sum())
    title = f"planned: {show_seconds(waited) if waited else 'no time'} spent waiting for copies"
    ax.set_title(title, loc="left", fontsize=10, color=INK)


def draw_behind(ax: Axes, side: "Side", tier: str, values: NDArray[np.int64]) -> None:
    """Bytes over time in a tier behind the device's memory."""
    starts, end = span(side)
    shown = thinned(starts, end, values)
    edges, heights = np.append(starts[shown], end), np.append(values[shown], values[-1])
    ax.fill_between(edges, heights, step="post", facecolor=COLOURS[OUT], alpha=0.2, linewidth=0.0)
    ax.step(edges, heights, where="post", color=COLOURS[OUT], linewidth=1.0)
    ax.set_ylim(0, 1.15 * float(values.max()))
    ax.set_yticks(byte_ticks(ax.get_ylim()[1])[::2])
    dress(ax, show_seconds, show_bytes)
    ax.set_title(f"planned, in {tier}: {show_bytes(float(values.max()))}", loc="left", fontsize=10, color=INK)


def thinned(starts: NDArray[np.float64], end: float, totals: NDArray[np.int64]) -> NDArray[np.intp]:
    """The instructions to draw: those that last, and of those in one column the fullest, so that peaks stay."""
    lasting = np.flatnonzero(np.diff(np.append(starts, end)) > 0)
    if len(lasting) <= COLUMNS:
        return lasting
    column = np.minimum((starts[lasting] / end * COLUMNS).astype(int), COLUMNS - 1)
    order = np.lexsort((-totals[lasting], column))
    first = np.append(True, np.diff(column[order]) > 0)
    return np.sort(lasting[order[first]])


def curve(plans: "Sequence[Plan]") -> Figure:
    """Step time against peak for a sweep of budgets, with the unplanned step and the smallest budget known to work."""
    figure = new_figure(7.0, 4.4)
    ax = figure.add_subplot()
    first = plans[0]
    points = sorted({(plan.peak, plan.time) for plan in plans})
    peaks, times = [peak for peak, _ in points], [time for _, time in points]
    floor = min(plan.minimum for plan in plans)
    ax.axvspan(0, floor, facecolor="#eeeeee", edgecolor="none")
    ax.axvline(floor, color=INK, linestyle=":", linewidth=1)
    ax.annotate(
        f"floor\n{show_bytes(floor)}",
        (floor, 0.97),
        (-4, 0),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=INK,
    )
    ax.plot(peaks, times, color=COLOURS[Kind.GRADIENT], marker="o", markersize=4, linewidth=1.5, label="planned")
    ax.plot(
        [first.unplanned.peak],
        [first.unplanned.time],
        color="#d55e00",
        marker="D",
        markersize=7,
        linestyle="none",
        label="unplanned",
    )
    ax.set_xlim(0, 1.05 * max(*peaks, first.unplanned.peak))
    low, high = min(*times, first.unplanned.time), max(*times, first.unplanned.time)
    margin = 0.12 * max(high - low, 0.2 * high, 1e-9)
    ax.set_ylim(low - margin, high + 2 * margin)
    ax.set_xticks(byte_ticks(ax.get_xlim()[1]))
    dress(ax, show_bytes, show_seconds)
    ax.set_xlabel("peak of device memory")
    ax.set_ylabel("step time (predicted)")
    if first.unplanned.time > 0:
        base = first.unplanned.time
        right = ax.secondary_yaxis(
            "right", functions=(lambda time: np.asarray(time) / base - 1, lambda over: (np.asarray(over) + 1) * base)
        )
        right.yaxis.set_major_formatter(FuncFormatter(lambda over, _: f"{over:+.0%}"))
        right.set_ylabel("against the unplanned step")
        right.spines["right"].set_visible(False)
        right.tick_params(colors=INK, labelsize=8)
    ax.legend(loc="upper right", frameon=False)
    ax.set_title(f"{first.program.name} on {first.machine.name}", loc="left", fontsize=12, color=INK)
    return figure


def packing(
    title: str,
    spans: "Sequence[Sequence[tuple[int, int]]]",
    sizes: "Sequence[int]",
    offsets: "Sequence[int]",
    bound: int | None,
    capacity: int | None,
) -> Figure:
    """Buffers as rectangles, time across and addresses upwards, with the lower bound, if known, and the capacity asked for."""
    figure = new_figure(10.0, 5.6)
    ax = figure.add_subplot()
    boxes = [
        [(low, offset), (high, offset), (high, offset + size), (low, offset + size)]
        for pieces, size, offset in zip(spans, sizes, offsets, strict=True)
        for low, high in pieces
    ]
    shades = np.array([size for pieces, size in zip(spans, sizes, strict=True) for _ in pieces], float)
    scale = np.log(shades) - np.log(shades.min(initial=1 << 62))
    colours = matplotlib.colormaps["viridis"](0.1 + 0.85 * scale / max(float(scale.max(initial=0)), 1e-9))
    edge = 0.3 if len(boxes) < 5000 else 0.0
    ax.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=edge, rasterized=not edge))
    peak = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
    ends = [time for pieces in spans for piece in pieces for time in piece] or [0, 1]
    for height, label, colour in ((bound, "lower bound", INK), (capacity, "capacity", "#b3261e")):
        if height is not None:
            ax.axhline(height, color=colour, linestyle=(0, (5, 3)), linewidth=1.0, label=f"{label} {show_bytes(height)}")
    ax.set_xlim(min(ends), max(ends))
    ax.set_ylim(0, 1.08 * max(peak, bound or 0, capacity or 0, 1))
    ax.set_yticks(byte_ticks(ax.get_ylim()[1]))
    dress(ax, "{:.0f}".format, show_bytes)
    ax.set_xlabel("time", fontsize=9)
    ax.set_title(f"{title}: {len(sizes)} buffers, peak {show_bytes(peak)}", loc="left", fontsize=12, color=INK)
    ax.legend(loc="upper right", frameon=False, fontsize=8.5, ncols=2)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which draws itself without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def byte_ticks(top: float) -> NDArray[np.float64]:
    """Four to eight sizes up to `top` whose step is a power of two, so that their binary units are round."""
    step = 2.0 ** np.ceil(np.log2(max(top, 8) / 8))
    return np.arange(0, top, step)


def dress(ax: Axes, x: Callable[[float], str], y: Callable[[float], str]) -> None:
    """Axes as every picture here has them: two spines, a faint grid, units on the ticks."""
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x(value) if value else "0"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y(value) if value else "0"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#000000", alpha=0.12, linewidth=0.6)
    ax.tick_params(colors=INK, labelsize=8)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as SVG where the name ends so, else in what its ending names (PNG, PDF).

    Raises:
        MemplanError: the ending names nothing that can be drawn.
    """
    kind = Path(path).suffix.removeprefix(".")
    if kind == "svg":
        write_file(path, svg(figure))
    elif kind in figure.canvas.get_supported_filetypes():
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=150, facecolor="white")
        write_file(path, drawn.getvalue())
    else:
        raise MemplanError(f"cannot draw {path}: the name must end in .png, .svg or .pdf")


def svg(figure: Figure) -> str:
    """A figure as an `<svg>` element; the same figure gives the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memplan"}):
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]

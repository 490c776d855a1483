"""What runs beside what: the compute and each link as a lane of bars over time, and how thousands of them are drawn."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...planner.ir.machine import Machine
from ...planner.ir.program import Program
from ...planner.ir.schedule import Run
from .replay import RECOMPUTED, copies

if TYPE_CHECKING:
    from ...planner.ir.plan import Side

RUNS = "ops"
OUT = "copy out of the device"
INTO = "copy into the device"
BAR = 0.8  # the height of a bar; lanes are 1 apart
SINGLE = 400  # bars of a lane that are drawn one by one; a few points each in a picture of ten inches

Spans = NDArray[np.float64]  # rows of begin and end, in seconds, one after the other
Lane = list[tuple[str, Spans]]  # what is drawn, later over earlier


def lanes(program: Program, machine: Machine, side: "Side") -> dict[str, Lane]:
    """Spans by lane: the compute, with repeated runs over it, and every link that carries anything. Empty without copies."""
    carried = copies(program, machine, side)
    if not carried:
        return {}
    runs: list[tuple[float, float]] = []
    again: list[tuple[float, float]] = []
    done: set[int] = set()
    for step, start in zip(side.schedule.instructions, side.report.starts, strict=True):
        if isinstance(step, Run):
            runs.append((start, start + program.ops[step.op].seconds))
            again += runs[-1:] * (step.op in done)
            done.add(step.op)
    found: dict[str, Lane] = {"compute": [(RUNS, spans(runs)), (RECOMPUTED, spans(again))]}
    for index in sorted({copy.link for copy in carried}):
        link = machine.links[index]
        name = INTO if link.target == machine.tiers[0].name else OUT
        own = [(copy.begin, copy.end) for copy in carried if copy.link == index]
        found.setdefault(f"{link.source} to {link.target}", []).append((name, spans(own)))
    return found


def spans(pairs: list[tuple[float, float]]) -> Spans:
    """Pairs as rows, without those that take no time."""
    rows = np.array(pairs, float).reshape(-1, 2)
    return rows[rows[:, 0] < rows[:, 1]]


def boxes(lane: Lane, row: int, end: float) -> list[tuple[str, list[NDArray[np.float64]]]]:
    """The corners of each bar's rectangle, for a lane that is so many rows below the first.

    More bars than `SINGLE` are not drawn one by one: time is cut into that many parts up to `end`, each with one rectangle
    as high as the share of it that the bars fill.
    """
    floor = -row - BAR / 2
    edges = np.linspace(0.0, end, SINGLE + 1)
    single = all(len(bars) <= SINGLE for _, bars in lane)
    found = []
    for name, bars in lane:
        if single:
            left, right, height = bars[:, 0], bars[:, 1], np.full(len(bars), BAR)
        else:
            left, right, height = edges[:-1], edges[1:], BAR * shares(bars, edges)
        bottom = np.full(len(left), floor)
        corners = [(left, bottom), (left, bottom + height), (right, bottom + height), (right, bottom)]
        found.append((name, list(np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)[height > 0])))
    return found


def shares(bars: Spans, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of the time between one edge and the next the bars fill, from 0 to 1; they do not overlap."""
    if not len(bars):
        return np.zeros(len(edges) - 1)
    lengths = bars[:, 1] - bars[:, 0]
    before = np.cumsum(lengths) - lengths
    filled = np.interp(edges, bars.ravel(), np.stack([before, before + lengths], axis=-1).ravel(), left=0.0)
    return np.diff(filled) / np.diff(edges)

"""A lower bound on the time of any schedule that runs a program's ops first in base order, within a budget.

Take the moment at which one op, the *cut*, first runs. What is resident then, and what must still be run again after
it, are tied by two rules: a value that is used later is resident or made again, and an op that is run again finds each
input resident or made again. With the bytes that the cut op itself needs set aside, the cheapest such set is a linear
program (a minimum cut with one knapsack row); its value is a bound for every schedule, because nothing is assumed of
what happens before or after. The largest over several cuts is returned.

Where there are tiers behind the device a third choice is that the value lies there. Then it has been copied out before the
cut and is copied in after it (a copy under way takes its bytes on the device at either end, so counts as resident): neither
part of the step is shorter than its copies take over all links together.

What may be at home in such a tier is *away* or stays on the device, and is *gone* at the cut or resident; who is gone is away.
If away, it is copied in before the cut where an op before the cut reads it; if gone, once more for what reads it after the cut;
and it is copied home after the op that changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import highspy
import numpy as np

from ..programs.linear import Row, highs_model, of_rows
from .problem import Problem, profile
from .replay import IN, IN_DELAY, IN_LOAD, OUT, OUT_DELAY, OUT_LOAD, ROOM
from .segments import Segments

CUT_OPS = 30_000  # ops of all linear programs of one bound together


@dataclass(frozen=True)
class Cut:
    """The relaxation at one cut.

    Attributes:
        at: base time of the cut op.
        seconds: the least time spent in recomputation after the cut and in stalls; infinite where nothing fits, and 0 where the
            program was not solved, so that nothing is known.
    """

    at: int
    seconds: float


@dataclass(frozen=True)
class Columns:
    """Where each kind of column lies.

    Attributes:
        again: of each op before the cut, how much of it is run again after it.
        keep: of each value made before the cut, how much is resident.
        moved: and how much lies in another tier.
        stalls: seconds waited for copies before the cut, and after it.
        away: of each buffer that may be at home in another tier, how much is.
        gone: and how much is not resident.
        count: of all columns.
    """

    again: slice
    keep: slice
    moved: slice
    stalls: slice
    away: slice
    gone: slice
    count: int


class CutModel:
    """The linear program of one cut, which can be solved for many budgets. Its time is counted in `unit` seconds."""

    def __init__(self, problem: Problem, at: int):
        problem, self.unit = in_mean_times(problem)
        self.problem, self.at = problem, at
        self.before = before = np.flatnonzero(problem.producer < at)
        self.guests = guests = np.flatnonzero(problem.home)  # they are the last buffers
        tiers = len(problem.tiers) > 0
        widths = [at, len(before), len(before) * tiers, 2 * tiers, len(guests), len(guests)]
        ends = np.cumsum([0, *widths]).tolist()
        self.columns = columns = Columns(*(slice(low, high) for low, high in pairwise(ends)), count=ends[-1])
        self.column = np.full(len(problem.size), -1, np.int64)
        self.column[before] = at + np.arange(len(before))
        lower, upper = np.zeros(columns.count), np.ones(columns.count)
        lower[self.column[problem.inputs(at)]] = 1.0
        upper[columns.again] = problem.repeatable[:at] > at
        if tiers:
            upper[columns.moved] = (problem.producer[before] < problem.boundary) & ~problem.output[before]
            upper[columns.stalls] = highspy.kHighsInf
            upper[columns.gone] = ~np.isin(guests, problem.read[problem.read_start[at] : problem.read_start[at + 1]])
        rows = closure(problem, at, used_from(problem, at), int(tiers))
        for away in range(columns.away.start, columns.away.stop):
            rows.append(([away, away + len(guests)], [1.0, -1.0], 0.0))
        cost = self.dense(again=problem.seconds[:at])
        if tiers:
            cost = self.add_copies(rows)
        self.capacity_row = len(rows)
        held = self.dense(keep=problem.size[before], gone=-problem.size[guests])
        rows.append((np.flatnonzero(held).tolist(), held[held != 0].tolist(), -highspy.kHighsInf))
        self.model = highs_model(of_rows(cost, lower, upper, rows))

    def dense(self, **parts: Any) -> np.ndarray:
        """A coefficient for every column: zero but for the kinds named."""
        found = np.zeros(self.columns.count)
        for kind, values in parts.items():
            found[getattr(self.columns, kind)] = values
        return found

    def add_copies(self, rows: list[Row]) -> np.ndarray:
        """The cost of each column where there are copies. Adds rows to those of the model.

        Neither part of the step is shorter than its copies out, or in, over all links together, nor is the whole step; and what
        lies elsewhere has room. Copies hold computing up, counted on the tier where that is least.
        """
        problem, tiers = self.problem, self.problem.tiers
        out, back = self.bytes_out(), self.bytes_in()
        held_up = (tiers[:, OUT_LOAD] / tiers[:, OUT]).min() * out + (tiers[:, IN_LOAD] / tiers[:, IN]).min() * back
        base = problem.seconds[: self.at].sum(), problem.seconds[self.at :].sum()
        stalls = self.dense(stalls=(1.0, 0.0)), self.dense(stalls=(0.0, 1.0))
        again = self.dense(again=problem.seconds[: self.at])
        more = held_up[0] + stalls[0], held_up[1] + stalls[1] + again  # seconds of each part beside its first runs
        whole = more[0] + more[1]
        found = [(stalls[0] + stalls[1] - held_up[2], 0.0)]  # a copy in either part holds one of them up
        for copied, rate in ((out, tiers[:, OUT].sum()), (back, tiers[:, IN].sum())):
            found += [(more[part] - copied[part] / rate, -base[part]) for part in range(2)]
            found.append((whole - copied.sum(axis=0) / rate, -sum(base)))
        elsewhere = self.dense(moved=problem.size[self.before], away=problem.size[self.guests])
        found.append((-elsewhere, -tiers[:, ROOM].sum()))
        rows += [(np.flatnonzero(row).tolist(), row[row != 0].tolist(), float(bound)) for row, bound in found]
        return whole

    def bytes_out(self) -> np.ndarray:
        """Bytes copied out by each column: before the cut, after it, and in one of the two; shape (3, columns)."""
        problem, size = self.problem, self.problem.size[self.guests]
        changer = np.full(len(problem.size), -1)
        changer[problem.changed] = np.repeat(np.arange(len(problem.seconds)), np.diff(problem.changed_start))
        changed = changer[self.guests]
        return np.array([
            self.dense(moved=problem.size[self.before]),
            self.dense(away=size * (changed >= self.at)),
            self.dense(away=size * ((changed >= 0) & (changed < self.at))),
        ])  # fmt: skip

    def bytes_in(self) -> np.ndarray:
        """Bytes copied in by each column, likewise."""
        problem, size = self.problem, self.problem.size[self.guests]
        uses = [problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]] for buffer in self.guests]
        early = np.array([bool((read < self.at).any()) for read in uses], bool)
        late = np.array([bool((read >= self.at).any()) for read in uses], bool)
        once = size * (late & ~early)  # after the cut if it is gone, else in either part
        return np.array([
            self.dense(away=size * early),
            self.dense(moved=problem.size[self.before], gone=size * late),
            self.dense(away=once, gone=-once),
        ])  # fmt: skip

    def room(self, budget: int) -> float:
        """Bytes that values may take while the cut op runs, if all that may be at home elsewhere is resident."""
        problem, at = self.problem, self.at
        made = problem.size[problem.write[problem.write_start[at] : problem.write_start[at + 1]]].sum()
        taken = problem.size[problem.reuse_new[problem.reuse_start[at] : problem.reuse_start[at + 1]]].max(initial=0)
        return float(budget - problem.resident - problem.size[self.guests].sum() - made - problem.workspace[at] + taken)

    def solve(self, budget: int) -> Cut:
        """The cheapest set within a budget."""
        self.model.changeRowBounds(self.capacity_row, -highspy.kHighsInf, self.room(budget))
        self.model.run()
        status = self.model.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Cut(self.at, float("inf"))
        if status != highspy.HighsModelStatus.kOptimal:
            return Cut(self.at, 0.0)
        return Cut(self.at, float(self.model.getInfo().objective_function_value) * self.unit)


def find_cuts(problem: Problem, segments: Segments) -> list[CutModel]:
    """Programs at the moments that press most: the worst of each segment opened early, and the worst overall.

    They press where everything is kept: with nothing at home elsewhere, and with all that can be.
    """
    ops, ranked = len(problem.seconds), []
    late = np.arange(problem.boundary + 1, ops)
    if not len(late):
        return []
    edges = [*np.unique(segments.opened).tolist(), ops]
    for away in (0.0, 1.0) if problem.home.any() else (0.0,):
        order, _, memory = profile(problem, problem.keep_all(away=away))
        memory = memory[order >= 0]  # without fetches: what is left is at its base time
        worst = [int(low + np.argmax(memory[low:high])) for low, high in pairwise(edges[:13]) if high > low]
        first = [int(at) for at in late[np.argsort(-memory[late], kind="stable")[:8]]]
        ranked += [first[0], *sorted(worst, key=lambda at: -memory[at]), *first, problem.boundary + 1]
    chosen = [at for at in dict.fromkeys(ranked) if problem.boundary < at < ops]
    return [CutModel(problem, at) for at in chosen[: max(3, CUT_OPS // ops)]]


def least_seconds(problem: Problem, cuts: Sequence[CutModel], budget: int) -> float:
    """Seconds that no solution within a budget is faster than, by some cuts; infinite if there is none."""
    return float(problem.seconds.sum()) + max((cut.solve(budget).seconds for cut in cuts), default=0.0)


def in_mean_times(problem: Problem) -> tuple[Problem, float]:
    """A problem in whose times 1 is the mean time of an op, for the tolerances of solvers are absolute; and that in seconds."""
    unit = float(problem.seconds.mean()) if len(problem.seconds) else 0.0
    if not unit > 0:
        return problem, 1.0
    tiers = problem.tiers.copy()
    tiers[:, [OUT, IN]] *= unit
    tiers[:, [OUT_DELAY, IN_DELAY]] /= unit
    return replace(problem, seconds=problem.seconds / unit, tiers=tiers), unit


def closure(problem: Problem, at: int, needed: np.ndarray, tiers: int) -> list[Row]:
    """The two rules of a cut: who is needed later is at hand, and so is what an op that runs again later reads.

    Columns are the ops before the cut, then the values made before it, resident, and the same values again for each tier. An op
    that may not run again later, though it might earlier, has no row.

    Args:
        problem: whose ops.
        at: base time of the cut op.
        needed: of each buffer whether it is used later.
        tiers: how many times over a value may be moved.
    """
    before = np.flatnonzero(problem.producer < at)
    column = np.full(len(problem.size), -1, np.int64)
    column[before] = at + np.arange(len(before))
    rows: list[Row] = []

    def there(buffer: int) -> list[int]:
        """The columns that have a value at hand: resident, run again, in each tier."""
        moved = [int(column[buffer]) + (1 + tier) * len(before) for tier in range(tiers)]
        return [int(column[buffer]), int(problem.producer[buffer]), *moved]

    for buffer in before.tolist():
        if needed[buffer]:
            rows.append((there(buffer), [1.0] * (2 + tiers), 1.0))
    for op in np.flatnonzero(problem.repeatable[:at] > at).tolist():
        for buffer in problem.inputs(op).tolist():
            rows.append(([*there(buffer), op], [1.0] * (2 + tiers) + [-1.0], 0.0))
    return rows


def used_from(problem: Problem, at: int) -> np.ndarray:
    """Which buffers are read at base time `at` or later, or are outputs."""
    last = np.array([problem.use[problem.use_start[b + 1] - 1] if problem.use_start[b + 1] > problem.use_start[b] else -1
                     for b in range(len(problem.size))])  # fmt: skip
    return (last >= at) | problem.output

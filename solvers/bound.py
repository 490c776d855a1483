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

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from .replay import IN, IN_LOAD, OUT, OUT_LOAD, ROOM
from .timeline import Problem


@dataclass(frozen=True)
class Cut:
    """The relaxation at one cut.

    Attributes:
        at: base time of the cut op.
        seconds: the least time spent in recomputation after the cut and in stalls; infinite where nothing fits.
        keep: for each buffer how much of it is resident, 0 to 1.
        again: for each op how much of it is run again, 0 to 1.
        price: seconds saved per byte more of budget (the dual of the capacity row).
    """

    at: int
    seconds: float
    keep: np.ndarray
    again: np.ndarray
    price: float


class CutModel:
    """The linear program of one cut, which can be solved for many budgets."""

    def __init__(self, problem: Problem, at: int):
        self.problem, self.at = problem, at
        ops, buffers = at, len(problem.size)
        before = np.flatnonzero(problem.producer < at)
        self.column = np.full(buffers, -1, np.int64)
        self.column[before] = ops + np.arange(len(before))
        self.before = before
        tiers = len(problem.tiers) > 0
        self.guests = np.flatnonzero(problem.home)  # they are the last buffers
        movable = ((problem.producer[before] < problem.boundary) & ~problem.output[before]).astype(float)
        reading = np.isin(self.guests, problem.read[problem.read_start[at] : problem.read_start[at + 1]])
        more = [movable, np.full(2, 1e9), np.ones(len(self.guests)), 1.0 - reading] if tiers else []
        upper = np.concatenate([(problem.repeatable[:ops] > 0).astype(float), np.ones(len(before)), *more])
        lower = np.zeros(len(upper))
        lower[self.column[problem.inputs(at)]] = 1.0
        rows: list[tuple[list[int], list[float], float]] = []
        later = used_from(problem, at)

        def there(buffer: int) -> list[int]:
            """The columns that have a value at hand: resident, run again, elsewhere."""
            column = int(self.column[buffer])
            return [column, int(problem.producer[buffer]), *([column + len(before)] if tiers else [])]

        for buffer in before.tolist():
            if later[buffer]:
                rows.append((there(buffer), [1.0] * len(there(buffer)), 1.0))
        for op in range(ops):
            if problem.repeatable[op]:
                for buffer in problem.inputs(op):
                    rows.append(([*there(buffer), op], [1.0] * len(there(buffer)) + [-1.0], 0.0))
        cost = np.concatenate([problem.seconds[:ops], np.zeros(len(upper) - ops)])
        gone = len(upper) - len(self.guests) + np.arange(len(self.guests))
        if tiers:
            rows += [([column - len(gone), column], [1.0, -1.0], 0.0) for column in gone.tolist()]
            rows += self.link_rows(cost)
        self.capacity_row = len(rows)
        self.model = highs_model(
            cost=cost,
            lower=lower,
            upper=upper,
            rows=rows,
            knapsack=(
                np.concatenate([ops + np.arange(len(before)), gone]),
                np.concatenate([problem.size[before], -problem.size[self.guests]]).astype(float),
            ),
        )

    def link_rows(self, cost: np.ndarray) -> list[tuple[list[int], list[float], float]]:
        """Neither part of the step is shorter than its copies out and in, nor is the whole; and what lies elsewhere has room.

        Args:
            cost: of each column; the computing that copies hold up is added, on the tier where that is least, and stalls.
        """
        problem, ops, tiers = self.problem, self.at, self.problem.tiers
        away = len(cost) - 2 * len(self.guests)
        stalls = [away - 2, away - 1]
        out, back = self.bytes_out(len(cost)), self.bytes_in(len(cost))
        least = (tiers[:, OUT_LOAD] / tiers[:, OUT]).min(), (tiers[:, IN_LOAD] / tiers[:, IN]).min()
        load = least[0] * out + least[1] * back  # rows: before the cut, after it, either
        again = np.zeros_like(cost)
        again[:ops] = problem.seconds[:ops]
        length = np.array([problem.seconds[:ops].sum(), problem.seconds[ops:].sum()])
        spent = load[:2].copy()  # what each part takes beside its first runs
        spent[1] += again
        spent[[0, 1], stalls] = 1.0
        cost[:] = spent.sum(axis=0)
        dense = [(cost - again - load[:2].sum(axis=0) - load[2], 0.0)]  # stalls have what a copy of either part holds up
        for copied, rate in ((out, tiers[:, OUT].sum()), (back, tiers[:, IN].sum())):
            dense += [(spent[part] - copied[part] / rate, -length[part]) for part in range(2)]
            dense.append((cost - copied.sum(axis=0) / rate, -length.sum()))
        held = np.zeros_like(cost)
        held[away - 2 - len(self.before) : away - 2] = problem.size[self.before]
        held[away : away + len(self.guests)] = problem.size[self.guests]
        dense.append((-held, -float(tiers[:, ROOM].sum())))
        return [(np.flatnonzero(row).tolist(), row[row != 0].tolist(), bound) for row, bound in dense]

    def bytes_out(self, columns: int) -> np.ndarray:
        """Bytes copied out by each column: before the cut, after it, and in either; shape (3, columns)."""
        problem, count = self.problem, len(self.guests)
        found = np.zeros((3, columns))
        away = columns - 2 * count
        found[0, away - 2 - len(self.before) : away - 2] = problem.size[self.before]
        ends = problem.changed_start[1:]
        for index, buffer in enumerate(problem.changed.tolist()):
            changer = int(np.searchsorted(ends, index, side="right"))
            found[1 if changer >= self.at else 2, away + buffer - self.guests[0]] = problem.size[buffer]
        return found

    def bytes_in(self, columns: int) -> np.ndarray:
        """Bytes copied in by each column, likewise."""
        problem, count = self.problem, len(self.guests)
        found = np.zeros((3, columns))
        away, gone = columns - 2 * count, columns - count
        found[1, away - 2 - len(self.before) : away - 2] = problem.size[self.before]
        late = used_from(problem, self.at)
        for number, buffer in enumerate(self.guests.tolist()):
            size, first = problem.size[buffer], problem.use[problem.use_start[buffer]]
            found[1, gone + number] = size * late[buffer]
            if first < self.at:
                found[0, away + number] = size
            else:  # once in all: after the cut if it is gone, and in either part if not
                found[2, away + number], found[2, gone + number] = size, -size
        return found

    def room(self, budget: int) -> float:
        """Bytes that resident values may take while the cut op runs."""
        problem, at = self.problem, self.at
        made = problem.size[problem.write[problem.write_start[at] : problem.write_start[at + 1]]].sum()
        pairs = slice(problem.reuse_start[at], problem.reuse_start[at + 1])
        taken = problem.size[problem.reuse_new[pairs]].max(initial=0)
        return float(budget - problem.resident - problem.size[self.guests].sum() - made - problem.workspace[at] + taken)

    def solve(self, budget: int) -> Cut:
        """The cheapest set within a budget."""
        ops = self.at
        self.model.changeRowBounds(self.capacity_row, -highspy.kHighsInf, self.room(budget))
        self.model.run()
        again, keep = np.zeros(len(self.problem.seconds)), np.zeros(len(self.problem.size))
        if self.model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return Cut(self.at, float("inf"), keep, again, float("inf"))
        solution = self.model.getSolution()
        values = np.array(solution.col_value)
        again[:ops] = values[:ops]
        keep[self.before] = values[ops : ops + len(self.before)]
        price = abs(solution.row_dual[self.capacity_row])
        return Cut(self.at, float(self.model.getInfo().objective_function_value), keep, again, price)


def highs_model(
    cost: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    rows: list[tuple[list[int], list[float], float]],
    knapsack: tuple[np.ndarray, np.ndarray],
) -> highspy.Highs:
    """A model with rows `coefficients @ columns >= bound` and one capacity row at the end."""
    counts = [len(columns) for columns, _, _ in rows]
    lp: Any = highspy.HighsLp()  # its stubs promise lists, it takes arrays
    lp.num_col_, lp.num_row_ = len(cost), len(rows) + 1
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, lower, upper
    lp.row_lower_ = np.array([bound for _, _, bound in rows] + [-highspy.kHighsInf])
    lp.row_upper_ = np.full(len(rows) + 1, highspy.kHighsInf)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum([*counts, len(knapsack[0])])]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([*(np.array(columns) for columns, _, _ in rows), knapsack[0]]).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate([*(np.array(values) for _, values, _ in rows), knapsack[1]])
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("threads", 1)
    model.passModel(lp)
    return model


def used_from(problem: Problem, at: int) -> np.ndarray:
    """Which buffers are read at base time `at` or later, or are outputs."""
    last = np.array([problem.use[problem.use_start[b + 1] - 1] if problem.use_start[b + 1] > problem.use_start[b] else -1
                     for b in range(len(problem.size))])  # fmt: skip
    return (last >= at) | problem.output

"""A lower bound on the time of any schedule that runs a program's ops first in base order, within a budget.

Take the moment at which one op, the *cut*, first runs. What is resident then, and what must still be run again after
it, are tied by two rules: a value that is used later is resident or made again, and an op that is run again finds each
input resident or made again. With the bytes that the cut op itself needs set aside, the cheapest such set is a linear
program (a minimum cut with one knapsack row); its value is a bound for every schedule, because nothing is assumed of
what happens before or after. The largest over several cuts is returned.

Where there are tiers behind the device a third choice is that the value lies there. Then it has been copied out before the
cut and is copied in after it (a copy under way takes its bytes on the device at either end, so counts as resident): neither
part of the step is shorter than its copies take over all links together.
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
        moved = ops + len(before)  # the first column of what lies in another tier; two for stalls follow
        movable = ((problem.producer[before] < problem.boundary) & ~problem.output[before]).astype(float)
        more = [movable, np.full(2, 1e9)] if tiers else []
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
        if tiers:
            rows += self.link_rows(ops, moved, len(before))
        self.capacity_row = len(rows)
        self.model = highs_model(
            cost=np.concatenate([problem.seconds[:ops], np.zeros(len(before)), *self.move_costs()]),
            lower=lower,
            upper=upper,
            rows=rows,
            knapsack=(ops + np.arange(len(before)), problem.size[before].astype(float)),
        )

    def move_costs(self) -> list[np.ndarray]:
        """Costs of what lies elsewhere: the computing that copies hold up, on the tier where that is least; and of stalls."""
        tiers = self.problem.tiers
        if not len(tiers):
            return []
        load = (tiers[:, OUT_LOAD] / tiers[:, OUT]).min() + (tiers[:, IN_LOAD] / tiers[:, IN]).min()
        return [self.problem.size[self.before] * load, np.ones(2)]

    def link_rows(self, ops: int, moved: int, count: int) -> list[tuple[list[int], list[float], float]]:
        """Copies out take no longer than what runs before the cut and the stalls there; copies in, after it."""
        problem = self.problem
        size = problem.size[self.before].astype(float)
        tiers = problem.tiers
        leaving = size * (1 / tiers[:, OUT].sum() - (tiers[:, OUT_LOAD] / tiers[:, OUT]).min())
        coming = size * (1 / tiers[:, IN].sum() - (tiers[:, IN_LOAD] / tiers[:, IN]).min())
        columns = list(range(moved, moved + count))
        before, after = float(problem.seconds[:ops].sum()), float(problem.seconds[ops:].sum())
        return [
            ([*columns, moved + count], [*-leaving, 1.0], -before),
            ([*columns, moved + count + 1, *range(ops)], [*-coming, 1.0, *problem.seconds[:ops]], -after),
            (columns, [*-size], -float(tiers[:, ROOM].sum())),
        ]

    def room(self, budget: int) -> float:
        """Bytes that resident values may take while the cut op runs."""
        problem, at = self.problem, self.at
        made = problem.size[problem.write[problem.write_start[at] : problem.write_start[at + 1]]].sum()
        pairs = slice(problem.reuse_start[at], problem.reuse_start[at + 1])
        taken = problem.size[problem.reuse_new[pairs]].max(initial=0)
        read = problem.read[problem.read_start[at] : problem.read_start[at + 1]]
        fetched = problem.size[read[problem.home[read] > 0]].sum()
        return float(budget - problem.resident - made - problem.workspace[at] + taken - fetched)

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

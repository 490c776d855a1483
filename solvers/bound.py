"""A lower bound on the time of any schedule that runs a program's ops first in base order, within a budget.

Take the moment at which one op, the *cut*, first runs. What is resident then, and what must still be run again after
it, are tied by two rules: a value that is used later is resident or made again, and an op that is run again finds each
input resident or made again. With the bytes that the cut op itself needs set aside, the cheapest such set is a linear
program (a minimum cut with one knapsack row); its value is a bound for every schedule, because nothing is assumed of
what happens before or after. The largest over several cuts is returned.
"""

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from .timeline import Problem


@dataclass(frozen=True)
class Cut:
    """The relaxation at one cut.

    Attributes:
        at: base time of the cut op.
        seconds: the least time spent in recomputation after the cut; infinite where nothing fits.
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
        upper = np.concatenate([problem.repeatable[:ops].astype(float), np.ones(len(before))])
        lower = np.zeros(ops + len(before))
        here = problem.read[problem.read_start[at] : problem.read_start[at + 1]]
        lower[self.column[here]] = 1.0
        rows: list[tuple[list[int], list[float], float]] = []
        later = used_from(problem, at)
        for buffer in before:
            if later[buffer]:
                rows.append(([self.column[buffer], int(problem.producer[buffer])], [1.0, 1.0], 1.0))
        for op in range(ops):
            if problem.repeatable[op]:
                for buffer in problem.read[problem.read_start[op] : problem.read_start[op + 1]]:
                    columns = [int(self.column[buffer]), int(problem.producer[buffer]), op]
                    rows.append((columns, [1.0, 1.0, -1.0], 0.0))
        self.capacity_row = len(rows)
        self.model = highs_model(
            cost=np.concatenate([problem.seconds[:ops], np.zeros(len(before))]),
            lower=lower,
            upper=upper,
            rows=rows,
            knapsack=(ops + np.arange(len(before)), problem.size[before].astype(float)),
        )

    def room(self, budget: int) -> float:
        """Bytes that resident values may take while the cut op runs."""
        problem, at = self.problem, self.at
        made = problem.size[problem.write[problem.write_start[at] : problem.write_start[at + 1]]].sum()
        pairs = slice(problem.reuse_start[at], problem.reuse_start[at + 1])
        taken = problem.size[problem.reuse_new[pairs]].max(initial=0)
        return float(budget - problem.resident - made - problem.workspace[at] + taken)

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
        keep[self.before] = values[ops:]
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

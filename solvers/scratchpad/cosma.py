"""COSMA's integer program as published, addresses and all, repaired where it needs it: the oracle for small graphs.

Steps are as many as ops. For each tensor and step it is created (C), preserved (P), spilled (S), retrieved (R), or not in
the scratchpad; L is its address. The equations, in the order of arXiv 2311.18246:

    1   C + P + S + R <= 1                          7   each tensor is created once
    2   P(t) <= C(t-1) + P(t-1) + R(t-1)            8   each tensor is spilled at most once
    3   S(t) <= C(t-1) + P(t-1)                     9   L + size <= capacity
    4   R(t) <= sum of earlier S                    10  tensors in the scratchpad do not overlap
    5   C(out, t) <= P(in, t) + R(in, t)            11  L stays while preserved
    6   outputs of one op are created together      12  minimise the bytes of S and R

Repairs: one op a step; nothing is preserved, spilled or retrieved at the first; what lies in the large memory from the
start is retrieved without having been spilled, and may be created in the step that reads it; an output's store is
compulsory; and the residents of each step fit by their sum, without which the relaxation is worth nothing. Rows are whole
numbers, handed to HiGHS or another solver by name, with its tolerances set far below a byte, or to CP-SAT.
"""

from dataclasses import dataclass, field

import numpy as np

from ..programs import linear
from ..programs.cpsat import make_solver
from ..programs.names import HIGHS
from .residency import Residency

TOLERANCE = 1e-9  # of integrality and feasibility: at 1e-5, times a scratchpad's bytes, tensors overlap


@dataclass
class Rows:
    """An integer program: minimise `cost`, subject to rows `sum(factor * variable) <= most`.

    Attributes:
        upper: the largest value of each variable; the smallest is 0.
        rows: (pairs of factor and variable, most).
        cost: factor of each variable that has one.
    """

    upper: list[int] = field(default_factory=list)
    rows: list[tuple[list[tuple[int, int]], int]] = field(default_factory=list)
    cost: dict[int, int] = field(default_factory=dict)

    def variable(self, upper: int = 1) -> int:
        """A new variable."""
        self.upper.append(upper)
        return len(self.upper) - 1

    def at_most(self, terms: list[tuple[int, int]], most: int) -> None:
        """A row."""
        self.rows.append((terms, most))

    def exactly(self, terms: list[tuple[int, int]], value: int) -> None:
        """Two rows."""
        self.at_most(terms, value)
        self.at_most([(-factor, variable) for factor, variable in terms], -value)


def formulate(problem: Residency) -> Rows:
    """The program of a problem."""
    steps, tensors = range(len(problem.reads)), [b for b in range(len(problem.size)) if used(problem, b)]
    rows = Rows()
    c, p, s, r = ({(a, t): rows.variable() for a in tensors for t in steps} for _ in range(4))
    place = {(a, t): rows.variable(problem.capacity - problem.size[a]) for a in tensors for t in steps}
    for a in tensors:
        given = problem.producer[a] < 0
        rows.exactly([(1, c[a, t]) for t in steps], 1)  # 7
        rows.at_most([(1, s[a, t]) for t in steps], 0 if given else 1)  # 8
        for t in steps:
            rows.at_most([(1, kind[a, t]) for kind in (c, p, s, r)], 1)  # 1
            before = [(-1, kind[a, t - 1]) for kind in (c, p, r)] if t else []
            rows.at_most([(1, p[a, t]), *before], 0)  # 2
            rows.at_most([(1, s[a, t]), *([(-1, c[a, t - 1]), (-1, p[a, t - 1])] if t else [])], 0)  # 3
            if given:
                rows.at_most([(1, r[a, t]), *((-1, c[a, k]) for k in range(t))], 0)
            else:
                rows.at_most([(1, r[a, t]), *((-1, s[a, k]) for k in range(t))], 0)  # 4
            rows.cost[r[a, t]] = problem.size[a]
            if problem.fresh[a]:
                rows.cost[s[a, t]] = problem.size[a]
            if t:  # 11
                most = problem.capacity
                for sign in (1, -1):
                    rows.at_most([(sign, place[a, t]), (-sign, place[a, t - 1]), (most, p[a, t])], most)
    for op, (reads, writes) in enumerate(zip(problem.reads, problem.writes, strict=True)):
        for t in steps:
            for out in writes:
                for inner in reads:  # 5
                    there = [(-1, p[inner, t]), (-1, r[inner, t])]
                    there += [(-1, c[inner, t])] if problem.producer[inner] < 0 else []
                    rows.at_most([(1, c[out, t]), *there], 0)
                if out != writes[0]:  # 6
                    rows.exactly([(1, c[out, t]), (-1, c[writes[0], t])], 0)
        assert writes, op
    for t in steps:
        rows.at_most([(1, c[writes[0], t]) for writes in problem.writes], 1)  # one op a step
        resident = [(problem.size[a], kind[a, t]) for a in tensors for kind in (c, p, r)]
        rows.at_most(resident, problem.capacity)
        for number, a in enumerate(tensors):  # 10
            for b in tensors[:number]:
                under, over = rows.variable(), rows.variable()
                most = problem.capacity
                rows.at_most([(1, place[b, t]), (-1, place[a, t]), (most, under)], most - problem.size[b])
                rows.at_most([(1, place[a, t]), (-1, place[b, t]), (most, over)], most - problem.size[a])
                both = [(1, kind[x, t]) for x in (a, b) for kind in (c, p, r)]
                rows.at_most([*both, (-1, under), (-1, over)], 1)
                rows.at_most([(1, under), (1, over)], 1)
    return rows


def used(problem: Residency, buffer: int) -> bool:
    """Whether some op touches a buffer."""
    return problem.producer[buffer] >= 0 or bool(problem.readers[buffer])


def solve_linear(problem: Residency, seconds: float = 60.0, solver: str = HIGHS) -> int | None:
    """The fewest bytes, by a solver of linear programs; None where nothing fits, or nothing was proven in time."""
    rows = formulate(problem)
    cost = np.zeros(len(rows.upper))
    cost[list(rows.cost)] = list(rows.cost.values())
    found = linear.solve(
        linear.of_rows(
            cost,
            np.zeros(len(cost)),
            np.array(rows.upper, float),
            [([at for _, at in terms], [-float(factor) for factor, _ in terms], -float(most)) for terms, most in rows.rows],
            np.ones(len(cost), bool),
        ),
        solver, seconds, tolerance=TOLERANCE,
    )  # fmt: skip
    return round(float(cost @ found.values)) if found.status is linear.Verdict.OPTIMAL else None


def solve_sat(problem: Residency, seconds: float = 60.0) -> int | None:
    """The same by CP-SAT, which calculates in whole numbers."""
    from ortools.sat.python import cp_model

    rows = formulate(problem)
    model = cp_model.CpModel()
    variables = [model.new_int_var(0, upper, f"x{index}") for index, upper in enumerate(rows.upper)]
    for terms, most in rows.rows:
        model.add(sum(factor * variables[index] for factor, index in terms) <= most)
    model.minimize(sum(factor * variables[index] for index, factor in rows.cost.items()))
    solver = make_solver(seconds, 0)
    return round(solver.objective_value) if solver.solve(model) == cp_model.OPTIMAL else None

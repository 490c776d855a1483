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
from .problem import Answer, Limit, Mapped, Residency, Status, cost_of, find_gaps

TOLERANCE = 1e-9  # of integrality and feasibility: at 1e-5, times a scratchpad's bytes, tensors overlap


@dataclass
class Rows:
    """An integer program: minimise `cost`, subject to rows `sum(factor * variable) <= most`.

    Attributes:
        upper: the largest value of each variable; the smallest is 0.
        rows: (pairs of factor and variable, most).
        cost: factor of each variable that has one.
        created: the variable C of each (tensor, step).
        retrieved: and R.
    """

    upper: list[int] = field(default_factory=list)
    rows: list[tuple[list[tuple[int, int]], int]] = field(default_factory=list)
    cost: dict[int, int] = field(default_factory=dict)
    created: dict[tuple[int, int], int] = field(default_factory=dict)
    retrieved: dict[tuple[int, int], int] = field(default_factory=dict)

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
    rows.created, rows.retrieved = c, r
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


def solve(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """The mapping that the program finds: by CP-SAT, which calculates in whole numbers, or a linear solver that is named.

    Its bound is of mappings that have addresses, which may have to move more bytes than those that only fit by their sum.
    """
    rows = formulate(problem)
    found = by_sat(rows, limit) if limit.solver is None else by_linear(rows, limit.solver, limit)
    if found.best is None:
        return Answer(found.status, found.bound, None, "cosma")
    return Answer(found.status, found.bound, read_off(problem, rows, found.best), "cosma")


def by_linear(rows: Rows, solver: str, limit: Limit) -> Answer[np.ndarray, int]:
    """The variables' values by a solver of linear programs, and bytes that none are below."""
    cost = np.zeros(len(rows.upper))
    cost[list(rows.cost)] = list(rows.cost.values())
    program = linear.of_rows(
        cost,
        np.zeros(len(cost)),
        np.array(rows.upper, float),
        [([at for _, at in terms], [-float(factor) for factor, _ in terms], -float(most)) for terms, most in rows.rows],
        np.ones(len(cost), bool),
    )
    found = linear.solve(program, solver, limit.seconds, limit.seed, tolerance=TOLERANCE)
    bound = int(np.ceil(max(found.bound, 0.0) * (1 - TOLERANCE) - 1e-6)) if np.isfinite(found.bound) else 0
    return Answer(found.status, bound, np.round(found.values).astype(np.int64) if len(found.values) else None)


def by_sat(rows: Rows, limit: Limit) -> Answer[np.ndarray, int]:
    """The same by CP-SAT."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = [model.new_int_var(0, upper, f"x{index}") for index, upper in enumerate(rows.upper)]
    for terms, most in rows.rows:
        model.add(sum(factor * variables[index] for factor, index in terms) <= most)
    model.minimize(sum(factor * variables[index] for index, factor in rows.cost.items()))
    solver = make_solver(limit.seconds, limit.seed)
    said = solver.solve(model)
    known = {cp_model.OPTIMAL: Status.OPTIMAL, cp_model.FEASIBLE: Status.FEASIBLE, cp_model.INFEASIBLE: Status.INFEASIBLE}
    status = known.get(said, Status.UNKNOWN)
    if status not in (Status.OPTIMAL, Status.FEASIBLE):
        return Answer(status, 0)
    bound = int(np.ceil(solver.best_objective_bound - 1e-6))
    return Answer(status, bound, np.array([solver.value(each) for each in variables], np.int64))


def read_off(problem: Residency, rows: Rows, values: np.ndarray) -> Mapped:
    """The mapping that values say: ops run where their results are created, and what is retrieved was dropped before."""
    steps = range(len(problem.reads))
    when = [next(t for t in steps if values[rows.created[writes[0], t]]) for writes in problem.writes]
    order = tuple(sorted(steps, key=when.__getitem__))
    gaps = find_gaps(problem, order)
    dropped = frozenset(
        (buffer, until)
        for buffer, after, until in zip(gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist(), strict=True)
        if any(values[rows.retrieved[buffer, t]] for t in range(after + 1, until + 1))
    )
    return Mapped(order, dropped, cost_of(problem, dropped))

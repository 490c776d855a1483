"""Order and residency chosen together: COSMA's program without addresses, for parts small enough for exact search.

Steps are numbered; an op runs at one of the steps that its ancestors and descendants leave it. A value may be resident
during a step only if it was during the step before, is loaded for it, or is made in it. That is COSMA's program (arXiv
2311.18246, equations 1 to 12) with one op a step, nothing resident at first, and in place of addresses a row that makes
residents fit by their sum. When a value is stored does not matter, so one choice says whether it ever is.
"""

import numpy as np
from ortools.sat.python import cp_model

from .residency import Mapped, Residency, find_gaps, make_solver, solve_ordered
from .waists import ancestors


def solve_free(problem: Residency, start: Mapped, seconds: float = 10.0, seed: int = 0) -> Mapped:
    """The best found over all orders, with a bound over all orders.

    Args:
        problem: a part.
        start: the best of one order, to improve on; its bound is that order's.
        seconds: to search for, at most.
        seed: of the search.
    """
    windows = find_windows(problem)
    if not start.bytes or all(low == high for low, high in windows):
        return start
    model = Model(problem, windows)
    model.suggest(start)
    solver = make_solver(seconds, seed)
    status = solver.solve(model.model)
    best = start
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        order = sorted(range(len(windows)), key=lambda op: solver.value(model.step_of(op)))
        found = solve_ordered(problem, order, seconds, seed)
        best = found if found is not None and found.bytes < start.bytes else start
    bound = int(np.ceil(solver.best_objective_bound - 1e-6)) if status != cp_model.UNKNOWN else 0
    return Mapped(best.order, best.dropped, best.bytes, min(max(bound, 0), best.bytes))


def find_windows(problem: Residency) -> list[tuple[int, int]]:
    """For each op the first and the last step that it may run at."""
    count = len(problem.reads)
    past = ancestors(problem.before)
    later = [0] * count
    for op in range(count):
        for other in range(op):
            if past[op] >> other & 1:
                later[other] += 1
    return [(past[op].bit_count(), count - 1 - later[op]) for op in range(count)]


class Model:
    """The program's variables, by op or buffer and step."""

    def __init__(self, problem: Residency, windows: list[tuple[int, int]]):
        self.problem, self.windows = problem, windows
        self.model = cp_model.CpModel()
        add = self.model.new_bool_var
        self.at = {(op, t): add(f"run {op} {t}") for op, (low, high) in enumerate(windows) for t in range(low, high + 1)}
        self.resident: dict[tuple[int, int], cp_model.IntVar] = {}
        self.load: dict[tuple[int, int], cp_model.IntVar] = {}
        self.stored: dict[int, cp_model.IntVar] = {}
        for buffer, (op, uses) in enumerate(zip(problem.producer, problem.readers, strict=True)):
            if op < 0 and not uses:
                continue
            low = windows[op][0] if op >= 0 else min(windows[use][0] for use in uses)
            high = max(windows[use][1] for use in (*uses, op) if use >= 0)
            for t in range(low, high + 1):
                self.resident[buffer, t] = add(f"resident {buffer} {t}")
                if t > low + 1 or op < 0:
                    self.load[buffer, t] = add(f"load {buffer} {t}")
            if problem.fresh[buffer] and uses:
                self.stored[buffer] = add(f"stored {buffer}")
        self.add_orders()
        self.add_residency()
        size = problem.size
        moved = sum(size[buffer] * load for (buffer, _), load in self.load.items())
        moved += sum(size[buffer] * stored for buffer, stored in self.stored.items())
        first = sum(size[b] for b, op in enumerate(problem.producer) if op < 0 and problem.readers[b])
        self.model.minimize(moved - first)

    def step_of(self, op: int):
        """The step that an op runs at."""
        low, high = self.windows[op]
        return sum(t * self.at[op, t] for t in range(low, high + 1))

    def add_orders(self) -> None:
        """Each op once, one a step, after what it reads."""
        steps: list[list[cp_model.IntVar]] = [[] for _ in self.windows]
        for op, (low, high) in enumerate(self.windows):
            self.model.add_exactly_one(self.at[op, t] for t in range(low, high + 1))
            for t in range(low, high + 1):
                steps[t].append(self.at[op, t])
        for row in steps:
            self.model.add_exactly_one(row)
        for op, others in enumerate(self.problem.before):
            for other in others:
                for t in range(self.windows[op][0], min(self.windows[op][1], self.windows[other][1]) + 1):
                    earlier = [self.at[other, k] for k in range(self.windows[other][0], t)]
                    self.model.add(sum(earlier) >= sum(self.at[op, k] for k in range(self.windows[op][0], t + 1)))

    def add_residency(self) -> None:
        """What is resident was before, is loaded or made; residents fit."""
        problem, size = self.problem, self.problem.size
        rows: list[list[tuple[int, cp_model.IntVar]]] = [[] for _ in self.windows]
        for (buffer, t), there in self.resident.items():
            op = problem.producer[buffer]
            made = self.at.get((op, t))
            ways = [self.resident.get((buffer, t - 1)), self.load.get((buffer, t)), made]
            self.model.add_bool_or([there.negated(), *(way for way in ways if way is not None)])
            rows[t].append((size[buffer], there))
        for (buffer, t), load in self.load.items():
            op = problem.producer[buffer]
            if buffer in self.stored:
                self.model.add_implication(load, self.stored[buffer])
            if op >= 0:
                low, high = self.windows[op]
                if t <= high:
                    self.model.add(sum(self.at[op, k] for k in range(low, t)) >= load)
        for (op, t), runs in self.at.items():
            for buffer in {*problem.reads[op], *problem.writes[op]}:
                self.model.add_implication(runs, self.resident[buffer, t])
        for row in rows:
            if sum(bytes_of for bytes_of, _ in row) > problem.capacity:
                self.model.add(sum(bytes_of * there for bytes_of, there in row) <= problem.capacity)

    def suggest(self, start: Mapped) -> None:
        """Begin with a mapping."""
        step = {op: t for t, op in enumerate(start.order)}
        gaps = find_gaps(self.problem, start.order)
        there: set[tuple[int, int]] = set()
        for buffer, op in enumerate(self.problem.producer):
            there |= {(buffer, step[use]) for use in (*self.problem.readers[buffer], op) if use >= 0}
        for buffer, low, high in zip(gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist(), strict=True):
            if (buffer, high) not in start.dropped:
                there |= {(buffer, t) for t in range(low, high + 1)}
        first = {b: min(step[use] for use in uses) for b, uses in enumerate(self.problem.readers) if uses}
        for (op, t), runs in self.at.items():
            self.model.add_hint(runs, int(step[op] == t))
        for key, resident in self.resident.items():
            self.model.add_hint(resident, int(key in there))
        for (buffer, t), load in self.load.items():
            compulsory = self.problem.producer[buffer] < 0 and first[buffer] == t
            self.model.add_hint(load, int((buffer, t) in start.dropped or compulsory))
        stored = {buffer for buffer, _ in start.dropped}
        for buffer, variable in self.stored.items():
            self.model.add_hint(variable, int(buffer in stored))

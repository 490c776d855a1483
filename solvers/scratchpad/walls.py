"""Order and residency together, with the capacity kept at a few ops only, the walls, and then at more of them.

Walls run at numbered places; any other op runs somewhere between two places, and a value used there is there from the wall
before, is made there, or is loaded, once. That is COSMA's program (arXiv 2311.18246, equations 1 to 12) without its
addresses, its steps joined between walls. It asks for less than the whole, so its least cost is a bound over all orders.
A narrow search makes an order of the partial order that it leaves; where that costs no more than the bound, it is the best
of all. Where it costs more, the op around which most is live becomes a wall too. When all ops are walls nothing is left out.
"""

import math
import time
from dataclasses import replace

from ortools.sat.python import cp_model

from ..programs.cpsat import make_solver
from . import ordered
from .orders import beam
from .problem import Answer, Limit, Mapped, Residency, find_gaps, verdict
from .waists import ancestors

FIRST = 9  # walls to begin with, those that need most
WIDTH = 20  # of the search for an order


def solve(problem: Residency, limit: Limit, start: Answer[Mapped, int] | None = None) -> Answer[Mapped, int]:
    """The best found over all orders, with a bound over all orders.

    Args:
        problem: what is mapped.
        limit: its solver is of the residency of an order; see `solve_ordered`.
        start: a mapping to improve on; default: the best of the base order.
    """
    until = time.monotonic() + limit.seconds
    start = start or ordered.solve(problem, limit)
    if start.best is None:
        return start
    best, bound = start.best, start.bound
    walls = sorted(range(len(problem.reads)), key=lambda op: -problem.need[op])[:FIRST]
    while bound < best.bytes and (left := until - time.monotonic()) > 0:
        model = WallModel(problem, walls, bound, best.bytes)
        search = make_solver(left, limit.seed)
        status = search.solve(model.model)
        if status == cp_model.INFEASIBLE:  # nothing costs less than the best
            bound = best.bytes
            break
        if status != cp_model.UNKNOWN:
            bound = max(bound, math.ceil(search.best_objective_bound - 1e-6))
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            break
        order = arrange(problem, walls, model.times(search), until)
        left = max(until - time.monotonic(), 1.0)
        found = ordered.solve_ordered(problem, order, replace(limit, seconds=left)).found
        best = found if found.bytes < best.bytes else best
        more = fullest(problem, order, walls)
        if more is None:
            break
        walls.append(more)
    return verdict(best, min(bound, best.bytes), "walls")


def fullest(problem: Residency, order: list[int], walls: list[int]) -> int | None:
    """The op that is no wall around which most is live above the capacity, or else the one that needs most."""
    gaps = find_gaps(problem, order)
    live = {op: sum(problem.size[b] for b in gaps.buffer[crossed].tolist()) - int(room)
            for op, crossed, room in zip(order, gaps.crossed, gaps.room, strict=True)}  # fmt: skip
    return max((op for op in order if op not in walls), key=lambda op: (max(live[op], 0), problem.need[op]), default=None)


def arrange(problem: Residency, walls: list[int], times: list[int], until: float = math.inf) -> list[int]:
    """An order in which ops run at the times given, by a narrow search, until a time, over what that leaves open."""
    base = sorted(range(len(times)), key=lambda op: (times[op], op))
    new = {op: number for number, op in enumerate(base)}
    at = {times[wall]: new[wall] for wall in walls}
    edges = {(at[times[op] + step], new[op])[::-step] for op in base for step in (-1, 1) if times[op] + step in at}
    edges |= {(at[time], at[time + 2]) for time in at if time + 2 in at}
    bound = replace(
        problem,
        reads=tuple(problem.reads[op] for op in base),
        writes=tuple(problem.writes[op] for op in base),
        edges=tuple(sorted(edges)),
    )
    return [base[op] for op in beam(bound, WIDTH, until)]


class WallModel:
    """The program for some walls.

    Time 2 i - 1 is the i-th wall's, counted from 1, and 2 i lies between it and the next; 0 is before the first.

    Attributes:
        at_least: for each op and time whether it runs then or later.
        there: for each buffer and place of a wall whether it is resident while that wall runs.
        loads: for each buffer and interval, numbered by the wall before it, whether it is loaded there or for the wall after.
    """

    def __init__(self, problem: Residency, walls: list[int], least: int, below: int):
        self.problem, self.walls, self.count = problem, set(walls), len(walls)
        self.model = cp_model.CpModel()
        self.yes, self.no = self.model.new_constant(1), self.model.new_constant(0)
        self.at_least: dict[tuple[int, int], cp_model.IntVar] = {}
        self.there: dict[tuple[int, int], cp_model.IntVar] = {}
        self.loads: dict[tuple[int, int], cp_model.IntVar] = {}
        self.add_order()
        moved: list[cp_model.LinearExprT] = []
        past, every = ancestors(problem.before), sum(1 << wall for wall in walls)
        for buffer, op in enumerate(problem.producer):
            used = problem.readers[buffer] or op in self.walls
            if used and not (op >= 0 and past[op] & every == every):  # what is made behind all walls is in nobody's way
                moved.append(self.add_buffer(buffer))
        for place in range(1, self.count + 1):
            row = [(problem.size[buffer], there) for (buffer, at), there in self.there.items() if at == place]
            self.model.add(sum(size * there for size, there in row) <= problem.capacity)
        self.model.add(sum(moved) >= least)
        self.model.add(sum(moved) < below)
        self.model.minimize(sum(moved))

    def add_order(self) -> None:
        """Ops run after what they read; each wall has a place of its own."""
        problem, at_least = self.problem, self.at_least
        for op in range(len(problem.reads)):
            at_least[op, 0] = self.yes
            for place in range(1, self.count + 1):
                later = at_least[op, 2 * place] = self.model.new_bool_var(f"behind {place}: {op}")
                wall = op in self.walls
                at_least[op, 2 * place - 1] = self.model.new_bool_var(f"not before {place}: {op}") if wall else later
            at_least[op, 2 * self.count + 1] = self.no
            for moment in range(2, 2 * self.count + 1):
                self.model.add_implication(at_least[op, moment], at_least[op, moment - 1])
            for other in problem.before[op]:
                for moment in range(1, 2 * self.count + 1):
                    behind = moment + (other in self.walls and moment % 2)  # at a wall's own moment nothing else runs
                    self.model.add_implication(at_least[other, moment], at_least[op, behind])
        self.runs = {(wall, place): self.model.new_bool_var(f"at {place}: {wall}")
                     for wall in sorted(self.walls) for place in range(1, self.count + 1)}  # fmt: skip
        for (wall, place), runs in self.runs.items():
            self.model.add(runs == at_least[wall, 2 * place - 1] - at_least[wall, 2 * place])
        for wall in self.walls:
            self.model.add_exactly_one(self.runs[wall, place] for place in range(1, self.count + 1))
        for place in range(1, self.count + 1):
            self.model.add_exactly_one(self.runs[wall, place] for wall in self.walls)

    def add_buffer(self, buffer: int) -> cp_model.LinearExprT:
        """Where one buffer is, and the bytes moved for it."""
        problem, model, last = self.problem, self.model, self.count
        op, readers, size = problem.producer[buffer], problem.readers[buffer], problem.size[buffer]
        self.there[buffer, 0] = self.no
        for place in range(last + 1):
            self.loads[buffer, place] = model.new_bool_var(f"load {buffer} behind {place}")
            if place:
                there = self.there[buffer, place] = model.new_bool_var(f"{buffer} at {place}")
                if op >= 0:
                    model.add_implication(there, self.at_least[op, 2 * place].negated())
        for place in range(last + 1):
            ways = [self.there[buffer, place], self.loads[buffer, place]]
            if op >= 0 and op not in self.walls:
                made = model.new_bool_var(f"make {buffer} behind {place}")
                model.add_implication(made, self.at_least[op, 2 * place])
                model.add_implication(made, self.at_least[op, 2 * place + 1].negated())
                ways.append(made)
            for reader in set(readers) - self.walls:
                before, behind = self.at_least[reader, 2 * place], self.at_least[reader, 2 * place + 1]
                model.add_bool_or([before.negated(), behind, *ways])
            if place < last:
                now = [self.runs[op, place + 1]] if op in self.walls else []
                model.add_bool_or([self.there[buffer, place + 1].negated(), *ways, *now])
        for wall in self.walls & {*readers, op}:
            for place in range(1, last + 1):
                model.add_implication(self.runs[wall, place], self.there[buffer, place])
        moved = size * sum(self.loads[buffer, place] for place in range(last + 1)) - (size if op < 0 else 0)
        if problem.fresh[buffer]:
            stored = model.new_bool_var(f"store {buffer}")
            for place in range(last + 1):
                model.add_implication(self.loads[buffer, place], stored)
            moved += size * stored
        return moved

    def times(self, solver: cp_model.CpSolver) -> list[int]:
        """When each op runs."""
        moments = range(1, 2 * self.count + 1)
        return [sum(solver.boolean_value(self.at_least[op, moment]) for moment in moments)
                for op in range(len(self.problem.reads))]  # fmt: skip

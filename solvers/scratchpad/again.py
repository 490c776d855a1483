"""Values made again in place of loads: the fewest bytes for an order that is given, when ops may run more than once.

A value that leaves the scratchpad may come back by running the op that made it once more, right before the step that reads
it or earlier, while an operand is there anyway. What that op reads has to be there then, so its operands have *points*
besides their uses, at which they are wanted only if the op is repeated, and at which they may themselves be made again, to a
depth. Between two points a value stays or does not, as between two uses in `ordered.py`. COSMA (arXiv 2311.18246) loads
only.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ortools.sat.python import cp_model

from ..programs.cpsat import make_solver
from .problem import Answer, Limit, Mapped, Residency, find_gaps, verdict

SHORT = 8  # steps of a gap in which a value may be made again before any; in longer ones, beside uses of its operands
DEPTH = 3  # operands of what is made again may be made again themselves, so many times over


class Stretch(NamedTuple):
    """From one point of a buffer to the next: in the way of the steps `[lower, until)`, and of what is repeated before those
    in `[ahead, until]`; `begun` is the point it begins at, -1 where the buffer is made."""

    lower: int
    ahead: int
    until: int
    begun: int


@dataclass(frozen=True)
class Points:
    """When each buffer is wanted, or may be.

    Attributes:
        problem: whose ops run.
        order: in which.
        step: of each op.
        uses: for each buffer the steps that read it, ascending.
        extra: for each buffer further steps before which it may be wanted, for an op that is repeated there.
        again: (buffer, step) that may be made again before the step.
    """

    problem: Residency
    order: tuple[int, ...]
    step: dict[int, int]
    uses: list[list[int]]
    extra: list[set[int]]
    again: set[tuple[int, int]]

    @cached_property
    def of(self) -> list[list[int]]:
        """For each buffer its points, ascending."""
        return [sorted({*uses, *extra}) for uses, extra in zip(self.uses, self.extra, strict=True)]

    def stretches(self, buffer: int) -> list[Stretch]:
        """Between the points of a buffer, and before the first if an op makes it."""
        found, op = [], self.problem.producer[buffer]
        lower, ahead, begun = (self.step[op] + 1, self.step[op] + 1, -1) if op >= 0 else (0, 0, None)
        for point in self.of[buffer]:
            if begun is not None:
                found.append(Stretch(lower, ahead, point, begun))
            lower, ahead, begun = point + (point in self.uses[buffer]), point + 1, point
        return found


def find_points(problem: Residency, order: Sequence[int], repeatable: Collection[int], depth: int) -> Points:
    """The points of an order: where a gap is in the way of a step that is too full, what its end could be made of."""
    gaps = find_gaps(problem, order)
    step = {op: at for at, op in enumerate(order)}
    uses = [sorted(step[op] for op in ops) for ops in problem.readers]
    points = Points(problem, tuple(order), step, uses, [set() for _ in problem.size], set())
    pressed = {int(gap) for crossed, room in zip(gaps.crossed, gaps.room, strict=True)
               if sum(problem.size[b] for b in gaps.buffer[crossed].tolist()) > room for gap in crossed}  # fmt: skip
    wanted: list[tuple[int, int]] = []
    for gap in sorted(pressed):
        buffer, low, high = int(gaps.buffer[gap]), int(gaps.after[gap]) + 1, int(gaps.until[gap])
        near = {at + by for operand in problem.reads[problem.producer[buffer]] for at in uses[operand] for by in (0, 1)}
        early = {at for at in range(low, high) if high - low <= SHORT or at in near} if problem.producer[buffer] >= 0 else ()
        wanted += [(buffer, at) for at in (*sorted(early), high)]
    for _ in range(depth):
        found: list[tuple[int, int]] = []
        for buffer, at in wanted:
            op = problem.producer[buffer]
            if op < 0 or op not in repeatable or len(problem.writes[op]) > 1 or (buffer, at) in points.again:
                continue
            points.again.add((buffer, at))
            points.extra[buffer] |= {at} - {*uses[buffer]}
            for operand in problem.reads[op]:
                found.append((operand, at))
                points.extra[operand] |= {at} - {*uses[operand]}
        wanted = found
    return points


def solve_again(
    problem: Residency, limit: Limit, start: Answer[Mapped, int], repeatable: Collection[int], depth: int = DEPTH
) -> Answer[Mapped, int]:
    """A mapping in the same order that moves no more bytes; of those that move as few, one that repeats the fewest ops.

    Args:
        problem: what is mapped.
        limit: how long to search.
        start: the answer without; there is one. Its bound says nothing of mappings that repeat ops, so what is returned has
            none, unless no op is repeatable.
        repeatable: ops that give the same when they run again.
        depth: how many ops behind each other may be repeated for one use.
    """
    best = start.found
    once = verdict(best, 0, start.method) if repeatable else start
    points = find_points(problem, best.order, repeatable, depth)
    if not best.bytes or not points.again:
        return once
    model = RepeatModel(points)
    solver = make_solver(limit.seconds, limit.seed)
    if solver.solve(model.model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE) or model.bytes_of(solver) >= best.bytes:
        return once
    chosen = [frozenset(key for key, variable in each.items() if solver.boolean_value(variable))
              for each in (model.loads, model.again)]  # fmt: skip
    first = {(b, uses[0]) for b, uses in enumerate(points.uses) if uses and problem.producer[b] < 0}
    return verdict(Mapped(best.order, chosen[0] - first, model.bytes_of(solver), chosen[1]), 0, "ops run again")


class RepeatModel:
    """The program: what stays between points, what is loaded at them, and what is made again."""

    def __init__(self, points: Points):
        self.points, self.problem = points, points.problem
        self.model = cp_model.CpModel()
        add = self.model.new_bool_var
        keys = [(buffer, point) for buffer, found in enumerate(points.of) for point in found]
        self.again = {key: add(f"again {key}") for key in sorted(points.again)}
        self.loads = {key: add(f"load {key}") for key in keys}
        self.wanted = {(b, at): add(f"want {b} {at}") for b, extra in enumerate(points.extra) for at in sorted(extra)}
        self.stays = {(b, at): add(f"stay {b} {at}") for b in range(len(points.of)) for _, _, at, _ in points.stretches(b)}
        self.stored = {b: add(f"store {b}") for b, fresh in enumerate(self.problem.fresh) if fresh and points.of[b]}
        for buffer, point in keys:
            self.add_point(buffer, point)
        self.add_wishes()
        self.add_steps()
        size, first = self.problem.size, self.problem.compulsory - sum(self.problem.size[b] for b in self.problem.outputs)
        self.moved = sum(size[b] * load for (b, _), load in self.loads.items()) - first
        self.moved += sum(size[b] * stored for b, stored in self.stored.items())
        self.model.minimize(self.moved * (len(self.again) + 1) + sum(self.again.values()))

    def add_point(self, buffer: int, point: int) -> None:
        """It is there, if wanted, because it stayed, is loaded or is made again; and stays on only if it is there."""
        ways = [self.loads[buffer, point]]
        ways += [each[buffer, point] for each in (self.stays, self.again) if (buffer, point) in each]
        unless = [self.wanted[buffer, point].negated()] if (buffer, point) in self.wanted else []
        self.model.add_bool_or([*unless, *ways])
        if unless:  # loads are for ops
            self.model.add_implication(self.loads[buffer, point], self.wanted[buffer, point])
        for stretch in self.points.stretches(buffer):
            if stretch.begun == point and unless:
                self.model.add_bool_or([self.stays[buffer, stretch.until].negated(), *ways])
        if buffer in self.stored:
            self.model.add_implication(self.loads[buffer, point], self.stored[buffer])

    def add_wishes(self) -> None:
        """At a point that is no use a value is wanted if an op that reads it is repeated there, and only then."""
        repeats: dict[tuple[int, int], list[cp_model.IntVar]] = {key: [] for key in self.wanted}
        for (buffer, point), again in self.again.items():
            for operand in self.problem.reads[self.problem.producer[buffer]]:
                if (operand, point) in self.wanted:
                    repeats[operand, point].append(again)
        for key, wanted in self.wanted.items():
            self.model.add_max_equality(wanted, repeats[key] or [0])

    def add_steps(self) -> None:
        """What is there while each op runs fits, and so does what is there while ops are repeated before it."""
        problem, size = self.problem, self.problem.size
        during: list[list[cp_model.LinearExprT]] = [[] for _ in self.points.order]
        ahead: list[list[cp_model.LinearExprT]] = [[] for _ in self.points.order]
        most, most_ahead = [problem.need[op] for op in self.points.order], [0] * len(self.points.order)
        for buffer in range(len(size)):
            for stretch in self.points.stretches(buffer):
                stays = size[buffer] * self.stays[buffer, stretch.until]
                for step in range(stretch.lower, stretch.until):
                    during[step].append(stays)
                    most[step] += size[buffer]
                for step in range(stretch.ahead, stretch.until + 1):
                    ahead[step].append(stays)
                    most_ahead[step] += size[buffer]
        repeated: dict[int, list[cp_model.IntVar]] = {}
        operands = {(b, at) for made, at in self.again for b in problem.reads[problem.producer[made]]}
        loaded = {key: load for key, load in self.loads.items() if key in operands}  # other loads come behind the repeated ops
        for (buffer, point), here in (*loaded.items(), *self.again.items()):
            ahead[point].append(size[buffer] * here)
            most_ahead[point] += size[buffer]
        for (_, point), again in self.again.items():
            repeated.setdefault(point, []).append(again)
        for step, op in enumerate(self.points.order):
            if most[step] > problem.capacity:
                self.model.add(sum(during[step]) <= problem.capacity - problem.need[op])
            if step in repeated and most_ahead[step] > problem.capacity:
                some = self.model.new_bool_var(f"repeat before {step}")
                self.model.add_max_equality(some, repeated[step])
                self.model.add(sum(ahead[step]) <= problem.capacity).only_enforce_if(some)

    def bytes_of(self, solver: cp_model.CpSolver) -> int:
        """Bytes moved beyond the compulsory ones."""
        return int(solver.value(self.moved))

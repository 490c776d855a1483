"""Which values to keep from the forward pass: one integer program over the whole timeline, corrected by simulation.

The program has a keep-or-recompute choice for every value, the closure rule of `solvers.bound` (what is recomputed
needs its inputs), and a capacity row for the worst moment of every segment's backward pass. What a row cannot know (the
transients of the recomputation that a choice leads to) is measured by simulating the answer, and the row is corrected
by the difference; a few rounds of this settle.
"""

from dataclasses import dataclass
from itertools import pairwise

import highspy
import numpy as np

from .bound import highs_model, used_from
from .segments import Segments
from .timeline import HOLD, KEEP, SINCE, Problem, profile


@dataclass(frozen=True)
class Slots:
    """The gaps that leave a choice: where a value need not stay resident, or might though no use follows.

    Attributes:
        gap: index of the gap in a solution.
        buffer: whose gap it is.
        before: base time of the use before it, or of the buffer's making.
        at: base time of the use that ends it; the number of ops for a last gap.
        last: gaps that no use ends, in which a value can only be held for recomputations.
    """

    gap: np.ndarray
    buffer: np.ndarray
    before: np.ndarray
    at: np.ndarray
    last: np.ndarray


def find_slots(problem: Problem, everything: bool) -> Slots:
    """The gaps that are choices.

    Args:
        problem: whose gaps.
        everything: also those of values that the backward pass makes.
    """
    ops = len(problem.seconds)
    rows = []
    for buffer in range(len(problem.size)):
        op = int(problem.producer[buffer])
        if op > problem.boundary and not everything:
            continue
        previous = op
        for index in range(problem.use_start[buffer], problem.use_start[buffer + 1]):
            if problem.repeatable[op] and (problem.use[index] > problem.boundary or everything):
                rows.append((index + buffer, buffer, previous, int(problem.use[index]), 0))
            previous = int(problem.use[index])
        if not problem.output[buffer]:
            rows.append((problem.use_start[buffer + 1] + buffer, buffer, previous, ops, 1))
    table = np.array(rows, np.int64).reshape(-1, 5)
    return Slots(*(np.ascontiguousarray(column) for column in table.T))


class Master:
    """The keep-or-recompute program of one problem."""

    def __init__(self, problem: Problem, segments: Segments, slots: Slots):
        self.problem, self.segments, self.slots = problem, segments, slots
        ops = problem.boundary
        self.early = np.flatnonzero(problem.producer < ops)
        column = np.full(len(problem.size), -1, np.int64)
        column[self.early] = ops + np.arange(len(self.early))
        rows: list[tuple[list[int], list[float], float]] = []
        late = used_from(problem, ops + 1)
        for buffer in self.early:
            if late[buffer]:
                rows.append(([int(column[buffer]), int(problem.producer[buffer])], [1.0, 1.0], 1.0))
        for op in range(ops):
            if problem.repeatable[op]:
                for buffer in problem.read[problem.read_start[op] : problem.read_start[op + 1]]:
                    rows.append(([int(column[buffer]), int(problem.producer[buffer]), op], [1.0, 1.0, -1.0], 0.0))
        upper = np.concatenate([problem.repeatable[:ops].astype(float), np.ones(len(self.early))])
        self.rows, self.upper = rows, upper
        self.cost = np.concatenate([problem.seconds[:ops], np.zeros(len(self.early))])
        # a kept value is resident until its segment's backward pass opens; from then on it is there either way
        self.until = segments.opened[segments.of_buffer[self.early]]
        self.weight = problem.size[self.early].astype(float)
        self.choice = np.isin(np.arange(len(problem.size)), slots.buffer)

    def solve(self, moments: np.ndarray, room: np.ndarray, time_limit: float, integer: bool = True) -> np.ndarray | None:
        """Which buffers to keep, shape (buffers,), or None where no choice fits.

        Args:
            moments: base times at which memory is limited.
            room: bytes that kept values of segments not yet opened may take at each moment.
            time_limit: seconds.
            integer: False for the linear relaxation, whose values lie between 0 and 1.
        """
        ops = self.problem.boundary
        rows = list(self.rows)
        for moment, limit in zip(moments, room, strict=True):
            there = np.flatnonzero(self.until > moment)
            if len(there):
                rows.append(((ops + there).tolist(), (-self.weight[there]).tolist(), -float(limit)))
        everything = (ops + np.arange(len(self.early)), np.full(len(self.early), 1e-9))
        model = highs_model(self.cost, np.zeros(len(self.cost)), self.upper, rows, everything)
        if integer:
            kinds = [highspy.HighsVarType.kContinuous] * ops + [highspy.HighsVarType.kInteger] * len(self.early)
            model.changeColsIntegrality(len(kinds), np.arange(len(kinds), dtype=np.int32), np.array(kinds))
            model.setOptionValue("mip_rel_gap", 2e-3)
            model.setOptionValue("time_limit", time_limit)
        model.run()
        values = np.array(model.getSolution().col_value)
        if len(values) == 0 or model.getInfo().primal_solution_status != 2:
            return None
        keep = np.zeros(len(self.problem.size))
        keep[self.early] = values[ops:]
        return keep

    def solution(self, keep: np.ndarray) -> np.ndarray:
        """The solution that keeps these buffers and recomputes the others when their segment's backward pass opens."""
        slots = self.slots
        solution = self.problem.keep_all()
        crossing = (slots.before <= self.problem.boundary) & (slots.at > self.problem.boundary)
        dropped = crossing & (keep[slots.buffer] < 0.5) & (slots.last == 0)
        solution[SINCE, slots.gap[dropped]] = self.opened(slots.buffer[dropped])
        held = crossing & (keep[slots.buffer] > 0.5) & (slots.last == 1)
        own = self.segments.opened[self.segments.of_buffer[slots.buffer[held]]]
        solution[HOLD, slots.gap[held]] = np.where(own < len(self.problem.seconds), own, KEEP)
        return solution

    def opened(self, buffers: np.ndarray) -> np.ndarray:
        """From when a recomputed buffer stays: at once where later segments are rebuilt from it, else when its own opens."""
        own = self.segments.opened[self.segments.of_buffer[buffers]]
        return np.where(self.segments.crosses[buffers], self.problem.boundary, own)

    def iterate(self, budget: int, rounds: int, seconds: float, integer: bool = True) -> list[np.ndarray]:
        """Solutions of successive rounds of solving and simulating, each corrected by the one before.

        Args:
            budget: bytes.
            rounds: how many.
            seconds: for all of them, at most.
            integer: False for the linear relaxation, rounded: in programs of thousands of values, where single ones weigh
                little, it is as good and takes milliseconds.
        """
        moments, used = self.worst(self.problem.keep_all())
        keep = np.ones(len(self.problem.size))
        found = []
        slack = 0.0
        for _ in range(rounds):
            held = np.array([self.weight[(self.until > moment) & (keep[self.early] > 0.5)].sum() for moment in moments])
            room = budget - slack - (used - held)
            answer = self.solve(moments, np.maximum(room, 0.0), seconds / rounds, integer)
            if answer is None:
                break
            keep = np.round(answer)
            solution = self.solution(keep)
            found.append(solution)
            moments, used = self.worst(solution)
            if not len(moments):  # it would have to repeat what may not be repeated
                found.pop()
                break
        return found

    def worst(self, solution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The moment of most bytes in each segment's backward pass and in the forward pass, and how many."""
        _, when, memory = profile(self.problem, solution)
        edges = np.unique(np.concatenate([[0], self.segments.opened, [len(self.problem.seconds)]]))
        moments, used = [], []
        for low, high in pairwise(edges):
            inside = np.flatnonzero((when >= low) & (when < high))
            if len(inside):
                best = inside[np.argmax(memory[inside])]
                moments.append(int(when[best]))
                used.append(int(memory[best]))
        return np.array(moments), np.array(used, float)

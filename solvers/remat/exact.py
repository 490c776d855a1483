"""Which values to keep from the forward pass, and which to move: one integer program, corrected by simulation.

The program has a keep, move or recompute choice for every value, the closure rule of `solvers.remat.bound` (what is recomputed
needs its inputs), a capacity row for the worst moment of every segment's backward pass, and for each tier behind the device
a row for its bytes and one for each of its links: copies out hide behind the forward pass, copies in behind the backward
pass, and what does not is stalled for. What a row cannot know (the transients of the recomputation that a choice leads to,
and bytes in flight) is measured by simulating the answer, and the row is corrected by the difference; a few rounds of this
settle.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..programs import linear
from ..programs.linear import Row, of_rows
from ..programs.names import HIGHS
from .bound import closure, in_mean_times, used_from
from .problem import BEGIN, HOLD, KEEP, MOVE, SINCE, Answer, Limit, Problem, budget_of, profile, verdict
from .segments import Segments, find_segments

ROUNDS = 4  # of solving and simulating, where nobody says how many
SMALL = 150  # ops: programs up to this size may also recompute what the backward pass makes
GAP = 2e-3  # of the program's cost: its rows are estimates, which simulation corrects


def solve(problem: Problem, limit: Limit) -> Answer[np.ndarray, float]:
    """The best of a few rounds of the program. Its rows are estimates: it knows no bound but the time without repetition."""
    base = problem.keep_all()
    rounds = make_master(problem, limit.solver).iterate(base, budget_of(limit), ROUNDS, limit.seconds)
    return verdict(problem, [base, *rounds], limit, float(problem.seconds.sum()), "integer program")


@dataclass(frozen=True)
class Slots:
    """The gaps that leave a choice: where a value need not stay resident, or might though no use follows.

    Attributes:
        gap: index of the gap in a solution.
        buffer: whose gap it is.
        before: base time of the use before it, or of the buffer's making.
        at: base time of the use that ends it; the number of ops for a last gap.
        last: gaps that no use ends, in which a value can only be held for recomputations.
        movable: 1 where the value may wait for the gap's end in another tier, 2 where nothing else will do; 3 where it may be
            at home there and is fetched or, between two uses, kept; else 0.
    """

    gap: np.ndarray
    buffer: np.ndarray
    before: np.ndarray
    at: np.ndarray
    last: np.ndarray
    movable: np.ndarray

    @property
    def travels(self) -> np.ndarray:
        """Gaps of what the step makes in which it may wait in another tier."""
        return (self.movable > 0) & (self.movable < 3)


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
        if problem.home[buffer]:
            uses = problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]].tolist()
            for number, (before, at) in enumerate(zip([-1, *uses], uses, strict=False)):
                rows.append((int(problem.use_start[buffer]) + number + buffer, buffer, before, at, 0, 3))
            continue
        if op > problem.boundary and not everything:
            continue
        previous = op
        for index in range(problem.use_start[buffer], problem.use_start[buffer + 1]):
            late = bool(problem.use[index] > problem.boundary)
            moves = len(problem.tiers) > 0 and op < problem.boundary and late and not problem.output[buffer]
            if moves or (problem.repeatable[op] and (late or everything)):
                movable = 0 if not moves else 1 if problem.repeatable[op] else 2
                rows.append((index + buffer, buffer, previous, int(problem.use[index]), 0, movable))
            previous = int(problem.use[index])
        if not problem.output[buffer]:
            moves = len(problem.tiers) > 0 and op < problem.boundary
            rows.append((problem.use_start[buffer + 1] + buffer, buffer, previous, ops, 1, int(moves)))
    table = np.array(rows, np.int64).reshape(-1, 6)
    return Slots(*(np.ascontiguousarray(column) for column in table.T))


class Master:
    """The keep, move or recompute program of one problem.

    Its columns are: for each op of the forward pass how much of it is run again; for each value of the forward pass how
    much of it is kept; the same for moved to each tier in turn; and for each link the time stalled for it. Its times are
    those of `timed`. A solver is named to solve it; see `programs/names.py`.
    """

    def __init__(self, problem: Problem, segments: Segments, slots: Slots, solver: str = HIGHS):
        self.problem, self.segments, self.slots, self.solver = problem, segments, slots, solver
        self.timed, _ = in_mean_times(problem)
        ops = problem.boundary
        self.early = np.flatnonzero(problem.producer < ops)
        count, tiers = len(self.early), len(problem.tiers)
        self.rows, self.stalls = closure(problem, ops, used_from(problem, ops + 1), tiers), ops + (1 + tiers) * count
        movable = np.isin(self.early, slots.buffer[slots.movable > 0]).astype(float)
        again = (problem.repeatable[:ops] > ops).astype(float)
        self.upper = np.concatenate([again, np.ones(count), *[movable] * tiers, np.full(2 * tiers, np.inf)])
        self.weight = problem.size[self.early].astype(float)
        loads = [self.weight * (out_load / out + back_load / back)
                 for out, _, out_load, back, _, back_load, *_ in self.timed.tiers]  # fmt: skip
        self.cost = np.concatenate([self.timed.seconds[:ops], np.zeros(count), *loads, np.ones(2 * tiers)])
        # a kept value is resident until its segment's backward pass opens; from then on it is there either way
        self.until = segments.opened[segments.of_buffer[self.early]]

    def link_rows(self, base: np.ndarray) -> list[Row]:
        """The rows of each tier: time of copies out, of copies in, and bytes; some are taken by what is at home there."""
        problem, ops, count, size = self.timed, self.problem.boundary, len(self.early), self.weight
        forward, backward = problem.seconds[:ops].sum(), problem.seconds[ops:].sum()
        away = np.where(base[SINCE, problem.first_gap] >= 0, problem.home, 0)
        rows: list[Row] = []
        for number, (out, out_delay, out_load, back, back_delay, back_load, room, _) in enumerate(problem.tiers):
            home = float(problem.size[away == 1 + number].sum())
            moved = (ops + (1 + number) * count + np.arange(count)).tolist()
            leaving, coming = -(size / out * (1 - out_load) + out_delay), -(size / back * (1 - back_load) + back_delay)
            rows.append(([*moved, self.stalls + 2 * number], [*leaving, 1.0], -forward))
            rows.append(([*moved, self.stalls + 2 * number + 1, *range(ops)],
                         [*coming, 1.0, *problem.seconds[:ops]], home / back - backward))  # fmt: skip
            rows.append((moved, (-size).tolist(), home - room))
        return rows

    def solve(
        self, base: np.ndarray, moments: np.ndarray, room: np.ndarray, time_limit: float, integer: bool = True
    ) -> np.ndarray | None:
        """How much of each buffer to keep, and to move to each tier, shape (1 + tiers, buffers), or None where nothing fits.

        Args:
            base: a solution that has what is at home elsewhere.
            moments: base times at which memory is limited.
            room: bytes that kept values of segments not yet opened may take at each moment.
            time_limit: seconds.
            integer: False for the linear relaxation, whose values lie between 0 and 1.
        """
        ops = self.problem.boundary
        rows = [*self.rows, *self.link_rows(base)]
        for moment, limit in zip(moments, room, strict=True):
            there = np.flatnonzero(self.until > moment)
            if len(there):
                rows.append(((ops + there).tolist(), (-self.weight[there]).tolist(), -float(limit)))
        whole = np.zeros(len(self.cost), bool)
        whole[ops : self.stalls] = integer
        program = of_rows(self.cost, np.zeros(len(self.cost)), self.upper, rows, whole)
        values = linear.solve(program, self.solver, time_limit, gap=GAP).values
        if not len(values):
            return None
        choice = np.zeros((1 + len(self.problem.tiers), len(self.problem.size)))
        choice[:, self.early] = values[ops : self.stalls].reshape(len(choice), -1)
        return choice

    def solution(self, base: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """A base solution that keeps and moves these buffers, and recomputes the others.

        They are recomputed when their segment's backward pass opens, and fetched while the one before it runs.
        """
        slots, keep = self.slots, choice[0]
        solution = base.copy()
        crossing = (slots.before <= self.problem.boundary) & (slots.at > self.problem.boundary)
        moved = (slots.movable > 0) & (choice[1:, slots.buffer].max(axis=0, initial=0.0) > 0.5)
        dropped = crossing & (keep[slots.buffer] < 0.5) & (slots.last == 0) & (slots.movable < 2) & ~moved
        solution[SINCE, slots.gap[dropped]] = self.opened(slots.buffer[dropped])
        self.move(solution, moved, choice[1:, slots.buffer[moved]].argmax(axis=0) + 1 if moved.any() else 1)
        held = crossing & (keep[slots.buffer] > 0.5) & (slots.last == 1)
        own = self.segments.opened[self.segments.of_buffer[slots.buffer[held]]]
        solution[HOLD, slots.gap[held]] = np.where(own < len(self.problem.seconds), own, KEEP)
        return solution

    def move(self, solution: np.ndarray, which: np.ndarray, tier: np.ndarray | int) -> None:
        """Move the values of some slots to a tier (numbered from 1).

        They are fetched while the segment after theirs runs backward. What only recomputations read is fetched one segment
        earlier, for it is the next segment that is made from it.
        """
        slots, opened = self.slots, self.segments.opened
        gap, own, last = slots.gap[which], self.segments.of_buffer[slots.buffer[which]], slots.last[which] == 1
        ahead = [opened[np.minimum(own + number, len(opened) - 1)] for number in (1, 2)]
        early = np.maximum(np.minimum(ahead[0], slots.at[which]), np.maximum(slots.before[which] + 1, self.problem.boundary))
        solution[SINCE, gap] = np.where(last, solution[SINCE, gap], early)
        solution[BEGIN, gap] = np.where(last, np.maximum(ahead[1], self.problem.boundary), solution[BEGIN, gap])
        solution[HOLD, gap] = np.where(last, ahead[0], solution[HOLD, gap])
        solution[MOVE, gap] = tier

    def opened(self, buffers: np.ndarray) -> np.ndarray:
        """From when a recomputed buffer stays: at once where later segments are rebuilt from it, else when its own opens."""
        own = self.segments.opened[self.segments.of_buffer[buffers]]
        return np.where(self.segments.crosses[buffers], self.problem.boundary, own)

    def iterate(self, base: np.ndarray, budget: int, rounds: int, seconds: float, integer: bool = True) -> list[np.ndarray]:
        """Solutions of successive rounds of solving and simulating, each corrected by the one before.

        Args:
            base: the solution that keeps everything, and has at home elsewhere what shall be.
            budget: bytes.
            rounds: how many.
            seconds: for all of them, at most.
            integer: False for the linear relaxation, rounded: in programs of thousands of values, where single ones weigh
                little, it is as good and takes milliseconds.
        """
        until = time.monotonic() + seconds
        moments, used = self.worst(base)
        choice = np.ones((1, len(self.problem.size)))
        found = []
        for _ in range(rounds):
            kept = choice[0, self.early] > 0.5
            held = np.array([self.weight[(self.until > moment) & kept].sum() for moment in moments])
            room = budget - (used - held)
            left = max(until - time.monotonic(), 0.0)
            limit = min(left, seconds / rounds) if integer else left  # a relaxation that was cut short is of no use
            answer = self.solve(base, moments, np.maximum(room, 0.0), limit, integer)
            if answer is None:
                break
            choice = np.round(answer)
            solution = self.solution(base, choice)
            found.append(solution)
            moments, used = self.worst(solution)
            if not len(moments):  # it would have to repeat what may not be repeated, or too much
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


def make_master(problem: Problem, solver: str | None = None) -> Master:
    """The program of a problem that was not looked at before."""
    return Master(problem, find_segments(problem), find_slots(problem, len(problem.seconds) <= SMALL), solver or HIGHS)

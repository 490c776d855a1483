"""The order of ops with the smallest peak.

Which buffers are live depends only on the set of ops that have run, so the peak of the best order is a shortest path over
those sets where a path costs what its highest step does (Serenity's dynamic programming, Ahn et al. 2020). Sets are
visited lowest peak first, and among equals the largest; an op that leaves no more bytes live than it found, and needs no
more than the peak so far, runs at once, for nothing is gained by waiting.
"""

import heapq
import math
import time
from dataclasses import replace

from .problem import Residency
from .waists import ancestors, descendants

SETS = 200_000  # visited at most
BEAM = 64  # sets kept for each number of ops where that does not suffice
KNOWN = 512  # answers kept: the same parts are asked for by every size of a scratchpad
Ordered = tuple[list[int], int, bool]
known: dict[tuple[Residency, int], Ordered] = {}  # answers to a problem and a number of sets, none cut short by the clock


def find_order(problem: Residency, sets: int = SETS, until: float = math.inf) -> Ordered:
    """An order, its peak in bytes, and whether no order has a smaller one; whatever the problem's capacity.

    Args:
        problem: whose ops.
        sets: to look at, at most.
        until: when to stop.
    """
    key = replace(problem, capacity=0), sets
    if key not in known:
        found = search(*key, until)
        if time.monotonic() > until:  # with more time there might be a better one
            return found
        known[key] = found
        if len(known) > KNOWN:
            known.pop(next(iter(known)))
    order, peak, proven = known[key]
    return list(order), peak, proven


def search(problem: Residency, sets: int, until: float) -> Ordered:
    """What `find_order` returns."""
    walk = PeakWalk(problem, until)
    best = min([list(range(walk.count)), walk.beam(BEAM)], key=walk.peak_of)
    peak, proven = walk.peak_of(best), True
    if peak > least_peak(problem):
        found, proven = walk.search(sets, peak)
        best = found or best
    return best, walk.peak_of(best), proven


def least_peak(problem: Residency) -> int:
    """The most that any op needs, with what has been made or loaded before it and is read behind it in every order."""
    past, future = ancestors(problem.before), descendants(problem.before)
    readers = [sum(1 << op for op in ops) for ops in problem.readers]
    there = [1 << op if op >= 0 else uses for op, uses in zip(problem.producer, readers, strict=True)]  # after any of these
    most = 0
    for op, need in enumerate(problem.need):
        across = {b for b, ops in enumerate(there) if past[op] & ops and future[op] & readers[b]}
        most = max(most, need + sum(problem.size[b] for b in across - {*problem.reads[op]}))
    return most


class PeakWalk:
    """Sets of ops as bits, and the bytes that are live after them. Searches are cut short at a time."""

    def __init__(self, problem: Residency, until: float = math.inf):
        self.problem, self.until = problem, until
        self.count = len(problem.reads)
        self.before = [sum(1 << op for op in ops) for ops in problem.before]
        self.readers = [sum(1 << op for op in ops) for ops in problem.readers]
        self.after: list[list[int]] = [[] for _ in range(self.count)]
        for op, others in enumerate(problem.before):
            for other in others:
                self.after[other].append(op)

    def run(self, done: int, live: int, op: int) -> tuple[int, int]:
        """Bytes while an op runs after a set that leaves `live`, and after it."""
        size, problem = self.problem.size, self.problem
        during = live + sum(size[buffer] for buffer in problem.writes[op])
        during += sum(size[b] for b in problem.reads[op] if problem.producer[b] < 0 and not self.readers[b] & done)
        now = done | 1 << op
        gone = sum(size[buffer] for buffer in problem.reads[op] if not self.readers[buffer] & ~now)
        gone += sum(size[buffer] for buffer in problem.writes[op] if not self.readers[buffer])
        return during, during - gone

    def behind(self, ready: tuple[int, ...], done: int, op: int) -> tuple[int, ...]:
        """The ops that may run next, once one of those that might has run."""
        others = tuple(other for other in ready if other != op)
        return others + tuple(other for other in self.after[op] if not self.before[other] & ~done)

    def steps(self, done: int, live: int, ready: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """What may run next: op, bytes while it runs, bytes after it."""
        return [(op, *self.run(done, live, op)) for op in ready]

    @property
    def first(self) -> tuple[int, ...]:
        """The ops that may run at once."""
        return tuple(op for op in range(self.count) if not self.before[op])

    def search(self, most: int, below: int) -> tuple[list[int] | None, bool]:
        """The best order of those with a smaller peak, if there is one, and whether there was time for all sets needed."""
        full = (1 << self.count) - 1
        heap: list[tuple[int, int, int, int, tuple[int, ...], tuple]] = [(0, 0, 0, 0, self.first, ())]
        seen: set[int] = set()
        while heap:
            peak, _, done, live, ready, path = heapq.heappop(heap)
            if done in seen:
                continue
            seen.add(done)
            if len(seen) > most or time.monotonic() > self.until:
                return None, False
            steps = self.steps(done, live, ready)
            while free := next((step for step in steps if step[1] <= peak and step[2] <= live), None):
                done, live, path = done | 1 << free[0], free[2], (free[0], path)
                ready = self.behind(ready, done, free[0])
                steps = self.steps(done, live, ready)
            if done == full:
                return unroll(path), True
            for op, during, after in steps:
                more = done | 1 << op
                if during < below and more not in seen:
                    following = self.behind(ready, more, op)
                    heapq.heappush(heap, (max(peak, during), -more.bit_count(), more, after, following, (op, path)))
        return None, True

    def beam(self, width: int) -> list[int]:
        """The best of a few sets of each size, by peak and then by live bytes."""
        states: dict[int, tuple[int, int, tuple[int, ...], tuple]] = {0: (0, 0, self.first, ())}
        for _ in range(self.count):
            following: dict[int, tuple[int, int, tuple[int, ...], tuple]] = {}
            for done, (peak, live, ready, path) in states.items():
                for op, during, after in self.steps(done, live, ready):
                    now = done | 1 << op
                    known = following.get(now)
                    if known is None or (max(peak, during), after) < known[:2]:
                        following[now] = (max(peak, during), after, self.behind(ready, now, op), (op, path))
            kept = width if time.monotonic() <= self.until else 1
            states = dict(sorted(following.items(), key=lambda item: item[1][:2])[:kept])
        ((_, _, _, path),) = states.values()
        return unroll(path)

    def peak_of(self, order: list[int]) -> int:
        """The peak of an order."""
        done, live, peak = 0, 0, 0
        for op in order:
            during, live = self.run(done, live, op)
            done, peak = done | 1 << op, max(peak, during)
        return peak


def unroll(path: tuple) -> list[int]:
    """A linked list, last first, as a list."""
    order = []
    while path:
        op, path = path
        order.append(op)
    return order[::-1]

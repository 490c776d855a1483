"""The order of ops with the smallest peak.

Which buffers are live depends only on the set of ops that have run, so the peak of the best order is a shortest path over
those sets where a path costs what its highest step does (Serenity's dynamic programming, Ahn et al. 2020). Sets are
visited lowest peak first, and among equals the largest; an op that leaves no more bytes live than it found, and needs no
more than the peak so far, runs at once, for nothing is gained by waiting.
"""

import heapq
from dataclasses import replace
from functools import lru_cache

from .residency import Residency

SETS = 200_000  # visited at most
BEAM = 64  # sets kept for each number of ops where that does not suffice


def find_order(problem: Residency, sets: int = SETS) -> tuple[list[int], int, bool]:
    """An order, its peak in bytes, and whether no order has a smaller one; whatever the problem's capacity."""
    order, peak, proven = search(replace(problem, capacity=0), sets)
    return list(order), peak, proven


@lru_cache(maxsize=512)  # the same parts are asked for by every size of a scratchpad
def search(problem: Residency, sets: int) -> tuple[list[int], int, bool]:
    """What `find_order` returns."""
    walk = Walk(problem)
    found = walk.search(sets)
    if found is not None:
        return found, walk.peak_of(found), True
    tried = [walk.beam(BEAM), list(range(walk.count))]
    best = min(tried, key=walk.peak_of)
    return best, walk.peak_of(best), walk.peak_of(best) <= max(problem.need, default=0)


class Walk:
    """Sets of ops as bits, and the bytes that are live after them."""

    def __init__(self, problem: Residency):
        self.problem = problem
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

    def ready(self, done: int) -> list[int]:
        """The ops that may run next."""
        return [op for op in range(self.count) if not done >> op & 1 and not self.before[op] & ~done]

    def steps(self, done: int, live: int) -> list[tuple[int, int, int]]:
        """What may run next: op, bytes while it runs, bytes after it."""
        return [(op, *self.run(done, live, op)) for op in self.ready(done)]

    def search(self, most: int) -> list[int] | None:
        """The best order, or None where too many sets would have to be visited."""
        full = (1 << self.count) - 1
        heap: list[tuple[int, int, int, int, tuple]] = [(0, 0, 0, 0, ())]
        seen: set[int] = set()
        while heap:
            peak, _, done, live, path = heapq.heappop(heap)
            if done in seen:
                continue
            seen.add(done)
            if len(seen) > most:
                return None
            steps = self.steps(done, live)
            while free := next((step for step in steps if step[1] <= peak and step[2] <= live), None):
                done, live, path = done | 1 << free[0], free[2], (free[0], path)
                steps = self.steps(done, live)
            if done == full:
                return unroll(path)
            for op, during, after in steps:
                more = done | 1 << op
                if more not in seen:
                    heapq.heappush(heap, (max(peak, during), -more.bit_count(), more, after, (op, path)))
        return None

    def beam(self, width: int) -> list[int]:
        """The best of a few sets of each size, by peak and then by live bytes."""
        states: dict[int, tuple[int, int, tuple]] = {0: (0, 0, ())}
        for _ in range(self.count):
            following: dict[int, tuple[int, int, tuple]] = {}
            for done, (peak, live, path) in states.items():
                for op, during, after in self.steps(done, live):
                    state = (max(peak, during), after, (op, path))
                    known = following.get(done | 1 << op)
                    if known is None or state[:2] < known[:2]:
                        following[done | 1 << op] = state
            best = sorted(following.items(), key=lambda item: item[1][:2])[:width]
            states = dict(best)
        ((_, _, path),) = states.values()
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

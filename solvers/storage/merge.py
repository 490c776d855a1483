"""Buffers that nearly fit one another become one, the least wasteful pairs first.

Coalescing joins what fits exactly; here, in the order of their waste, two buffers with nearly one lifetime are stacked for
the time of both, and two of one size, one after the other, become one that also lives between them. The load is kept:
no join may raise the live bytes of any section above a limit, so that a packing within the limit is not ruled out. What
remains is a smaller problem of larger buffers (hierarchical clustering, with dead space as the distance).

That two buffers have one size, that their sizes add up to that of a third, or that they begin or end together, is unlikely
by chance where sizes and times are many, and likely where a whole was cut up. How much of the waste counts then, the caller
says, and tries several ways.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .problem import Reduced, Storage, make_storage

AROUND = 8  # neighbours in the order of beginnings, and of ends, that are looked at on either side
LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of waste, at each of which the problem is handed out
FEWER = 0.95  # of the buffers it had when it was handed out before

Pair = tuple[float, int, int, int, int]


class Weights(NamedTuple):
    """How much waste counts where two buffers have one size (`chained`), sizes that add up to another's (`summed`), or a
    common beginning or end (`shared`)."""

    chained: float
    summed: float
    shared: float


WAYS = (Weights(0.001, 0.001, 0.1), Weights(1.0, 1.0, 1.0), Weights(0.01, 0.01, 0.1))


class Merger:
    """One problem while its buffers are joined.

    Args:
        storage: buffers of one span each, none pinned.
        most: bytes that no section's load may exceed.
        weights: how much waste counts.
    """

    def __init__(self, storage: Storage, most: int, weights: Weights):
        self.most, self.weights = most, weights
        self.times = np.unique(np.concatenate([storage.lower, storage.upper])).tolist()
        begin, end = storage.hull
        self.begin, self.end, self.size = begin.tolist(), end.tolist(), storage.padded.tolist()
        self.load = storage.load.copy()
        self.inside: list[list[tuple[int, int]]] = [[(i, 0)] for i in range(len(storage))]
        self.joins = [0] * len(storage)  # of each buffer; -1 once it lies in another
        self.left = len(storage)
        self.by_begin = sorted((begin, i) for i, begin in enumerate(self.begin))
        self.by_end = sorted((end, i) for i, end in enumerate(self.end))
        self.by_size = sorted((self.size[i], begin, i) for begin, i in self.by_begin)
        self.heap: list[Pair] = []
        for i in range(len(storage)):
            self.look_around(i)

    def look_around(self, i: int) -> None:
        """Weigh a buffer against its neighbours."""
        near = set()
        for order, key in ((self.by_begin, (self.begin[i], i)), (self.by_end, (self.end[i], i))):
            at = bisect_left(order, key)
            near |= {j for _, j in order[max(at - AROUND, 0) : at + AROUND + 1]}
        at = bisect_left(self.by_size, (self.size[i], self.begin[i], i))
        near |= {j for _, _, j in self.by_size[max(at - 1, 0) : at + 2]}
        for j in near - {i}:
            waste = self.waste(i, j)
            if waste is not None:
                heapq.heappush(self.heap, (waste, i, j, self.joins[i], self.joins[j]))

    def waste(self, i: int, j: int) -> float | None:
        """The share of dead space in two buffers as one; None where they cannot be one."""
        times, begin, end = self.times, self.begin, self.end
        whole = times[max(end[i], end[j])] - times[min(begin[i], begin[j])]
        one, two = times[end[i]] - times[begin[i]], times[end[j]] - times[begin[j]]
        if end[i] <= begin[j] or end[j] <= begin[i]:
            return self.weights.chained * (whole - one - two) / whole if self.size[i] == self.size[j] else None
        height = self.size[i] + self.size[j]
        share = (self.size[i] * (whole - one) + self.size[j] * (whole - two)) / max(height * whole, 1)
        at = bisect_left(self.by_size, (height, 0, 0))
        if at < len(self.by_size) and self.by_size[at][0] == height:
            share *= self.weights.summed
        return share * (self.weights.shared if begin[i] == begin[j] or end[i] == end[j] else 1.0)

    def run(self) -> Iterator[Reduced]:
        """The problem at each limit of waste at which it has become smaller."""
        before = FEWER * self.left
        for limit in LIMITS:
            while self.heap and self.heap[0][0] <= limit:
                _, i, j, joins_i, joins_j = heapq.heappop(self.heap)
                if (self.joins[i], self.joins[j]) == (joins_i, joins_j):
                    self.join(i, j)
            if self.left <= before:
                before = FEWER * self.left
                yield self.part()

    def join(self, i: int, j: int) -> None:
        """Make two buffers one, unless a section's load would exceed the limit."""
        low, high = min(self.begin[i], self.begin[j]), max(self.end[i], self.end[j])
        chained = self.end[i] <= self.begin[j] or self.end[j] <= self.begin[i]
        if chained:
            added = [(min(self.end[i], self.end[j]), max(self.begin[i], self.begin[j]), self.size[i])]
        else:
            added = [(low, self.begin[k], self.size[k]) for k in (i, j)]
            added += [(self.end[k], high, self.size[k]) for k in (i, j)]
        added = [piece for piece in added if piece[0] < piece[1]]
        for first, last, size in added:
            self.load[first:last] += size
        if any(self.load[first:last].max() > self.most for first, last, _ in added):
            for first, last, size in added:
                self.load[first:last] -= size
            return
        for k in (i, j):
            for order, key in self.orders(k):
                order.pop(bisect_left(order, key))
        shift = 0 if chained else self.size[i]
        self.inside[i] += [(member, offset + shift) for member, offset in self.inside[j]]
        self.size[i] += 0 if chained else self.size[j]
        self.begin[i], self.end[i] = low, high
        self.joins[i], self.joins[j] = self.joins[i] + 1, -1
        self.left -= 1
        for order, key in self.orders(i):
            insort(order, key)
        self.look_around(i)

    def orders(self, k: int) -> list[tuple[list, tuple[int, ...]]]:
        """The sorted lists that a buffer is in, each with its key."""
        begin, end = self.begin[k], self.end[k]
        return [(self.by_begin, (begin, k)), (self.by_end, (end, k)), (self.by_size, (self.size[k], begin, k))]

    def part(self) -> Reduced:
        """What remains, and where each buffer lies in it."""
        rest = [i for i in range(len(self.joins)) if self.joins[i] >= 0]
        root, base = np.empty(len(self.joins), np.int64), np.empty(len(self.joins), np.int64)
        for number, i in enumerate(rest):
            for member, offset in self.inside[i]:
                root[member], base[member] = number, offset
        lower, upper = ([self.times[ends[i]] for i in rest] for ends in (self.begin, self.end))
        return Reduced(make_storage(lower, upper, [self.size[i] for i in rest]), root, base)

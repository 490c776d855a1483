"""Addresses at once: first fit in several orders, and the lowest place first.

First fit takes buffers in a given order and puts each into the lowest gap between its placed neighbours (or the
tightest: best fit). `lowest_first` goes the other way round: it takes the lowest place of the skyline and looks for the
buffer that fills it best, which suits many buffers, since it never looks at pairs (the best-fit heuristic of strip
packing, Burke et al. 2004, with the horizontal position given).
"""

import heapq
from typing import Any

import numpy as np

from ..jit.compiled import compiled
from .canonical import Instance
from .problem import FREE, Storage

ORDERS = ("size", "area", "lifetime", "crowd", "start")


@compiled(nogil=True)
def _first_fit(size, pin, near_start, near, alignment, order, best):  # pragma: no cover
    """Offsets of buffers placed one after the other, pinned ones first; into the tightest gap if `best`."""
    count = len(size)
    offset = pin.copy()
    placed = pin >= 0
    for x in range(count):
        i = order[x]
        if placed[i]:
            continue
        many = 0
        here = np.empty(near_start[i + 1] - near_start[i], np.int64)
        for k in range(near_start[i], near_start[i + 1]):
            if placed[near[k]]:
                here[many] = near[k]
                many += 1
        here = here[:many]
        here = here[np.argsort(offset[here])]
        floor, chosen, room = 0, -1, np.int64(2**62)
        for j in here:
            gap = offset[j] - floor
            if gap >= size[i] and gap < room:
                chosen, room = floor, gap
                if not best:
                    break
            floor = max(floor, -(-(offset[j] + size[j]) // alignment) * alignment)
        offset[i] = floor if chosen < 0 else chosen
        placed[i] = True
    return offset


def first_fit(storage: Storage, instance: Instance, order: str, best: bool = False) -> np.ndarray:
    """Offsets by first fit, or best fit, in one of ORDERS, largest (or earliest) first."""
    width = instance.end - instance.begin
    crowd = np.diff(instance.near_start)
    keys = {
        "size": (storage.size, width), "area": (storage.size * width, storage.size), "lifetime": (width, storage.size),
        "crowd": (storage.size * crowd, width), "start": (-instance.begin, storage.size),
    }[order]  # fmt: skip
    return fit_in_order(storage, instance, np.lexsort([-key for key in reversed(keys)]), best)


def fit_in_order(storage: Storage, instance: Instance, order: np.ndarray, best: bool = False) -> np.ndarray:
    """Offsets of buffers placed in an order, pinned ones before all, each into the lowest gap, or the tightest.

    In the order of a packing's own offsets, no buffer comes to lie higher than it did.
    """
    return _first_fit(storage.size, storage.pin, instance.near_start, instance.near, storage.alignment, order, best)


def lowest_first(storage: Storage) -> np.ndarray:
    """Offsets by the lowest place first; each buffer takes its whole time from its first span to its last.

    Raises:
        ValueError: some buffer is pinned.
    """
    if (storage.pin != FREE).any():
        raise ValueError("lowest_first places no pinned buffers")
    return _lowest_first(storage.padded, *storage.hull, storage.sections[2])


@compiled()
def _unlink(i, head, after, before, slot):  # pragma: no cover
    """Take buffer i out of the list of its slot."""
    if before[i] >= 0:
        after[before[i]] = after[i]
    else:
        head[slot] = after[i]
    if after[i] >= 0:
        before[after[i]] = before[i]


@compiled(nogil=True)
def _lowest_first(size, begin, end, sections):  # pragma: no cover
    """The skyline is a list of segments: `right[s]` ends the one that starts at s, `height[s]` is its height.

    Buffers wait in lists by first section and by last, longest first; a tree over first sections has the earliest end
    of any buffer that waits there, to find one that lies inside a segment.
    """
    count = len(size)
    offset = np.zeros(count, np.int64)
    order = np.argsort((end - begin) * 1.0 + size / (size.max() + 1.0))  # shortest first: pushed to the front of the lists
    head, after, before = np.full(sections, -1), np.full(count, -1), np.full(count, -1)
    tail, later, sooner = np.full(sections + 1, -1), np.full(count, -1), np.full(count, -1)
    leaves = 1
    while leaves < sections:
        leaves *= 2
    tree = np.full(2 * leaves, sections + 1)
    for i in order:
        b, e = begin[i], end[i]
        after[i] = head[b]
        if head[b] >= 0:
            before[head[b]] = i
        head[b] = i
        later[i] = tail[e]
        if tail[e] >= 0:
            sooner[tail[e]] = i
        tail[e] = i
        tree[leaves + b] = min(tree[leaves + b], e)
    for node in range(leaves - 1, 0, -1):
        tree[node] = min(tree[2 * node], tree[2 * node + 1])
    height, right, left = np.zeros(sections, np.int64), np.full(sections, -1), np.full(sections + 1, -1)
    right[0], left[sections] = sections, 0
    heap: list[Any] = [(np.int64(0), np.int64(0), np.int64(sections))]
    waiting = count
    while waiting > 0:
        level, s, e = heapq.heappop(heap)
        if right[s] != e or height[s] != level:
            continue
        chosen = np.int64(-1)
        i = head[s]
        while i >= 0 and chosen < 0:  # starts where the segment does, the longest that fits
            if end[i] <= e:
                chosen = i
            i = after[i]
        if chosen < 0 or end[chosen] != e:
            i = tail[e]
            while i >= 0 and begin[i] < s:
                i = later[i]
            if i >= 0 and (chosen < 0 or end[i] - begin[i] > end[chosen] - begin[chosen]):
                chosen = i
        if chosen < 0:  # any inside: the first one that ends early enough
            node, low, span = 1, 0, leaves
            stack = [(np.int64(1), np.int64(0), np.int64(leaves))]
            while len(stack) and chosen < 0:
                node, low, span = stack.pop()
                if low >= e or low + span <= s or tree[node] > e:
                    continue
                if span == 1:
                    i = head[low]
                    while i >= 0 and end[i] > e:
                        i = after[i]
                    chosen = i
                else:
                    stack.append((2 * node + 1, low + span // 2, span // 2))
                    stack.append((2 * node, low, span // 2))
        if chosen < 0:  # nothing fits: fill the segment up to its lower wall, and join it with what is there
            walls = np.int64(2**62)
            if s > 0:
                walls = height[left[s]]
            if e < sections:
                walls = min(walls, height[e])
            b, f = s, e
            if s > 0 and height[left[s]] == walls:
                b = left[s]
            if e < sections and height[e] == walls:
                f = right[e]
            right[s] = -1
            if e < sections and f != e:
                right[e] = -1
            right[b], left[f], height[b] = f, b, walls
            heapq.heappush(heap, (walls, b, f))
            continue
        i, waiting = chosen, waiting - 1
        offset[i] = level
        _unlink(i, head, after, before, begin[i])
        _unlink(i, tail, later, sooner, end[i])
        node = leaves + begin[i]
        least = np.int64(sections + 1)
        k = head[begin[i]]
        while k >= 0:
            least = min(least, end[k])
            k = after[k]
        tree[node] = least
        node //= 2
        while node > 0:
            tree[node] = min(tree[2 * node], tree[2 * node + 1])
            node //= 2
        b, f, top = begin[i], end[i], level + size[i]
        if b > s:
            right[s], left[b] = b, s
            heapq.heappush(heap, (level, s, b))
        if f < e:
            right[f], left[e], height[f] = e, f, level
            heapq.heappush(heap, (level, f, e))
        height[b], right[b] = top, f
        left[f] = b
        if b > 0 and height[left[b]] == top:  # equal neighbours are one segment
            a = left[b]
            right[b] = -1
            right[a], left[f] = f, a
            b = a
        if f < sections and height[f] == top:
            g = right[f]
            right[f] = -1
            right[b], left[g] = g, b
            f = g
        heapq.heappush(heap, (top, b, f))
    return offset

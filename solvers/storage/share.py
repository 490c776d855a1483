"""Buffers that may lie in the bytes of another, because an op writes the one in place of the other.

At the op both are live, so apart they need room for both; together they are one buffer that lives as long as both do.
Together is not always better: a long life is harder to place. With few such pairs every choice is tried, which is exact;
with many, all together, all apart, and random choices until the time is up.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from .allocate import pins_clash
from .problem import FREE, NO_PEAK, Answer, Limit, Packing, Status, Storage, Way, peak_of

FEW = 4  # pairs, of which every choice is tried
RANDOM = 64  # choices tried of more, at most


def pack_sharing(storage: Storage, over: np.ndarray, way: Way, limit: Limit) -> Packing:
    """Addresses where buffer i may lie exactly where `over[i]` lies, although both are live when i begins.

    Args:
        storage: the problem; a pair has equal sizes.
        over: for each buffer the one it may be written over, which began before it, or -1; shape (n,). No two name one.
        way: packs a problem.
        limit: its seconds are for all choices together.

    Returns:
        UNKNOWN, with no offsets, where nothing was found and it was not proven of every choice that there is
        nothing; the bound is on every choice.
    """
    pairs = np.flatnonzero(over >= 0)
    if not len(pairs):
        return way(storage, limit)
    least = clipped(storage, over)
    floor, capacity = least.bound, limit.bytes
    if pins_clash(least) is not None or (capacity is not None and floor > capacity):
        return Answer(Status.INFEASIBLE, floor, None, "bound")
    until, goal = time.monotonic() + limit.seconds, floor if capacity is None else capacity
    best, peak, method = None, NO_PEAK, "bound"
    lowest, refused = NO_PEAK, len(pairs) <= FEW  # the bound of what was tried, and whether nothing else is left
    tries = list(choices(len(pairs), limit.seed))
    for number, chosen in enumerate(tries):
        left = until - time.monotonic()
        if number > 1 and left <= 0:
            refused = False
            break
        whole, root = joined(storage, over, pairs[chosen])
        if whole is None:
            continue
        found = way(whole, replace(limit, seconds=max(left, 0.0) / min(len(tries) - number, 4)))
        if found.status is not Status.INFEASIBLE:
            refused = False
        if found.status is not Status.INFEASIBLE or capacity is not None:  # else its pins clash, and it has no peak
            lowest = min(lowest, found.bound)
        if found.best is not None and peak_of(whole, found.best) < peak:
            best, peak = found.best[root], peak_of(whole, found.best)
            method = f"{int(np.sum(chosen))} of {len(pairs)} in place, {found.method}"
        if peak <= goal:
            break
    else:
        if len(pairs) <= FEW and lowest < NO_PEAK:  # every choice was tried
            floor = max(floor, lowest)
    if best is not None and (capacity is None or peak <= capacity):
        done = capacity is not None or peak <= floor
        return Answer(Status.OPTIMAL if done else Status.FEASIBLE, floor, best, method)
    return Answer(Status.INFEASIBLE if refused else Status.UNKNOWN, floor, best, method)


def choices(pairs: int, seed: int) -> Iterator[np.ndarray]:
    """Which pairs share, as masks: all, none, and then every other choice or random ones."""
    yield np.ones(pairs, bool)
    yield np.zeros(pairs, bool)
    if pairs <= FEW:
        for mask in product((True, False), repeat=pairs):
            if 0 < sum(mask) < pairs:
                yield np.array(mask)
        return
    random = np.random.default_rng(seed)
    for _ in range(RANDOM):
        yield random.random(pairs) < random.random()


def spans_of(storage: Storage, i: int, until: int) -> list[tuple[int, int]]:
    """The spans of a buffer as far as a moment."""
    rows = range(storage.start[i], storage.start[i + 1])
    spans = [(int(storage.lower[row]), min(int(storage.upper[row]), until)) for row in rows]
    return [(low, high) for low, high in spans if low < high]


def clipped(storage: Storage, over: np.ndarray) -> Storage:
    """The problem in which what may be written over ends when that happens: it needs no more than any choice does."""
    return rebuilt(storage, [[i] for i in range(len(storage))], over, np.flatnonzero(over >= 0), storage.pin)


def joined(storage: Storage, over: np.ndarray, pairs: np.ndarray) -> tuple[Storage | None, np.ndarray]:
    """The problem in which these pairs are one buffer each, None if their pins differ; and where each buffer went."""
    into = {int(i): int(over[i]) for i in pairs}
    heads = [i for i in range(len(storage)) if i not in into]
    after = {old: new for new, old in into.items()}
    groups, root = [], np.empty(len(storage), np.int64)
    pins = np.full(len(heads), FREE, np.int64)
    for number, head in enumerate(heads):
        group = [head]
        while group[-1] in after:
            group.append(after[group[-1]])
        fixed = set(storage.pin[group].tolist()) - {FREE}
        if len(fixed) > 1:
            return None, root
        pins[number] = fixed.pop() if fixed else FREE
        root[group] = number
        groups.append(group)
    return rebuilt(storage, groups, over, pairs, pins), root


def rebuilt(storage: Storage, groups: list[list[int]], over: np.ndarray, pairs: np.ndarray, pins: np.ndarray) -> Storage:
    """The problem of groups of buffers, each of which ends where the next one of these pairs is written over it."""
    ends = np.full(len(storage), NO_PEAK)  # a time after any
    ends[over[pairs]] = storage.lower[storage.start[pairs]]
    start, spans = [0], []
    for group in groups:
        first = len(spans)
        for i in group:
            for low, high in spans_of(storage, i, int(ends[i])):
                if len(spans) > first and spans[-1][1] == low:
                    spans[-1] = spans[-1][0], high
                else:
                    spans.append((low, high))
        start.append(len(spans))
    times = np.array(spans, np.int64).reshape(-1, 2)
    size = storage.size[[group[0] for group in groups]]
    return Storage(size, np.array(start, np.int64), times[:, 0].copy(), times[:, 1].copy(), pins, storage.alignment)

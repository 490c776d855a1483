"""Storage problems to draw, and the obvious ways to check and to solve them."""

from itertools import permutations

import numpy as np
from hypothesis import strategies as st
from memplan.solvers.storage.problem import FREE, Storage


def make(size, spans, pin=None, alignment=1) -> Storage:
    """A problem from lists: sizes, and for each buffer its (lower, upper) pairs."""
    start = np.concatenate([[0], np.cumsum([len(pieces) for pieces in spans])]).astype(np.int64)
    times = np.array([piece for pieces in spans for piece in pieces], np.int64).reshape(-1, 2)
    pins = np.full(len(size), FREE, np.int64) if pin is None else np.array(pin, np.int64)
    return Storage(np.array(size, np.int64), start, times[:, 0].copy(), times[:, 1].copy(), pins, alignment)


@st.composite
def storages(draw, most=7, pins=True, gaps=True, empty=True) -> Storage:
    """Small problems: gaps in lifetimes, alignment, pinned buffers, buffers that are empty, sizes of terabytes."""
    count = draw(st.integers(1, most))
    alignment = draw(st.sampled_from([1, 1, 4]))
    scale = draw(st.sampled_from([1, 1, 1, 2**40, 2**40 + 1]))
    size = [scale * each for each in draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))]
    if empty and draw(st.booleans()):
        for index in draw(st.sets(st.integers(0, count - 1), max_size=3)):
            size[index] = 0
    spans = []
    for _ in range(count):
        many = 2 * draw(st.integers(1, 2 if gaps else 1))
        times = sorted(draw(st.lists(st.integers(0, 9), min_size=many, max_size=many, unique=True)))
        spans.append(list(zip(times[::2], times[1::2], strict=True)))
    pin = [FREE] * count
    if pins and draw(st.booleans()):
        for index in draw(st.sets(st.integers(0, count - 1), max_size=2)):
            pin[index] = alignment * draw(st.integers(0, 4)) * (scale if draw(st.booleans()) else 1)
    return make(size, spans, pin, alignment)


def meet(storage: Storage, i: int, j: int) -> bool:
    """Whether two buffers are live at one time."""

    def spans(k):
        return range(storage.start[k], storage.start[k + 1])

    return any(storage.lower[a] < storage.upper[b] and storage.lower[b] < storage.upper[a] for a in spans(i) for b in spans(j))


def faults(storage: Storage, offset) -> list[str]:
    """Everything wrong with a packing."""
    found = []
    for i in range(len(storage)):
        if offset[i] < 0 or offset[i] % storage.alignment or storage.pin[i] not in (FREE, offset[i]):
            found.append(f"{i} at {offset[i]}")
        for j in range(i):
            apart = not storage.size[i] or not storage.size[j]  # what is empty touches no byte
            apart |= offset[i] + storage.size[i] <= offset[j] or offset[j] + storage.size[j] <= offset[i]
            if not apart and meet(storage, i, j):
                found.append(f"{i} and {j} overlap")
    return found


def solid(storage: Storage) -> Storage:
    """The problem of the buffers that are not empty."""
    return storage.take(np.flatnonzero(storage.size))


def smallest_peak(storage: Storage) -> int | None:
    """By trying every order, each buffer at the lowest offset that is free; None if the pinned ones overlap."""
    storage = solid(storage)
    count = len(storage)
    fixed = [i for i in range(count) if storage.pin[i] != FREE]
    if faults(storage.take(np.array(fixed, np.int64)), storage.pin[fixed]):
        return None
    near = [[meet(storage, i, j) for j in range(count)] for i in range(count)]
    best = None
    for order in permutations(i for i in range(count) if storage.pin[i] == FREE):
        offset = {i: int(storage.pin[i]) for i in fixed}
        for i in order:
            at = 0
            others = sorted((offset[j], offset[j] + int(storage.size[j])) for j in offset if near[i][j])
            for low, high in others:
                if at + storage.size[i] > low and at < high:
                    at = -(-high // storage.alignment) * storage.alignment
            offset[i] = at
        peak = max((offset[i] + int(storage.size[i]) for i in range(count)), default=0)
        best = peak if best is None else min(best, peak)
    return best

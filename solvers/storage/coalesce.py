"""Buffers that fit one another exactly become one: fewer, larger buffers with the same loads.

Two buffers with one lifetime stack; of two with one size, the second of which is made when the first is freed, the
second takes the first's place. Applied until nothing fits, this undoes the cuts that a rectangle was cut by, and finds
runs of equal temporaries in a trace. It may cost freedom, so a packing of what remains is one answer of several.
"""

import numpy as np

from .problem import FREE, Storage


def coalesce(storage: Storage) -> tuple[Storage, np.ndarray, np.ndarray]:
    """Join what fits exactly; buffers with several spans or a pin stay as they are.

    Returns:
        The problem of what remains; for each buffer the one of the rest it lies in; and its offset in there.
    """
    many = len(storage)
    single = (np.diff(storage.start) == 1) & (storage.pin == FREE)
    lower = storage.lower[storage.start[:-1]].tolist()
    upper = storage.upper[storage.start[1:] - 1].tolist()
    size, raw = storage.padded.tolist(), storage.size.tolist()  # `raw`: to the end of the topmost, which needs no padding
    into, shift = list(range(many)), [0] * many
    same: dict[tuple[int, int], int] = {}
    from_here: dict[tuple[int, int], int] = {}
    to_here: dict[tuple[int, int], int] = {}
    work = np.flatnonzero(single)[::-1].tolist()
    while work:
        i = work.pop()
        life, begins, ends = (lower[i], upper[i]), (size[i], lower[i]), (size[i], upper[i])
        if (j := same.get(life)) is not None:
            forget(j, lower, upper, size, same, from_here, to_here)
            into[j], shift[j] = i, size[i]
            raw[i] = size[i] + raw[j]
            size[i] += size[j]
        elif (j := to_here.get(begins)) is not None or (j := from_here.get(ends)) is not None:
            forget(j, lower, upper, size, same, from_here, to_here)
            into[j] = i
            raw[i] = max(raw[i], raw[j])
            lower[i], upper[i] = min(lower[i], lower[j]), max(upper[i], upper[j])
        else:
            same[life] = i
            from_here.setdefault(begins, i)
            to_here.setdefault(ends, i)
            continue
        work.append(i)
    rest = np.array([i for i in range(many) if into[i] == i], np.int64)
    root, base = np.arange(many), np.zeros(many, np.int64)
    for i in range(many):
        path = []
        while into[i] != i:
            path.append(i)
            i = into[i]
        at = 0
        for j in reversed(path):
            at += shift[j]
            root[j], base[j] = i, at
            into[j], shift[j] = i, at
    place = np.full(many, -1)
    place[rest] = np.arange(len(rest))
    lower, upper, raw = (np.array(each, np.int64)[rest] for each in (lower, upper, raw))
    small = respan(storage.take(rest), single[rest], lower, upper, raw)
    return small, place[root], base


def forget(
    j: int, lower: list[int], upper: list[int], size: list[int],
    same: dict[tuple[int, int], int], from_here: dict[tuple[int, int], int], to_here: dict[tuple[int, int], int],
) -> None:  # fmt: skip
    """Take a buffer out of the indexes."""
    for index, key in ((same, (lower[j], upper[j])), (from_here, (size[j], lower[j])), (to_here, (size[j], upper[j]))):
        if index.get(key) == j:
            del index[key]


def respan(storage: Storage, changed: np.ndarray, lower: np.ndarray, upper: np.ndarray, size: np.ndarray) -> Storage:
    """The same problem where the `changed` buffers, of one span each, have other lifetimes and sizes."""
    new_lower, new_upper, new_size = storage.lower.copy(), storage.upper.copy(), storage.size.copy()
    spans = storage.start[:-1][changed]
    new_lower[spans], new_upper[spans], new_size[changed] = lower[changed], upper[changed], size[changed]
    return Storage(new_size, storage.start, new_lower, new_upper, storage.pin, storage.alignment)

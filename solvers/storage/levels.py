"""Addresses on two levels: equal blocks are packed once, and the whole with one request for each block.

This is MEMO's memory plan (arXiv 2407.12117, section 4.2), with blocks found in the lifetimes (`repeat.py`) in place of
layers told by name. A block's request is a rectangle of its peak for as long as it runs, which wastes what the block does
not use of it. Then, to win that back, all buffers slide down, lowest first, into the lowest gap that each fits.
"""

from typing import NamedTuple

import numpy as np

from .canonical import make_instance
from .greedy import fit_in_order
from .problem import FREE, Limit, Storage, Way, peak_of
from .repeat import Repeat, find_repeats


class Levels(NamedTuple):
    """What packing on two levels came to.

    Attributes:
        offset: addresses after the repair.
        blocks: how many blocks there were, and how many different ones had to be packed.
        members: buffers that lie in blocks.
        rigid: the peak before the repair.
    """

    offset: np.ndarray
    blocks: tuple[int, int]
    members: int
    rigid: int


def pack_levels(storage: Storage, way: Way, seconds: float, repair: bool = True) -> Levels | None:
    """Addresses by equal blocks; None where nothing repeats, or no level has a packing.

    Args:
        storage: the problem.
        way: packs one level.
        seconds: for both levels together: half for the blocks, half for the whole.
        repair: let buffers slide down; it looks at all pairs of buffers that are live at once.
    """
    repeats = find_repeats(storage)
    if not repeats:
        return None
    shapes = [storage.take(repeat.members[0]) for repeat in repeats]
    known: dict[bytes, np.ndarray | None] = {}
    inner: list[np.ndarray] = []
    for shape in shapes:
        first, last, _ = shape.sections
        pattern = np.stack([first, last, shape.size]).tobytes()
        if pattern not in known:
            known[pattern] = way(shape, Limit(seconds=seconds / 2 / len(shapes))).best
        packed = known[pattern]
        if packed is None:
            return None
        inner.append(packed)
    outer, rest = outer_problem(storage, repeats, [peak_of(*pair) for pair in zip(shapes, inner, strict=True)])
    found = way(outer, Limit(seconds=seconds / 2)).best
    if found is None:
        return None
    offset = np.empty(len(storage), np.int64)
    offset[rest] = found[: len(rest)]
    at = len(rest)
    for repeat, placed in zip(repeats, inner, strict=True):
        blocks = len(repeat.members)
        offset[repeat.members] = found[at : at + blocks, None] + placed
        at += blocks
    rigid = peak_of(storage, offset)
    if repair:
        offset = fit_in_order(storage, make_instance(storage), np.lexsort([storage.size, offset]))
    blocks = sum(len(repeat.members) for repeat in repeats)
    return Levels(offset, (blocks, len(known)), len(storage) - len(rest), rigid)


def outer_problem(storage: Storage, repeats: list[Repeat], peaks: list[int]) -> tuple[Storage, np.ndarray]:
    """The problem of the buffers outside of blocks, then one request for each block; and which buffers those are."""
    inside = np.zeros(len(storage), bool)
    for repeat in repeats:
        inside[repeat.members] = True
    rest = np.flatnonzero(~inside)
    kept = storage.take(rest)
    span = storage.start[:-1]
    lower = np.concatenate([storage.lower[span[repeat.members]].min(1) for repeat in repeats])
    upper = np.concatenate([storage.upper[span[repeat.members]].max(1) for repeat in repeats])
    size = np.repeat(peaks, [len(repeat.members) for repeat in repeats])
    start = np.concatenate([kept.start, kept.start[-1] + np.arange(1, len(size) + 1)])
    return Storage(
        np.concatenate([kept.size, size]), start, np.concatenate([kept.lower, lower]), np.concatenate([kept.upper, upper]),
        np.concatenate([kept.pin, np.full(len(size), FREE)]), storage.alignment,
    ), rest  # fmt: skip

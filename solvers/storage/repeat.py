"""Blocks of buffers that come again, one after the other: the layers of a network, in a list of lifetimes.

Each section of time has a *signature*, the sizes of what begins and what ends there. A stretch of time in which the
signature of section s is that of section s + p, for at least p sections, repeats with period p. It is cut into blocks
where the fewest bytes of short lives cross, and the members of a block are the buffers that live within it and come
at the same place in all of them; what lives across blocks (kept activations) is no member.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from .problem import FREE, Storage

PERIODS = 12  # that are tried, the likeliest ones
PHASES = 4  # likewise
SHORTEST = 4  # sections of a block

Stretch = tuple[int, int, int]  # first section, the one after the last, and the period


class Repeat(NamedTuple):
    """Equal blocks.

    Attributes:
        members: buffers, shape (blocks, buffers of a block); those of a column are alike.
        cuts: the section at which each block begins, and the one after the last block; shape (blocks + 1,).
    """

    members: np.ndarray
    cuts: np.ndarray


def find_repeats(storage: Storage) -> list[Repeat]:
    """The blocks of a problem, the longest repetition first; repetitions share no time."""
    begin, end = storage.hull
    sections = storage.sections[2]
    free = (np.diff(storage.start) == 1) & (storage.pin == FREE)
    signature = signatures(storage, begin, end, sections)
    found = []
    while (stretch := longest_stretch(signature)) is not None:
        low, high, period = stretch
        short = free & (end - begin <= period)
        repeat = block_members(storage.size, begin, end, np.flatnonzero(short), stretch)
        if repeat.members.shape[1] > 1:
            found.append(repeat)
            free[repeat.members] = False
            low, high = max(min(low, repeat.cuts[0]), 0), min(max(high, repeat.cuts[-1]), sections)
        signature[low:high] = -np.arange(low + 1, high + 1)  # like nothing else
    return found


def block_members(size: np.ndarray, begin: np.ndarray, end: np.ndarray, short: np.ndarray, stretch: Stretch) -> Repeat:
    """The blocks of a stretch with the most members, and one more at either end, where the edge has hidden one."""
    found = []
    for cuts in choose_cuts(size[short], begin[short], end[short], stretch):
        repeat = Repeat(common_members(size, begin, end, short, cuts), cuts)
        for before, after in ((1, 0), (0, 1)):
            cuts = np.arange(repeat.cuts[0] - before * stretch[2], repeat.cuts[-1] + after * stretch[2] + 1, stretch[2])
            more = common_members(size, begin, end, short, cuts)
            if more.shape[1] == repeat.members.shape[1]:
                repeat = Repeat(more, cuts)
        found.append(repeat)
    return max(found, key=lambda repeat: repeat.members.size)


def signatures(storage: Storage, begin: np.ndarray, end: np.ndarray, sections: int) -> np.ndarray:
    """A number for each section that tells the multisets of sizes that begin and end there, shape (sections,)."""
    _, kind = np.unique(storage.size, return_inverse=True)
    salt = np.random.default_rng(0).integers(1, 2**60, (2, kind.max(initial=0) + 1))
    total = np.zeros(sections + 1, np.int64)
    np.add.at(total, begin, salt[0][kind])  # sums wrap around, which is as good a hash
    np.add.at(total, end, salt[1][kind])
    return np.unique(total[:sections], return_inverse=True)[1].astype(np.int64)


def longest_stretch(signature: np.ndarray) -> Stretch | None:
    """The stretch that repeats and saves the most, or None."""
    order = np.argsort(signature, kind="stable")
    gaps = np.diff(order)[signature[order][1:] == signature[order][:-1]]
    votes = Counter(gaps[gaps >= SHORTEST].tolist())
    likely = sorted(votes, key=lambda gap: -votes[gap] * gap)[:PERIODS]
    best, saved = None, 0
    for period in sorted(likely):
        same = np.concatenate([[False], signature[:-period] == signature[period:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        for low, high in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            blocks = (high - low) // period + 1
            if blocks > 1 and (blocks - 1) * period > saved:
                best, saved = (low, high + period, period), (blocks - 1) * period
    return best


def choose_cuts(size: np.ndarray, begin: np.ndarray, end: np.ndarray, stretch: Stretch) -> list[np.ndarray]:
    """Where blocks may begin: at the phases at which these buffers lie across the cuts with the fewest bytes."""
    low, high, period = stretch
    change = np.zeros(high + 2, np.int64)
    np.add.at(change, np.minimum(begin + 1, high + 1), size)
    np.subtract.at(change, np.minimum(end, high + 1), size)
    crossing = np.cumsum(change)
    most = (high - low) // period
    choices = []
    for phase in range(min(period, high - low - period)):
        blocks = (high - low - phase) // period
        if blocks >= max(2, most - 1):
            cuts = low + phase + period * np.arange(blocks + 1)
            choices.append((crossing[cuts[1:-1]].mean(), -blocks, -phase, cuts))  # late: the first section of all is hidden
    return [choice[3] for choice in sorted(choices, key=lambda choice: choice[:3])[:PHASES]]


def common_members(
    size: np.ndarray, begin: np.ndarray, end: np.ndarray, candidates: np.ndarray, cuts: np.ndarray
) -> np.ndarray:
    """Of the candidates, those that live in a block and have their like in every other; shape (blocks, buffers)."""
    blocks = len(cuts) - 1
    block = np.searchsorted(cuts, begin[candidates], side="right") - 1
    inside = (block >= 0) & (block < blocks)
    inside[inside] &= end[candidates[inside]] <= cuts[block[inside] + 1]
    order = np.argsort(block[inside], kind="stable")
    mine, block = candidates[inside][order], block[inside][order]
    places: dict[tuple[int, int, int, int], list[int]] = {}
    seen: Counter[tuple[int, ...]] = Counter()
    for i, k in zip(mine.tolist(), block.tolist(), strict=True):
        like = int(begin[i] - cuts[k]), int(end[i] - cuts[k]), int(size[i])
        places.setdefault((*like, seen[k, *like]), []).append(i)
        seen[k, *like] += 1
    rows = [members for _, members in sorted(places.items()) if len(members) == blocks]
    return np.array(rows, np.int64).reshape(-1, blocks).T

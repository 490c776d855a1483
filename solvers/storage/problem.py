"""Dynamic storage allocation: addresses for buffers whose lifetimes are known.

Each buffer is live during one or more half-open spans of time and wants `size` consecutive bytes at an offset that no
buffer live at the same time touches. `Storage` is the problem and `Packing` the answer of every solver; times are
compressed to *sections*, the intervals between neighbouring events, since only their order matters. `fault` checks a packing
and `peak_of` scores it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import TypeAlias

import numpy as np

from ..face.answer import Answer, Limit, Status

FREE = -1  # the pin of a buffer that may lie anywhere
LIMIT = 2**62  # bytes: a problem has to be smaller, so that no sum of sizes and offsets overflows
NO_PEAK = 2**63 - 1  # the peak of no packing at all: above any


@dataclass(frozen=True)
class Storage:
    """Buffers that want addresses in one pool. One that is empty touches no bytes, so is in nobody's way wherever it lies.

    Attributes:
        size: bytes of each buffer, shape (n,), int64, not negative.
        start: buffer i is live during spans `start[i]` to `start[i + 1]`, shape (n + 1,).
        lower: when each span begins, ascending within a buffer and not touching, int64.
        upper: when each span ends, exclusive.
        pin: the offset at which a buffer must lie, or FREE, shape (n,), int64.
        alignment: every offset is a multiple of it.

    Raises:
        ValueError: none of the above, or LIMIT bytes and more; the buffer is named by its number.
    """

    size: np.ndarray
    start: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    pin: np.ndarray
    alignment: int = 1

    def __post_init__(self) -> None:
        owner = self.owner
        touching = (owner[1:] == owner[:-1]) & (self.lower[1:] <= self.upper[:-1])
        for wrong, what in (
            (np.flatnonzero(self.size < 0), "has a negative size"),
            (np.flatnonzero(np.diff(self.start) < 1), "is never live"),
            (owner[self.lower >= self.upper], "has an empty span"),
            (owner[1:][touching], "has spans that touch or are out of order"),
            (np.flatnonzero(self.pin < FREE), "is pinned below 0"),
            (np.flatnonzero((self.pin != FREE) & (self.pin % self.alignment > 0)), "is pinned to no multiple of its alignment"),
        ):
            if len(wrong):
                raise ValueError(f"buffer {int(wrong[0])} {what}")
        if (room := room_for_all(self.size, self.pin, self.alignment)) >= LIMIT:
            raise ValueError(f"buffers that may take {room} bytes are too many: 2^62 is the limit")

    def __len__(self) -> int:
        return len(self.size)

    @cached_property
    def sections(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The first section of each span, the section after its last, and the number of sections."""
        times = np.unique(np.concatenate([self.lower, self.upper]))
        first, last = np.searchsorted(times, self.lower), np.searchsorted(times, self.upper)
        return first.astype(np.int64), last.astype(np.int64), max(len(times) - 1, 0)

    @cached_property
    def hull(self) -> tuple[np.ndarray, np.ndarray]:
        """The first section of each buffer's first span, and the one after its last span's last."""
        first, last, _ = self.sections
        return first[self.start[:-1]], last[self.start[1:] - 1]

    @cached_property
    def owner(self) -> np.ndarray:
        """The buffer of each span."""
        return np.repeat(np.arange(len(self)), np.diff(self.start))

    @cached_property
    def padded(self) -> np.ndarray:
        """Sizes rounded up to the alignment."""
        return -(-self.size // self.alignment) * self.alignment

    @cached_property
    def load(self) -> np.ndarray:
        """Live bytes in each section, each buffer padded to the alignment."""
        return self.sum_live(self.padded)

    @cached_property
    def bound(self) -> int:
        """A lower bound on any peak: the largest load (its topmost buffer needs no padding), and the ends of pinned buffers."""
        slack = int((self.padded - self.size).max(initial=0))
        pinned = (self.pin + self.size)[(self.pin != FREE) & (self.size > 0)]
        live = int(self.sum_live(self.size).max(initial=0))
        return max(live, int(self.load.max(initial=0)) - slack, int(pinned.max(initial=0)))

    @cached_property
    def unit(self) -> int:
        """What divides every offset and the peak of a packing in which each buffer rests on the ground or on another."""
        pins = self.pin[self.pin != FREE]
        return int(np.gcd.reduce(np.concatenate([self.padded, self.size, pins, [0]])) or 1)

    def sum_live(self, amount: np.ndarray) -> np.ndarray:
        """The sum over live buffers of an amount, for each section."""
        first, last, count = self.sections
        change = np.zeros(count + 1, np.int64)
        np.add.at(change, first, amount[self.owner])
        np.subtract.at(change, last, amount[self.owner])
        return np.cumsum(change)[:count]

    def take(self, members: np.ndarray) -> "Storage":
        """The problem of some of the buffers, in the given order."""
        counts = np.diff(self.start)[members]
        start = np.concatenate([[0], np.cumsum(counts)])
        spans = np.repeat(self.start[members] - start[:-1], counts) + np.arange(start[-1])
        return Storage(self.size[members], start, self.lower[spans], self.upper[spans], self.pin[members], self.alignment)


Packing: TypeAlias = Answer[np.ndarray, int]
"""The best is the offset of each buffer, shape (n,), int64; the bound is of peaks. Asked to fit, it is OPTIMAL if it does, else
INFEASIBLE or UNKNOWN; asked for the smallest peak, OPTIMAL or FEASIBLE, and INFEASIBLE where pinned buffers overlap."""
Way: TypeAlias = Callable[[Storage, Limit], Packing]


def room_for_all(size: np.ndarray, pin: np.ndarray, alignment: int) -> int:
    """Bytes in which everything fits, one buffer above the other and above what is pinned; exact, however many they are."""
    slots = -(-size // alignment)
    low = 2**31 - 1  # summed in halves, neither of which can overflow
    many = (int((slots >> 31).sum()) << 31) + int((slots & low).sum())
    fixed = pin != FREE
    ends = pin[fixed].astype(np.uint64) + size[fixed].astype(np.uint64)  # of two numbers below 2^63, which do not overflow here
    return alignment * (many + -(-int(ends.max(initial=0)) // alignment))


def extended(storage: Storage, members: np.ndarray, packing: Packing) -> Packing:
    """The answer for all buffers from that for those that are not empty; the others lie at their pins, or at 0."""
    if packing.best is None:
        return packing
    offset = np.maximum(storage.pin, 0)
    offset[members] = packing.best
    return replace(packing, best=offset)


def without_empty(solve: Way) -> Way:
    """The same way for problems some of whose buffers are empty, or all."""

    @wraps(solve)
    def solid(storage: Storage, limit: Limit) -> Packing:
        members = np.flatnonzero(storage.size)
        if not len(members):
            return extended(storage, members, Answer(Status.OPTIMAL, 0, np.empty(0, np.int64), "nothing to place"))
        left = storage if len(members) == len(storage) else storage.take(members)
        return extended(storage, members, solve(left, limit))

    return solid


@dataclass(frozen=True)
class Reduced:
    """A smaller problem, and how its answer extends to all buffers: each lies in one of the smaller problem, at an offset."""

    storage: Storage
    root: np.ndarray
    base: np.ndarray

    def whole(self, offset: np.ndarray) -> np.ndarray:
        """Offsets of all buffers."""
        return offset[self.root] + self.base


def make_storage(
    lower: Sequence[int] | np.ndarray,
    upper: Sequence[int] | np.ndarray,
    size: Sequence[int] | np.ndarray,
    pin: Sequence[int] | np.ndarray | None = None,
    alignment: int = 1,
) -> Storage:
    """The problem of buffers that are each live during one span `[lower, upper)`."""
    count = len(size)
    return Storage(
        np.asarray(size, np.int64), np.arange(count + 1), np.asarray(lower, np.int64), np.asarray(upper, np.int64),
        np.full(count, FREE, np.int64) if pin is None else np.asarray(pin, np.int64), alignment,
    )  # fmt: skip


def peak_of(storage: Storage, offset: np.ndarray) -> int:
    """The end of the highest buffer that is not empty."""
    return int((offset + storage.size)[storage.size > 0].max(initial=0))


def fault(storage: Storage, offset: np.ndarray) -> str:
    """What is wrong with a packing, in words; empty where nothing is. It looks at every pair of spans."""
    for wrong, what in (
        (offset < 0, "lies below 0"),
        (offset % storage.alignment > 0, "lies at no multiple of the alignment"),
        ((storage.pin != FREE) & (offset != storage.pin), "does not lie where it is pinned"),
    ):
        if wrong.any():
            return f"buffer {int(wrong.argmax())} {what}"
    owner, solid = storage.owner, (storage.size > 0)[storage.owner]
    low, high = offset[owner], (offset + storage.size)[owner]
    for row in np.flatnonzero(solid):
        at_once = (storage.lower < storage.upper[row]) & (storage.lower[row] < storage.upper)
        clash = at_once & (low < high[row]) & (low[row] < high) & solid & (owner != owner[row])
        if clash.any():
            return f"buffers {int(owner[row])} and {int(owner[clash.argmax()])} share bytes"
    return ""


def ceiling(storage: Storage, capacity: int | None) -> int:
    """The highest peak worth looking at: the capacity, or that of everything stacked above what is pinned."""
    room = room_for_all(storage.size, storage.pin, storage.alignment)
    return room if capacity is None else min(capacity, room)


def verdict(storage: Storage, offset: np.ndarray, capacity: int | None, bound: int, method: str) -> Packing:
    """The answer of a way that found these offsets, and knows that no peak is below a bound."""
    peak = peak_of(storage, offset)
    done = peak <= (bound if capacity is None else capacity)
    status = Status.OPTIMAL if done else Status.FEASIBLE if capacity is None else Status.UNKNOWN
    return Answer(status, min(bound, peak), offset, method)

"""Addresses by every means: fast answers first, then exact search until the time is up or nothing is left to prove.

    greedy answers -> the same coalesced -> equal blocks packed once -> search -> what nearly fits merged -> search

Two searches run side by side. One takes the problem as it is and stays at the goal, the capacity asked for or the
lower bound: it finds a packing or proves that there is none, which raises the bound. The other takes the coalesced
problem, which is smaller by far where buffers fit one another, though it proves nothing; asked for the smallest peak, it
works downwards from the best known, by steps that grow with success and shrink with failure. Where the bound and the
best meet, the answer is optimal.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import numpy as np

from .canonical import MANY, NONE, SOLVED, PlacementSearch, make_instance
from .coalesce import coalesce
from .greedy import ORDERS, first_fit, lowest_first
from .levels import pack_levels
from .merge import WAYS, Merger
from .problem import FREE, LIMIT, NO_PEAK, Answer, Limit, Packing, Reduced, Status, Storage, extended, peak_of

PAIRS = 2e7  # buffers live at once, counted twice: with more, first fit is too slow and takes too much memory
SHARE = 0.25  # of the time, for packing on two levels
FIRST = 0.1  # of the time, for searching before anything is merged
JOINING = 6e-4  # seconds that merging takes for each buffer
MERGING = 0.3  # of the time, for merging and what it leads to
PART = 0.25  # of that, for one of the problems on the way
SLICE = 0.25  # seconds of search for one capacity, at first


def solve(storage: Storage, limit: Limit, blocks: bool = True, merge: bool = True) -> Packing:
    """Addresses for every buffer.

    Args:
        storage: the problem.
        limit: bytes to fit into, if any, and how long to search; the fast answers are made whatever it is.
        blocks: look for blocks that come again, and pack them once.
        merge: join buffers that nearly fit one another.
    """
    capacity = limit.bytes
    if not len(storage):
        return Answer(Status.OPTIMAL, 0, np.empty(0, np.int64), "nothing to place")
    if not storage.size.all():
        members = np.flatnonzero(storage.size)
        return extended(storage, members, solve(storage.take(members), limit, blocks, merge))
    if pins_clash(storage) is not None or (capacity is not None and storage.bound > capacity):
        return Answer(Status.INFEASIBLE, storage.bound, None, "bound")
    goal = storage.bound if capacity is None else min(capacity, LIMIT)
    work = Portfolio(storage, goal, capacity is not None, time.monotonic() + limit.seconds, limit.seed)
    work.answer_fast()
    if blocks and not work.done:
        work.answer_by_blocks()
    if merge and not work.done and work.can_merge:
        work.search(min(work.until, time.monotonic() + FIRST * limit.seconds))
        work.answer_merged()
    work.search(work.until)
    return work.packing(capacity)


@dataclass
class Portfolio:
    """One problem while several ways work on it, some side by side in threads; what one finds or proves, all know.

    Attributes:
        storage: the problem.
        goal: a peak at which to stop: the capacity, or the lower bound.
        fitting: the goal is a capacity, so that a higher bound ends it too.
        until: when to stop.
        seed: of the searches.
        best: offsets of the best packing known, or None.
        peak: of it.
        bound: no packing is known to be impossible at this peak.
        method: what found the best.
    """

    storage: Storage
    goal: int
    fitting: bool
    until: float
    seed: int
    best: np.ndarray | None = None
    peak: int = NO_PEAK
    bound: int = 0
    method: str = ""
    stop: np.ndarray = field(default_factory=lambda: np.zeros(1, np.bool_))
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.bound = self.storage.bound

    @property
    def done(self) -> bool:
        """Whether nothing is left to find."""
        return self.peak <= max(self.goal, self.bound) or (self.fitting and self.bound > self.goal)

    def packing(self, capacity: int | None) -> Packing:
        """The answer as it stands."""
        if capacity is None:
            status = Status.OPTIMAL if self.peak <= self.bound else Status.FEASIBLE
        elif self.peak <= capacity:
            status = Status.OPTIMAL
        else:
            status = Status.INFEASIBLE if self.bound > capacity else Status.UNKNOWN
        return Answer(status, self.bound, self.best, self.method)

    def offer(self, offset: np.ndarray, method: str) -> None:
        """Take a packing if it is the best."""
        with self.lock:
            peak = peak_of(self.storage, offset)
            if peak < self.peak:
                self.best, self.peak, self.method = offset, peak, method
            self.stop[0] = self.done

    def refute(self, capacity: int) -> None:
        """Take the proof that nothing fits a capacity."""
        with self.lock:
            unit = self.storage.unit
            self.bound = max(self.bound, (capacity // unit + 1) * unit)
            self.stop[0] = self.done

    def answer_fast(self) -> None:
        """The greedy answers, until one reaches the goal."""
        for offset, method in greedy(self.storage, self.small, self.until):
            self.offer(offset, method)
            if self.done:
                return

    def answer_by_blocks(self) -> None:
        """Equal blocks packed once, if there are any."""
        seconds = SHARE * (self.until - time.monotonic())
        levels = pack_levels(self.storage, solve, seconds, repair=pairs_of(self.storage) <= PAIRS)
        if levels is not None:
            self.offer(levels.offset, "two levels")

    @cached_property
    def small(self) -> Reduced:
        """The coalesced problem; the problem itself where buffers are pinned."""
        storage = self.storage
        if (storage.pin != FREE).any():
            return Reduced(storage, np.arange(len(storage)), np.zeros(len(storage), np.int64))
        return Reduced(*coalesce(storage))

    @property
    def can_merge(self) -> bool:
        """Whether joining what nearly fits is possible, and done in time."""
        plain = (self.storage.pin == FREE).all() and len(self.storage.lower) == len(self.storage)
        return bool(plain) and len(self.storage) * JOINING < MERGING * (self.until - time.monotonic())

    def answer_merged(self) -> None:
        """Joined step by step, in several ways; each problem on the way is packed."""
        began = time.monotonic()
        until = began + MERGING * (self.until - began)
        for weights in WAYS:
            parts = list(Merger(self.storage, max(self.goal, self.bound), weights).run())
            for part in reversed(parts):  # the smallest problem first
                seconds = min(PART * (until - began), until - time.monotonic())
                if self.done or seconds <= 0:
                    return
                limit = Limit(self.goal if self.fitting else None, seconds, self.seed)
                found = solve(part.storage, limit, blocks=False, merge=False)
                if found.best is not None:
                    self.offer(part.whole(found.best), f"merged, {found.method}")

    def search(self, until: float) -> None:
        """Both searches side by side, where buffers are few enough."""
        if self.done:
            return
        searches = [self.prove] if len(self.storage) <= MANY else []
        searches += [self.hold if self.fitting else self.sink] if len(self.small.storage) <= MANY else []
        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(search, until) for search in searches]:
                job.result()

    def prove(self, until: float) -> None:
        """Search at the goal, or the bound where that is higher, which rises each time that nothing fits."""
        search = PlacementSearch(self.storage, seed=2 * self.seed, stop=self.stop)
        while not self.done and time.monotonic() < until:
            at = max(self.goal, self.bound)
            got, offset = search.fit(at, until)
            if got == SOLVED:
                self.offer(offset, "search")
            elif got == NONE:
                self.refute(at)

    def hold(self, until: float) -> None:
        """Search the coalesced problem at the goal."""
        search = PlacementSearch(self.small.storage, seed=2 * self.seed + 1, stop=self.stop)
        got, offset = search.fit(self.goal, until)
        if got == SOLVED:
            self.offer(self.small.whole(offset), "coalesced, search")

    def sink(self, until: float) -> None:
        """Search the coalesced problem below the best peak, at the bound first; steps halve when a slice of time fails."""
        search, share, allowed = PlacementSearch(self.small.storage, seed=2 * self.seed + 1, stop=self.stop), 1.0, SLICE
        while not self.done and time.monotonic() < until:
            unit = self.storage.unit
            step = int((self.peak - self.bound) * share) // unit * unit
            got, offset = search.fit(self.peak - max(step, unit), min(until, time.monotonic() + allowed))
            if got == NONE and step <= unit:  # the coalesced problem has nothing better
                return
            if got == SOLVED:
                self.offer(self.small.whole(offset), "coalesced, search")
                share = min(2 * share, 1.0)
            elif step <= unit or share < 0.02:
                share, allowed = 1.0, 2 * allowed
            else:
                share /= 2


def greedy(storage: Storage, small: Reduced, until: float) -> Iterator[tuple[np.ndarray, str]]:
    """Packings made without search, with the name of what made each: the cheap ones first."""
    if not (storage.pin != FREE).any():
        yield lowest_first(storage), "lowest first"
    if len(small.storage) < len(storage):
        for offset, method in greedy(small.storage, small, until):
            yield small.whole(offset), f"coalesced, {method}"
    if pairs_of(storage) <= PAIRS or (storage.pin != FREE).any():
        yield from first_fits(storage, until)


def first_fits(storage: Storage, until: float) -> Iterator[tuple[np.ndarray, str]]:
    """First and best fit in every order."""
    instance = make_instance(storage)
    for number, order in enumerate(ORDERS):
        for best in (False, True):
            if number and time.monotonic() > until:
                return
            yield first_fit(storage, instance, order, best), f"{'best' if best else 'first'} fit by {order}"


def pairs_of(storage: Storage) -> float:
    """About how many pairs of buffers are live at once: the sum over buffers of those live when each begins."""
    return float(2 * storage.sum_live(np.ones(len(storage), np.int64))[storage.hull[0]].sum())


def pins_clash(storage: Storage) -> tuple[int, int] | None:
    """Two pinned buffers that share a byte at some time, or None."""
    pinned = np.flatnonzero((storage.pin != FREE) & (storage.size > 0))
    if not len(pinned):
        return None
    instance = make_instance(storage.take(pinned))
    low, high = instance.pin, instance.pin + instance.size
    for i in range(len(pinned)):
        for j in instance.near[instance.near_start[i] : instance.near_start[i + 1]]:
            if low[i] < high[j] and low[j] < high[i]:
                return int(pinned[i]), int(pinned[j])
    return None

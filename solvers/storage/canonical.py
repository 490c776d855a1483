"""Exact search for addresses: the canonical placements, in order of offset.

Slide every buffer of a packing down until it rests on the ground or on another: a packing remains, and its peak is no
higher. Listed by offset (ties by a *rank*), each buffer then lies exactly on the highest of its neighbours (the buffers
live at the same time) listed before it, its *natural* offset. So the search tries sequences of buffers with
non-decreasing (offset, rank), each put at its natural offset, depth first. What prunes, each switchable:

    DOMINANCE   no buffer above the place where another still fits below it: that one could slide in
    SECTIONS    in each section, the buffers to come need their bytes above the lowest natural offset among them
    LIFT        a buffer that may no longer take its natural offset, for the order has passed it, has to rest on a
                neighbour to come; if there is none, the branch is dead
    TWINS       of buffers with equal spans and sizes, the one of lower rank comes first
    SPLIT       buffers to come that share no time with the rest are a search of their own

MiniMalloc (Moffitt 2023) has canonical solutions, dominance, section bounds and decomposition; LIFT follows from the
same order. Which rank is good is learned: where the search fails is counted by section, and the next restart ranks the
buffers of those sections first, as dom/wdeg does for constraints (Boussemart et al. 2004).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

from ..jit.compiled import compiled
from .problem import FREE, Storage

SOLVED, NONE, STOPPED, OPEN = 1, 0, -1, 2
COUNT, FLOOR, FLOOR_RANK, TRIED, TRIED_RANK, HEIGHT, CHOSEN, NEXT, MARK, LEVEL = range(10)  # columns of a frame
NOBODY, GROUPS = -1, -2  # values of CHOSEN beside buffers
LEVELS = 64  # of nodes in groups inside groups
SLICE = 100_000  # nodes times buffers between two looks at the clock: tens of milliseconds
MANY = 2000  # buffers: more are not searched, for the members of every depth would fill memory

FIXED = ("TWA", "TAW", "WAT", "ZWA", "AZW", "WZT", "OZW", "Lz", "TO")  # see `PlacementSearch.ranks`
FEW = 4000  # nodes for each of them
LEARNED = (("sum", 500, 0.2), ("area", 2000, 0.2), ("sum", 1000, 0.2), ("sum", 3000, 0.5))
FORGET = 0.9  # of the blame, from one restart to the next
DOMINANCE, SECTIONS, LIFT, TWINS, SPLIT = 1, 2, 4, 8, 16  # what prunes
ALL = DOMINANCE | SECTIONS | LIFT | TWINS | SPLIT


class Instance(NamedTuple):
    """The problem in arrays, in sections. Neighbours of i are `near[near_start[i]:near_start[i + 1]]`."""

    size: np.ndarray
    padded: np.ndarray
    pin: np.ndarray
    span_start: np.ndarray
    first: np.ndarray
    last: np.ndarray
    begin: np.ndarray  # first section of each buffer's first span
    end: np.ndarray  # and the one after its last span
    near_start: np.ndarray
    near: np.ndarray
    twin: np.ndarray  # the next of the buffers that are alike, in a ring; -1 where there is none
    slack: int  # bytes that the topmost buffer of a section may save of its padding
    pinned: bool


class SearchState(NamedTuple):
    """What the search changes. Rows of `members` and `frames` belong to depths, the other rows to levels of groups."""

    low: np.ndarray  # natural offsets
    lifted: np.ndarray  # bounds on the offsets that buffers to come will have
    total: np.ndarray  # bytes to come in each section
    least: np.ndarray  # of each section: the lowest bound of a buffer to come
    placed: np.ndarray
    offset: np.ndarray
    members: np.ndarray  # buffers to come, by first section
    frames: np.ndarray
    trail: np.ndarray  # natural offsets to restore
    kept_low: np.ndarray
    kept_total: np.ndarray
    blame: np.ndarray  # failures of each section
    nodes: np.ndarray  # visited, allowed before the search pauses
    depth: np.ndarray  # at which it did
    stop: np.ndarray  # set by another thread


@compiled()
def _neighbours(span_start, first, last, begin, end):  # pragma: no cover
    """Pairs of buffers that are live at the same time, as (start, neighbours)."""
    count = len(begin)
    order = np.argsort(begin)
    start = np.zeros(count + 1, np.int64)
    near = np.empty(0, np.int64)
    for fill in range(2):
        used = np.zeros(count, np.int64)
        for x in range(count):
            i = order[x]
            for y in range(x + 1, count):
                j = order[y]
                if begin[j] >= end[i]:
                    break
                meets = False
                a, b = span_start[i], span_start[j]
                while a < span_start[i + 1] and b < span_start[j + 1] and not meets:
                    meets = first[a] < last[b] and first[b] < last[a]
                    if last[a] < last[b]:
                        a += 1
                    else:
                        b += 1
                if meets:
                    if fill:
                        near[start[i] + used[i]], near[start[j] + used[j]] = j, i
                    used[i] += 1
                    used[j] += 1
        if not fill:
            start[1:] = np.cumsum(used)
            near = np.empty(start[count], np.int64)
    return start, near


def make_instance(storage: Storage) -> Instance:
    """The arrays of a problem."""
    first, last, _ = storage.sections
    begin, end = storage.hull
    near_start, near = _neighbours(storage.start, first, last, begin, end)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(storage)):
        spans = slice(storage.start[i], storage.start[i + 1])
        if storage.pin[i] == FREE:
            alike.setdefault((int(storage.size[i]), *first[spans].tolist(), *last[spans].tolist()), []).append(i)
    twin = np.full(len(storage), -1, np.int64)
    for ring in alike.values():
        if len(ring) > 1:
            twin[ring] = np.roll(ring, -1)
    return Instance(
        storage.size, storage.padded, storage.pin, storage.start.astype(np.int64), first, last, begin, end, near_start,
        near, twin, int((storage.padded - storage.size).max(initial=0)), bool((storage.pin != FREE).any()),
    )  # fmt: skip


def make_state(storage: Storage, instance: Instance, stop: np.ndarray) -> SearchState:
    """The arrays that a search of a problem needs."""
    many, (_, _, sections) = len(storage), storage.sections
    return SearchState(
        np.empty(many, np.int64), np.empty(many, np.int64), np.empty(sections, np.int64), np.empty(sections, np.int64),
        np.empty(many, np.bool_), np.empty(many, np.int64), np.empty((2 * many + 2, many), np.int32),
        np.empty((2 * many + 2, LEVEL + 1), np.int64), np.empty(len(instance.near) + 1, np.int64),
        np.empty((LEVELS, many), np.int64), np.empty((LEVELS, sections), np.int64), np.zeros(sections),
        np.zeros(2, np.int64), np.zeros(1, np.int64), stop,
    )  # fmt: skip


@compiled()
def _fits(instance, state, i, offset):  # pragma: no cover
    """Whether no pinned buffer to come is in the way."""
    for k in range(instance.near_start[i], instance.near_start[i + 1]):
        j = instance.near[k]
        if instance.pin[j] >= 0 and not state.placed[j]:
            if offset < instance.pin[j] + instance.size[j] and instance.pin[j] < offset + instance.size[i]:
                return False
    return True


@compiled()
def _bound(instance, state, rank, capacity, use, depth, low, high):  # pragma: no cover
    """Whether the buffers to come at this depth may still fit, as far as lifts and sections tell."""
    frame, row = state.frames[depth], state.members[depth]
    many, floor, floor_rank = frame[COUNT], frame[FLOOR], frame[FLOOR_RANK]
    for x in range(many):
        j = row[x]
        v = state.low[j]
        if instance.pin[j] >= 0:
            if v > instance.pin[j] or floor > instance.pin[j]:
                return False
        elif v < floor or (v == floor and rank[j] <= floor_rank):
            v = floor
            if use & LIFT:
                v = capacity + 1
                for k in range(instance.near_start[j], instance.near_start[j + 1]):
                    m = instance.near[k]
                    if not state.placed[m]:
                        v = min(v, max(state.low[m], floor) + instance.padded[m])
        if v + instance.size[j] > capacity:
            share = 1.0 / (instance.end[j] - instance.begin[j])
            for s in range(instance.begin[j], instance.end[j]):
                state.blame[s] += share
            return False
        state.lifted[j] = v
    if not use & SECTIONS:
        return True
    least = state.least
    for s in range(low, high):
        least[s] = capacity + 1
    for x in range(many):
        j = row[x]
        v = state.lifted[j]
        for span in range(instance.span_start[j], instance.span_start[j + 1]):
            for s in range(instance.first[span], instance.last[span]):
                least[s] = min(least[s], v)
    room = capacity + instance.slack
    for s in range(low, high):
        if state.total[s] > 0 and least[s] + state.total[s] > room:
            state.blame[s] += 1.0
            return False
    return True


@compiled()
def _open(instance, state, rank, capacity, use, depth):  # pragma: no cover
    """Look at a node for the first time: SOLVED, NONE, STOPPED, or OPEN if there is something to try."""
    frame, row = state.frames[depth], state.members[depth]
    many = frame[COUNT]
    if many == 0:
        return SOLVED
    state.nodes[0] += 1
    if state.nodes[0] > state.nodes[1] or state.stop[0]:
        return STOPPED
    low, high, height = instance.begin[row[0]], instance.end[row[0]], capacity + 1
    frame[CHOSEN] = NOBODY
    for x in range(many):
        j = row[x]
        if use & SPLIT and instance.begin[j] >= high and frame[LEVEL] < len(state.kept_low):
            state.kept_low[frame[LEVEL]] = state.low
            state.kept_total[frame[LEVEL]] = state.total
            frame[CHOSEN], frame[NEXT] = GROUPS, 0
            return OPEN
        high = max(high, instance.end[j])
        if instance.pin[j] >= 0:
            height = min(height, instance.pin[j] + 1)
        elif use & DOMINANCE and (not instance.pinned or _fits(instance, state, j, state.low[j])):
            height = min(height, state.low[j] + instance.size[j])
    frame[HEIGHT], frame[TRIED], frame[TRIED_RANK] = height, frame[FLOOR], frame[FLOOR_RANK]
    return OPEN if _bound(instance, state, rank, capacity, use, depth, low, high) else NONE


@compiled()
def _descend(instance, state, depth, many, floor, floor_rank, mark, level):  # pragma: no cover
    """Set up the next depth's frame; its members are written already."""
    child = state.frames[depth + 1]
    child[COUNT], child[FLOOR], child[FLOOR_RANK] = many, floor, floor_rank
    child[MARK], child[LEVEL] = mark, level


@compiled()
def _next_group(instance, state, depth):  # pragma: no cover
    """The next group of buffers to come that shares no time with the others, as a node below; SOLVED after the last."""
    frame, row = state.frames[depth], state.members[depth]
    begin, many = frame[NEXT], frame[COUNT]
    if begin == many:
        return SOLVED
    x, reach = begin, instance.end[row[begin]]
    while x < many and instance.begin[row[x]] < reach:
        reach = max(reach, instance.end[row[x]])
        x += 1
    state.members[depth + 1, : x - begin] = row[begin:x]
    frame[NEXT] = x
    _descend(instance, state, depth, x - begin, frame[FLOOR], frame[FLOOR_RANK], frame[MARK], frame[LEVEL] + 1)
    return OPEN


@compiled()
def _regroup(instance, state, depth):  # pragma: no cover
    """Take back what the groups of a node have placed."""
    frame, row = state.frames[depth], state.members[depth]
    state.low[:] = state.kept_low[frame[LEVEL]]
    state.total[:] = state.kept_total[frame[LEVEL]]
    for x in range(frame[COUNT]):
        state.placed[row[x]] = False


@compiled()
def _take_back(instance, state, depth):  # pragma: no cover
    """Undo the placement of a node."""
    i, mark = state.frames[depth][CHOSEN], state.frames[depth][MARK]
    state.placed[i] = False
    for k in range(instance.near_start[i], instance.near_start[i + 1]):
        state.low[instance.near[k]] = state.trail[mark + k - instance.near_start[i]]
    for span in range(instance.span_start[i], instance.span_start[i + 1]):
        for s in range(instance.first[span], instance.last[span]):
            state.total[s] += instance.padded[i]


@compiled()
def _next_choice(instance, state, rank, use, depth):  # pragma: no cover
    """Place the next candidate of a node, with a node below for the rest; NONE if there is no other candidate."""
    frame, row = state.frames[depth], state.members[depth]
    many, height, mark = frame[COUNT], frame[HEIGHT], frame[MARK]
    while True:
        i, tried, tried_rank = -1, frame[TRIED], frame[TRIED_RANK]
        for x in range(many):
            j = row[x]
            v = state.low[j]
            if v >= height or v < tried or (v == tried and rank[j] <= tried_rank):
                continue
            if i < 0 or v < state.low[i] or (v == state.low[i] and rank[j] < rank[i]):
                i = j
        if i < 0:
            return NONE
        offset = state.low[i]
        frame[TRIED], frame[TRIED_RANK], frame[CHOSEN] = offset, rank[i], i
        if instance.pinned and instance.pin[i] < 0 and not _fits(instance, state, i, offset):
            continue
        twin = instance.twin[i]
        if use & TWINS and twin >= 0:
            while twin != i and (state.placed[twin] or rank[twin] > rank[i]):
                twin = instance.twin[twin]
            if twin != i:
                continue
        break
    child, c = state.members[depth + 1], 0
    for x in range(many):
        if row[x] != i:
            child[c] = row[x]
            c += 1
    state.placed[i], state.offset[i] = True, offset
    top, width = offset + instance.padded[i], instance.near_start[i + 1] - instance.near_start[i]
    for k in range(width):
        j = instance.near[instance.near_start[i] + k]
        state.trail[mark + k] = state.low[j]
        state.low[j] = max(state.low[j], top)
    for span in range(instance.span_start[i], instance.span_start[i + 1]):
        for s in range(instance.first[span], instance.last[span]):
            state.total[s] -= instance.padded[i]
    _descend(instance, state, depth, many - 1, offset, rank[i], mark + width, frame[LEVEL])
    return OPEN


@compiled(nogil=True)
def _search(instance, state, rank, capacity, use):  # pragma: no cover
    """Depth first from where it stopped before; returns SOLVED, NONE or STOPPED."""
    depth = state.depth[0]
    got = _open(instance, state, rank, capacity, use, depth)
    while True:
        if got == OPEN:  # the node has something left to try
            if state.frames[depth][CHOSEN] == GROUPS:
                got = _next_group(instance, state, depth)
            else:
                got = _next_choice(instance, state, rank, use, depth)
            if got == OPEN:
                depth += 1
                got = _open(instance, state, rank, capacity, use, depth)
                continue
        if got == STOPPED or depth == 0:
            state.depth[0] = depth
            return got
        depth -= 1  # the node is decided; what does that mean for the one above?
        if state.frames[depth][CHOSEN] != GROUPS:
            if got == NONE:
                _take_back(instance, state, depth)
                got = OPEN
        elif got == NONE:
            _regroup(instance, state, depth)
        else:
            got = OPEN


@dataclass
class PlacementSearch:
    """Restarts of the search on one problem.

    Attributes:
        storage: the problem, of at most MANY buffers, none of them empty: what is without bytes supports nothing.
        use: what prunes, as a sum of the constants above.
        seed: of the random part of the ranks.
        stop: one flag, to be set by another thread.
        restarts: how many there were.
        nodes: visited by all of them.

    Raises:
        ValueError: a buffer is empty.
    """

    storage: Storage
    use: int = ALL
    seed: int = 0
    stop: np.ndarray = field(default_factory=lambda: np.zeros(1, np.bool_))
    restarts: int = 0
    nodes: int = 0

    def __post_init__(self) -> None:
        if not self.storage.size.all():
            raise ValueError("the search takes no empty buffers: leave them out, as allocate.py does")
        self.instance = make_instance(self.storage)
        self.state = make_state(self.storage, self.instance, self.stop)
        self.random = np.random.default_rng(self.seed)

    def once(self, rank: np.ndarray, capacity: int, limit: int, until: float) -> tuple[int, np.ndarray]:
        """One search of at most `limit` nodes, the clock read between slices of it: (SOLVED, NONE or STOPPED, offsets)."""
        state, each = self.state, max(SLICE // max(len(self.storage), 1), 1)
        state.low[:], state.total[:], state.placed[:] = np.maximum(self.storage.pin, 0), self.storage.load, False
        state.members[0], state.depth[0] = np.argsort(self.instance.begin, kind="stable"), 0
        frame = state.frames[0]
        frame[[COUNT, FLOOR, FLOOR_RANK, MARK, LEVEL]] = len(rank), 0, -1, 0, 0
        visited, got = 0, STOPPED
        while got == STOPPED and visited < limit and not self.stop[0] and (not visited or time.monotonic() <= until):
            state.nodes[:] = visited, min(visited + each, limit)
            got = _search(self.instance, state, rank, capacity, self.use)
            visited = int(min(state.nodes))  # a node that was refused is not visited
        self.restarts += 1
        self.nodes += visited
        return got, state.offset.copy()

    def fit(self, capacity: int, until: float) -> tuple[int, np.ndarray]:
        """Search for a packing within a capacity until a time: (SOLVED, NONE or STOPPED, offsets).

        NONE is a proof that there is none.
        """
        for rank, limit in self.ranks():
            got, offset = self.once(rank, capacity, limit, until)
            if got != STOPPED or self.stop[0] or time.monotonic() > until:
                return got, offset
        return STOPPED, np.empty(0, np.int64)

    def ranks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Ranks to try and the nodes to give each: fixed ones first, then ever new ones from what failed."""
        instance, load = self.instance, self.storage.load
        width = (self.storage.upper[self.storage.start[1:] - 1] - self.storage.lower[self.storage.start[:-1]]).astype(
            np.float64
        )
        heavy = np.maximum.reduceat(np.append(load, 0), np.stack([instance.begin, instance.end], 1).ravel())[::2]
        crowd = np.diff(instance.near_start)
        facts = {"T": heavy, "W": width, "A": width * instance.size, "Z": instance.size, "O": crowd,
                 "L": -instance.begin, "z": -instance.size}  # fmt: skip
        for name in FIXED:
            yield ranked(*(facts[letter] for letter in name)), FEW
        for number in count():
            blame = self.state.blame
            blame *= FORGET
            weight = blame / max(blame.max(initial=0), 1e-9) + 1e-3 * load / load.max()
            kind, nodes, spread = LEARNED[number % len(LEARNED)]
            if kind == "sum":
                total = np.concatenate([[0.0], np.cumsum(weight)])
                key = total[instance.end] - total[instance.begin]
            else:
                peak = np.maximum.reduceat(np.append(weight, 0), np.stack([instance.begin, instance.end], 1).ravel())
                key = peak[::2] * width * instance.size
            noise = np.exp(self.random.uniform(-spread, spread, len(key)))
            yield ranked(key * noise, width), nodes * (1 + number // (20 * len(LEARNED)))


def ranked(*keys: np.ndarray) -> np.ndarray:
    """The rank of each buffer when sorted by the keys, largest first."""
    order = np.lexsort([-key for key in reversed(keys)])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank

"""A file of buffers -> addresses: what `memplan alloc` does.

    pool by pool: the problem it states -> what shares bytes (storage/share.py) -> a way to place them -> the referee's check

Where there is no answer, `no_packing` says why.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

import numpy as np

from ...solvers.face.answer import Limit, Status
from ...solvers.storage.allocate import pins_clash
from ...solvers.storage.problem import FREE, LIMIT, Packing, Storage, Way, peak_of, room_for_all
from ...solvers.storage.share import clipped, pack_sharing
from ..ir.bufferfile import Trace
from ..ir.errors import PlacementError, TraceError
from ..ir.referee import first_clash

COARSEST = 2**40  # the largest --align
FAULT = "this is a fault of memplan, please report it"


@dataclass(frozen=True)
class Pool:
    """The buffers of one memory, and what is asked for.

    Attributes:
        name: of the pool; empty where the file has none.
        rows: its buffers, as indices into the file.
        trace: the buffers.
        storage: the same as a problem.
        over: for each buffer the one that it may be written over, or -1.
        capacity: bytes to fit into; None for as few as can be.
    """

    name: str
    rows: list[int]
    trace: Trace
    storage: Storage
    over: np.ndarray
    capacity: int | None

    def place(self, way: Way, limit: Limit, asked: float) -> "PlacedPool":
        """Addresses by a way, checked.

        Args:
            way: places buffers.
            limit: its seconds are this pool's.
            asked: seconds for all pools together, for the reason why there is no answer.

        Raises:
            PlacementError: addresses did not pass the check.
        """
        packing = pack_sharing(self.storage, self.over, way, replace(limit, bytes=self.capacity))
        peak = None
        if packing.best is not None:
            approve(self.trace, packing.best.tolist(), self.storage.alignment)
            peak = peak_of(self.storage, packing.best)
        fits = packing.best is not None and packing.status in (Status.OPTIMAL, Status.FEASIBLE)
        reason = "" if fits else no_packing(self.trace, clipped(self.storage, self.over), self.capacity, packing, asked)
        return PlacedPool(self.name, self.rows, packing, peak, self.capacity, reason)


@dataclass(frozen=True)
class PlacedPool:
    """The answer for one memory.

    Attributes:
        name: of the pool; empty where the file has none.
        rows: its buffers, as indices into the file.
        packing: the solver's answer.
        peak: the end of the highest buffer; None where nothing was found.
        capacity: that was asked for, or None.
        reason: why there is no answer, or empty.
    """

    name: str
    rows: list[int]
    packing: Packing
    peak: int | None
    capacity: int | None
    reason: str


def pools_of(file: Path, trace: Trace, align: int, capacities: dict[str, int | None]) -> list[Pool]:
    """The pools of a file, in its order.

    Args:
        file: to be named.
        trace: what it says.
        align: every offset is a multiple of it.
        capacities: for each pool's name the bytes to fit into; None for as few as can be.

    Raises:
        TraceError: as `alignment_of` and `storage_of` do.
    """
    parts = trace.by_pool()
    aligned = {name: alignment_of(file, part, align) for name, (_, part) in parts.items()}
    return [Pool(name, rows, part, storage_of(file, part, aligned[name]), overwritten(part), capacities[name])
            for name, (rows, part) in parts.items()]  # fmt: skip


def place_pools(pools: Sequence[Pool], way: Way, limit: Limit) -> list[PlacedPool]:
    """Addresses for every pool, one after the other; each has its share of the time that is left."""
    began, placed = time.perf_counter(), []
    for number, pool in enumerate(pools):
        left = max(limit.seconds - (time.perf_counter() - began), 0.0) / (len(pools) - number)
        placed.append(pool.place(way, replace(limit, seconds=left), limit.seconds))
    return placed


def storage_of(file: Path, trace: Trace, align: int) -> Storage:
    """A file's buffers as a problem.

    Raises:
        TraceError: a pin is no multiple of the alignment, or sizes and pins are too large for sums of them.
    """
    pins = np.array([FREE if pin is None else pin for pin in trace.pins], np.int64)
    sizes = np.array(trace.sizes, np.int64)
    if align >= LIMIT or room_for_all(sizes, pins, align) >= LIMIT:
        row = max(range(len(sizes)), key=lambda row: max(-(-trace.sizes[row] // align) * align, (trace.pins[row] or 0)))
        raise TraceError(f"{file}: buffer {trace.ids[row]!r} is too large, or pinned too high, or --align {align} too coarse: "
                         "the buffers together may need 2^62 bytes or more")  # fmt: skip
    for row in np.flatnonzero((pins != FREE) & (pins % align != 0)):
        raise TraceError(f"{file}: buffer {trace.ids[row]!r} is pinned at {pins[row]}, which is no multiple of {align}")
    start = np.concatenate([[0], np.cumsum([len(spans) for spans in trace.spans])]).astype(np.int64)
    pieces = np.array([piece for spans in trace.spans for piece in spans], np.int64).reshape(-1, 2)
    return Storage(sizes, start, pieces[:, 0], pieces[:, 1], pins, align)


def alignment_of(file: Path, trace: Trace, align: int) -> int:
    """What every offset is to be a multiple of, so that each is one of its own buffer's alignment.

    Args:
        file: to be named.
        trace: of one pool, with an alignment for each buffer.
        align: that was asked for of all; 1 where none was.

    Raises:
        TraceError: buffers want different alignments, and one of them is not met by what was asked for.
    """
    wanted = set(trace.alignments)
    if len(wanted) < 2:
        return lcm(align, *wanted)
    unmet = [row for row, each in enumerate(trace.alignments) if align % each]
    if unmet:
        enough = align
        for each in wanted:
            enough = lcm(enough, each) if enough <= COARSEST else enough
        advice = f"--align {enough} is enough for each of them" if enough <= COARSEST else "round them up to powers of two"
        raise TraceError(f"{file}: buffer {trace.ids[unmet[0]]!r} is to lie at a multiple of {trace.alignments[unmet[0]]}, "
                         f"another of {min(wanted)}, and all buffers of a pool are aligned alike: {advice}")  # fmt: skip
    return align


def overwritten(trace: Trace) -> np.ndarray:
    """For each buffer the one that it may be written over, or -1."""
    return np.array([-1 if old is None else old for old in trace.reuses], np.int64)


def approve(trace: Trace, offsets: list[int], align: int) -> None:
    """Check addresses without the help of what made them.

    Raises:
        PlacementError: two buffers share bytes, or an offset is not what was asked for.
    """
    for name, offset, pin, own in zip(trace.ids, offsets, trace.pins, trace.alignments, strict=True):
        if offset < 0 or offset % align or offset % own or pin not in (None, offset):
            raise PlacementError(f"buffer {name!r} was put at {offset}: {FAULT}")
    ends = [2**63] * len(trace.ids)  # of what is written over: when that happens
    for new, old in enumerate(trace.reuses):
        if old is not None and offsets[new] == offsets[old]:
            ends[old] = trace.spans[new][0][0]
    places = [
        (lower, min(upper, ends[index]), offsets[index], trace.sizes[index], index)
        for index, spans in enumerate(trace.spans)
        for lower, upper in spans
        if lower < ends[index]
    ]
    clash = first_clash(places)
    if clash is not None:
        one, two = trace.ids[clash[0]], trace.ids[clash[1]]
        raise PlacementError(f"buffers {one!r} and {two!r} share bytes at time {clash[2]}: {FAULT}")


def no_packing(trace: Trace, storage: Storage, room: int | None, packing: Packing, time_limit: float) -> str:
    """Why there is no packing, in one line, with the buffers and the time that show it.

    Args:
        trace: the buffers.
        storage: the same, each live only until something may be written over it.
        room: the capacity; None where the smallest peak was asked for.
        packing: the solver's answer.
        time_limit: seconds that it had.
    """
    clash = pins_clash(storage)
    if clash is not None:
        shared = next(max(a[0], b[0]) for a in trace.spans[clash[0]] for b in trace.spans[clash[1]]
                      if a[0] < b[1] and b[0] < a[1])  # fmt: skip
        one, two = (trace.ids[index] for index in clash)
        return f"buffers {one!r} and {two!r} are pinned to the same bytes, and both are live at time {shared}"
    if room is None and packing.status is Status.INFEASIBLE:
        return "pinned buffers lie on one another, whichever is written over which"
    if room is None:
        return f"no packing was found in {time_limit:g} s: raise --time-limit, or use --method auto"
    for name, pin, size in zip(trace.ids, trace.pins, trace.sizes, strict=True):
        if pin is not None and pin + size > room:
            return f"buffer {name!r} is pinned to end at {pin + size}, past the capacity of {room} bytes"
    slack = int((storage.padded - storage.size).max(initial=0))  # what the topmost buffer may save of its padding
    needed = np.maximum(storage.sum_live(storage.size), storage.load - slack)
    if int(needed.max()) > room:
        worst = int(np.argmax(needed))
        when = int(np.unique(np.concatenate([storage.lower, storage.upper]))[worst])
        held = storage.owner[(storage.lower <= when) & (when < storage.upper)].tolist()
        held.sort(key=lambda index: -trace.sizes[index])
        named = ", ".join(f"{trace.ids[index]!r} {trace.sizes[index]}" for index in held[:4])
        padded = f", aligned to {storage.alignment}," if storage.alignment > 1 else ""
        return (f"at time {when} the {len(held)} live buffers{padded} take {int(needed[worst])} bytes, the capacity is {room}; "
                f"the largest are {named}")  # fmt: skip
    if packing.status is Status.INFEASIBLE:
        return f"no packing fits {room} bytes, as a complete search showed; the smallest that may is {packing.bound}"
    best = f"; the smallest found takes {peak_of(storage, packing.best)}" if packing.best is not None else ""
    return f"no packing within {room} bytes was found in {time_limit:g} s{best}: raise --time-limit or --capacity"

"""Storage allocation as others state it: a constraint program and an integer program, behind the face of `pack`.

They are what the search is compared with, and tested against: rectangles that must not overlap in the plane, for CP-SAT
(OR-Tools), and one binary for each pair of neighbours that says which lies below, with a big M, for HiGHS or another solver
by name (the form of MEMO's bi-level plan, section 4.2 there). Both take the problem whole, with gaps, pins and alignment.
"""

import time
from collections.abc import Callable
from functools import wraps

import numpy as np

from ..programs import linear
from ..programs.names import HIGHS
from .allocate import pins_clash
from .canonical import Instance, make_instance
from .greedy import fit_in_order
from .problem import FREE, Packing, Status, Storage, extended, peak_of, room_for_all

NOTHING = np.empty(0, np.int64)
GRAIN = 1000  # units of the integer program that the lower bound is long: its tolerances are absolute
TOLERANCE = 1e-9  # of integrality and feasibility: at 1e-6, times the big M, buffers overlap

Solver = Callable[[Storage, int | None, float, int], Packing]


def without_empty(pack: Callable[..., Packing]) -> Callable[..., Packing]:
    """The same solver for problems some of whose buffers are empty, or all."""

    @wraps(pack)
    def solve(storage: Storage, capacity: int | None = None, seconds: float = 10.0, seed: int = 0, **options: str) -> Packing:
        members = np.flatnonzero(storage.size)
        if not len(members):
            return extended(storage, members, Packing(NOTHING, 0, Status.OPTIMAL, "nothing to place"))
        whole = len(members) == len(storage)
        left = storage if whole else storage.take(members)
        return extended(storage, members, pack(left, capacity, seconds, seed, **options))

    return solve


@without_empty
def pack_sat(storage: Storage, capacity: int | None, seconds: float, seed: int) -> Packing:
    """By CP-SAT; arguments and answer as of `pack`. Of more than some 2^60 bytes it finds nothing, lest sums overflow."""
    from ortools.sat.python import cp_model  # loaded when asked for: it takes longer than most problems

    from ..programs.cpsat import make_solver

    model = cp_model.CpModel()
    unit, most = storage.alignment, ceiling(storage, capacity)
    peak = model.new_int_var(0, most, "peak")
    first, last, _ = storage.sections
    x, y, offsets = [], [], []
    for i in range(len(storage)):
        size, pin = int(storage.size[i]), int(storage.pin[i])
        if pin != FREE and pin + size > most:
            return Packing(NOTHING, storage.bound, Status.INFEASIBLE, "cp-sat")
        high = max((most - size) // unit, 0)
        slot = model.new_int_var(0, high, "") if pin == FREE else model.new_constant(pin // unit)
        offsets.append(unit * slot)
        model.add(unit * slot + size <= peak)
        for span in range(storage.start[i], storage.start[i + 1]):
            low, high = int(first[span]), int(last[span])
            x.append(model.new_fixed_size_interval_var(low, high - low, ""))
            y.append(model.new_interval_var(unit * slot, size, unit * slot + size, ""))
    model.add_no_overlap_2d(x, y)
    model.add(peak >= storage.bound)
    model.add_cumulative(x, [int(storage.size[i]) for i in storage.owner], peak)
    if capacity is None:
        model.minimize(peak)
    solver = make_solver(seconds, seed)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Packing(NOTHING, max(storage.bound, most + 1), Status.INFEASIBLE, "cp-sat")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Packing(NOTHING, storage.bound, Status.UNKNOWN, "cp-sat")
    offset = np.array([solver.value(each) for each in offsets], np.int64)
    bound = storage.bound if capacity is not None else max(storage.bound, int(np.ceil(solver.best_objective_bound - 1e-6)))
    return verdict(storage, offset, capacity, bound, "cp-sat")


@without_empty
def pack_mip(storage: Storage, capacity: int | None, seconds: float, seed: int, solver: str = HIGHS) -> Packing:
    """By an integer program on pairwise binaries; beyond some thousand pairs it finds nothing.

    Arguments and answer are those of `pack`; a solver may be named (`programs/names.py`).

    The program says only which buffer of a pair lies below: its offsets are fractions, of sizes padded to the alignment. In
    their order the buffers are then put where they fit, in whole bytes, and it is that peak which counts.
    """
    until, most = time.monotonic() + seconds, ceiling(storage, capacity)
    method = "mip" if solver == HIGHS else f"mip ({solver})"
    if pins_clash(storage) is not None or storage.bound > most:
        return Packing(NOTHING, storage.bound, Status.INFEASIBLE, method)
    unknown = Packing(NOTHING, storage.bound, Status.UNKNOWN, method)
    unit = storage.bound / GRAIN
    instance = make_instance(storage)
    program = fragmentation(storage, instance, most / unit, unit, until)
    if program is None:
        return unknown
    answer = linear.solve(program, solver, max(until - time.monotonic(), 0.0), seed, 0.0, TOLERANCE)
    if answer.status is linear.Verdict.INFEASIBLE:
        return Packing(NOTHING, max(storage.bound, most + 1), Status.INFEASIBLE, method)
    if not len(answer.values):
        return unknown
    offset = fit_in_order(storage, instance, np.argsort(answer.values[: len(storage)], kind="stable"))
    least = int(np.ceil(max(answer.bound, 0.0) * unit * (1 - 1e-6) / storage.unit)) * storage.unit
    return verdict(storage, offset, capacity, storage.bound if capacity is not None else max(storage.bound, least), method)


def fragmentation(storage: Storage, instance: Instance, top: float, unit: float, until: float) -> linear.LinearProgram | None:
    """The integer program, in units of so many bytes; None where there are too many pairs to write down until a time.

    Columns are the offset of each buffer, the peak, and for each pair of neighbours whether the one of the larger number lies
    below.

    Args:
        storage: whose buffers.
        instance: which of them are neighbours.
        top: the highest peak worth looking at, in units.
        unit: in bytes.
        until: when to give up.
    """
    count, free = len(storage), storage.pin == FREE
    size, padded = storage.size / unit, storage.padded / unit
    far = top + float((padded - size).max())  # how far an offset may lie below the padded end of another buffer
    rows: list[linear.Row] = []
    below = count + 1
    for i in range(count):
        rows.append(((i, count), (-1.0, 1.0), float(size[i])))
        for j in instance.near[instance.near_start[i] : instance.near_start[i + 1]].tolist():
            if j < i and (free[i] or free[j]):
                rows.append(((j, i, below), (1.0, -1.0, -far), float(padded[i]) - far))
                rows.append(((j, i, below), (-1.0, 1.0, far), float(padded[j])))
                below += 1
        if time.monotonic() > until:  # there are too many pairs
            return None
    pairs = below - count - 1
    pinned = storage.pin / unit
    return linear.of_rows(
        cost=np.concatenate([np.zeros(count), [1.0], np.zeros(pairs)]),
        lower=np.concatenate([np.where(free, 0.0, pinned), [storage.bound / unit], np.zeros(pairs)]),
        upper=np.concatenate([np.where(free, top - size, pinned), [top], np.ones(pairs)]),
        rows=rows,
        whole=np.arange(below) > count,
    )


def ceiling(storage: Storage, capacity: int | None) -> int:
    """The highest peak worth looking at: the capacity, or that of everything stacked above what is pinned."""
    room = room_for_all(storage.size, storage.pin, storage.alignment)
    return room if capacity is None else min(capacity, room)


def verdict(storage: Storage, offset: np.ndarray, capacity: int | None, bound: int, method: str) -> Packing:
    """The answer of a solver that found these offsets."""
    peak = peak_of(storage, offset)
    done = peak <= (bound if capacity is None else capacity)
    status = Status.OPTIMAL if done else Status.FEASIBLE if capacity is None else Status.UNKNOWN
    return Packing(offset, min(bound, peak), status, method)

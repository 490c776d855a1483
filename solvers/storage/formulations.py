"""Storage allocation as others state it: a constraint program and an integer program, behind the face of `pack`.

They are what the search is compared with, and tested against: rectangles that must not overlap in the plane, for CP-SAT
(OR-Tools), and one binary for each pair of neighbours that says which lies below, with a big M, for HiGHS (the form of
MEMO's bi-level plan, section 4.2 there). Both take the problem whole, with gaps, pins and alignment.
"""

import time
from collections.abc import Callable
from functools import wraps

import numpy as np

from .allocate import pins_clash
from .canonical import make_instance
from .greedy import fit_in_order
from .problem import FREE, Packing, Status, Storage, extended, peak_of, room_for_all

NOTHING = np.empty(0, np.int64)
GRAIN = 1000  # units of the integer program that the lower bound is long: its tolerances are absolute
TOLERANCE = 1e-9  # of integrality and feasibility: at 1e-6, times the big M, buffers overlap

Solver = Callable[[Storage, int | None, float, int], Packing]


def without_empty(solver: Solver) -> Callable[..., Packing]:
    """The same solver for problems some of whose buffers are empty, or all."""

    @wraps(solver)
    def solve(storage: Storage, capacity: int | None = None, seconds: float = 10.0, seed: int = 0) -> Packing:
        members = np.flatnonzero(storage.size)
        if not len(members):
            return extended(storage, members, Packing(NOTHING, 0, Status.OPTIMAL, "nothing to place"))
        whole = len(members) == len(storage)
        return extended(storage, members, solver(storage if whole else storage.take(members), capacity, seconds, seed))

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
def pack_mip(storage: Storage, capacity: int | None, seconds: float, seed: int) -> Packing:
    """By HiGHS on pairwise binaries; arguments and answer as of `pack`. Beyond some thousand pairs it finds nothing.

    The program says only which buffer of a pair lies below: its offsets are fractions, of sizes padded to the alignment. In
    their order the buffers are then put where they fit, in whole bytes, and it is that peak which counts.
    """
    import highspy

    until, most = time.monotonic() + seconds, ceiling(storage, capacity)
    if pins_clash(storage) is not None or storage.bound > most:
        return Packing(NOTHING, storage.bound, Status.INFEASIBLE, "mip")
    unknown = Packing(NOTHING, storage.bound, Status.UNKNOWN, "mip")
    unit = storage.bound / GRAIN
    instance = make_instance(storage)
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    size, padded, top = storage.size / unit, storage.padded / unit, most / unit
    slots = []
    for i in range(len(storage)):
        low, high = (0.0, top - size[i]) if storage.pin[i] == FREE else (storage.pin[i] / unit,) * 2
        slots.append(model.addVariable(lb=low, ub=high))
    peak = model.addVariable(lb=storage.bound / unit, ub=top, obj=1.0)
    far = top + (padded - size).max()  # how far an offset may lie below the padded end of another buffer
    for i in range(len(storage)):
        model.addConstr(slots[i] + size[i] <= peak)
        for j in instance.near[instance.near_start[i] : instance.near_start[i + 1]].tolist():
            if j < i and (storage.pin[i] == FREE or storage.pin[j] == FREE):
                below = model.addBinary()
                model.addConstr(slots[i] + padded[i] <= slots[j] + far * (1 - below))
                model.addConstr(slots[j] + padded[j] <= slots[i] + far * below)
        if time.monotonic() > until:  # there are too many pairs
            return unknown
    for option, value in (
        ("time_limit", max(until - time.monotonic(), 0.0)), ("random_seed", seed), ("threads", 1), ("mip_rel_gap", 0.0),
        ("mip_feasibility_tolerance", TOLERANCE), ("primal_feasibility_tolerance", TOLERANCE),
    ):  # fmt: skip
        model.setOptionValue(option, value)
    model.run()
    outcome, found = model.getModelStatus(), model.getInfo()
    if outcome == highspy.HighsModelStatus.kInfeasible:
        return Packing(NOTHING, max(storage.bound, most + 1), Status.INFEASIBLE, "mip")
    if found.primal_solution_status != 2:
        return unknown
    values = np.array(model.getSolution().col_value)[: len(storage)]
    offset = fit_in_order(storage, instance, np.argsort(values, kind="stable"))
    least = int(np.ceil(max(found.mip_dual_bound, 0.0) * unit * (1 - 1e-6) / storage.unit)) * storage.unit
    return verdict(storage, offset, capacity, storage.bound if capacity is not None else max(storage.bound, least), "mip")


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

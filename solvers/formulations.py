"""Storage allocation as others state it: a constraint program and an integer program, behind the face of `pack`.

They are what the search is compared with, and tested against: rectangles that must not overlap in the plane, for CP-SAT
(OR-Tools), and one binary for each pair of neighbours that says which lies below, with a big M, for HiGHS (the form of
MEMO's bi-level plan, section 4.2 there). Both take the problem whole, with gaps, pins and alignment.
"""

import numpy as np

from .allocate import pins_clash
from .canonical import make_instance
from .storage import FREE, Packing, Status, Storage, peak_of

NOTHING = np.empty(0, np.int64)


def pack_sat(storage: Storage, capacity: int | None = None, seconds: float = 10.0, seed: int = 0) -> Packing:
    """By CP-SAT; arguments and answer as of `pack`.

    Raises:
        ImportError: OR-Tools is not installed.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    unit, most = storage.alignment, ceiling(storage, capacity)
    peak = model.new_int_var(0, most, "peak")
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
            low, high = int(storage.lower[span]), int(storage.upper[span])
            x.append(model.new_fixed_size_interval_var(low, high - low, ""))
            y.append(model.new_interval_var(unit * slot, size, unit * slot + size, ""))
    model.add_no_overlap_2d(x, y)
    model.add(peak >= storage.bound)
    model.add_cumulative(x, [int(storage.size[i]) for i in storage.owner], peak)
    if capacity is None:
        model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 2
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Packing(NOTHING, max(storage.bound, most + 1), Status.INFEASIBLE, "cp-sat")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Packing(NOTHING, storage.bound, Status.UNKNOWN, "cp-sat")
    offset = np.array([solver.value(each) for each in offsets], np.int64)
    bound = storage.bound if capacity is not None else max(storage.bound, int(np.ceil(solver.best_objective_bound - 1e-6)))
    return verdict(storage, offset, capacity, bound, "cp-sat")


def pack_mip(storage: Storage, capacity: int | None = None, seconds: float = 10.0, seed: int = 0) -> Packing:
    """By HiGHS on pairwise binaries; arguments and answer as of `pack`. Beyond some thousand pairs it finds nothing."""
    import highspy

    if pins_clash(storage) is not None:
        return Packing(NOTHING, storage.bound, Status.INFEASIBLE, "mip")
    most, unit, count = ceiling(storage, capacity), storage.alignment, len(storage)
    if storage.bound > most:
        return Packing(NOTHING, storage.bound, Status.INFEASIBLE, "mip")
    instance = make_instance(storage)
    model = highspy.Highs()
    for option, value in (("output_flag", False), ("time_limit", seconds), ("random_seed", seed), ("threads", 1)):
        model.setOptionValue(option, value)
    slots = []
    for i in range(count):
        pin = int(storage.pin[i])
        low, high = (0, max((most - int(storage.size[i])) // unit, 0)) if pin == FREE else (pin // unit, pin // unit)
        slots.append(model.addVariable(lb=low, ub=high, type=highspy.HighsVarType.kInteger))
    peak = model.addVariable(lb=storage.bound, ub=most, obj=1.0)
    for i in range(count):
        size = int(storage.size[i])
        model.addConstr(unit * slots[i] + size <= peak)
        for j in instance.near[instance.near_start[i] : instance.near_start[i + 1]].tolist():
            if j < i and (storage.pin[i] == FREE or storage.pin[j] == FREE):
                below = model.addBinary()
                model.addConstr(unit * slots[i] + size <= unit * slots[j] + most * (1 - below))
                model.addConstr(unit * slots[j] + int(storage.size[j]) <= unit * slots[i] + most * below)
    model.run()
    outcome = model.getModelStatus()
    if outcome == highspy.HighsModelStatus.kInfeasible:
        return Packing(NOTHING, max(storage.bound, most + 1), Status.INFEASIBLE, "mip")
    if model.getInfo().primal_solution_status != 2:
        return Packing(NOTHING, storage.bound, Status.UNKNOWN, "mip")
    values = model.getSolution().col_value
    offset = np.array([round(values[i]) * unit for i in range(count)], np.int64)
    bound = max(storage.bound, int(np.ceil(model.getInfo().mip_dual_bound - 1e-6))) if capacity is None else storage.bound
    return verdict(storage, offset, capacity, bound, "mip")


def ceiling(storage: Storage, capacity: int | None) -> int:
    """The highest peak worth looking at: the capacity, or that of everything stacked above what is pinned."""
    if capacity is not None:
        return capacity
    pinned = (storage.pin + storage.size)[storage.pin != FREE]
    return int(storage.padded.sum() + -(-int(pinned.max(initial=0)) // storage.alignment) * storage.alignment)


def verdict(storage: Storage, offset: np.ndarray, capacity: int | None, bound: int, method: str) -> Packing:
    """The answer of a solver that found these offsets."""
    peak = peak_of(storage, offset)
    done = peak <= (bound if capacity is None else capacity)
    return Packing(offset, min(bound, peak), Status.OPTIMAL if done else Status.FEASIBLE, method)

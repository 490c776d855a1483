"""Storage allocation as a constraint program: rectangles that must not overlap in the plane, for CP-SAT (OR-Tools).

It is what the search is compared with, and tested against. It takes the problem whole, with gaps, pins and alignment.
"""

import numpy as np

from .problem import FREE, Answer, Limit, Packing, Status, Storage, ceiling, verdict, without_empty


@without_empty
def solve(storage: Storage, limit: Limit) -> Packing:
    """The packing that CP-SAT finds. Of more than some 2^60 bytes it finds none, lest sums overflow."""
    from ortools.sat.python import cp_model  # loaded when asked for: it takes longer than most problems

    from ..programs.cpsat import make_solver

    capacity = limit.bytes
    model = cp_model.CpModel()
    unit, most = storage.alignment, ceiling(storage, capacity)
    peak = model.new_int_var(0, most, "peak")
    first, last, _ = storage.sections
    x, y, offsets = [], [], []
    for i in range(len(storage)):
        size, pin = int(storage.size[i]), int(storage.pin[i])
        if pin != FREE and pin + size > most:
            return Answer(Status.INFEASIBLE, storage.bound, None, "cp-sat")
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
    solver = make_solver(limit.seconds, limit.seed)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Answer(Status.INFEASIBLE, max(storage.bound, most + 1), None, "cp-sat")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(Status.UNKNOWN, storage.bound, None, "cp-sat")
    offset = np.array([solver.value(each) for each in offsets], np.int64)
    bound = storage.bound if capacity is not None else max(storage.bound, int(np.ceil(solver.best_objective_bound - 1e-6)))
    return verdict(storage, offset, capacity, bound, "cp-sat")

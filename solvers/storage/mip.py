"""Storage allocation as an integer program, for HiGHS or another solver by name: the form of MEMO's bi-level plan (4.2).

One binary for each pair of neighbours says which lies below, with a big M. It is what the search is compared with, and
tested against. It takes the problem whole, with gaps, pins and alignment.
"""

import time

import numpy as np

from ..programs import linear
from ..programs.names import HIGHS
from .allocate import pins_clash
from .canonical import Instance, make_instance
from .greedy import fit_in_order
from .problem import FREE, Answer, Limit, Packing, Status, Storage, ceiling, verdict, without_empty

GRAIN = 1000  # units of the integer program that the lower bound is long: its tolerances are absolute
TOLERANCE = 1e-9  # of integrality and feasibility: at 1e-6, times the big M, buffers overlap


@without_empty
def solve(storage: Storage, limit: Limit) -> Packing:
    """The packing that an integer program finds; beyond some thousand pairs it finds none.

    The program says only which buffer of a pair lies below: its offsets are fractions, of sizes padded to the alignment. In
    their order the buffers are then put where they fit, in whole bytes, and it is that peak which counts.
    """
    capacity, solver = limit.bytes, limit.solver or HIGHS
    until, most = time.monotonic() + limit.seconds, ceiling(storage, capacity)
    method = "mip" if solver == HIGHS else f"mip ({solver})"
    if pins_clash(storage) is not None or storage.bound > most:
        return Answer(Status.INFEASIBLE, storage.bound, None, method)
    unknown: Packing = Answer(Status.UNKNOWN, storage.bound, None, method)
    unit = storage.bound / GRAIN
    instance = make_instance(storage)
    program = fragmentation(storage, instance, most / unit, unit, until)
    if program is None:
        return unknown
    answer = linear.solve(program, solver, max(until - time.monotonic(), 0.0), limit.seed, 0.0, TOLERANCE)
    if answer.status is Status.INFEASIBLE:
        return Answer(Status.INFEASIBLE, max(storage.bound, most + 1), None, method)
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

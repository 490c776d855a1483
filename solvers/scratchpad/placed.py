"""Residency with addresses, in an order that is given: asked where values fit by their sum and not by address.

A value that stays between two uses keeps its address; one that is loaded again may lie elsewhere. So a few more bytes moved
can make room where none was in one piece. Rectangles, time across and addresses upwards, do not overlap: one for each
op that touches a buffer, and one for each gap in which it stays.
"""

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from ..programs.cpsat import make_solver
from .problem import Answer, Limit, Mapped, Residency, Status, cost_of, find_gaps

Addresses = dict[tuple[int, int], int]  # (buffer, step at which it comes to lie there) -> where


@dataclass(frozen=True)
class Placed:
    """A mapping and its addresses."""

    mapped: Mapped
    addresses: Addresses


def solve_placed(problem: Residency, limit: Limit, start: Answer[Mapped, int], alignment: int = 1) -> Answer[Placed, int]:
    """The best mapping found that has addresses; UNKNOWN where none was found, for another order may have one.

    Args:
        problem: what is mapped.
        limit: how long to search.
        start: the answer without addresses; there is one. Its order is kept, and no mapping with addresses moves fewer bytes
            than its bound.
        alignment: every address is a multiple of it.
    """
    order = start.found.order
    gaps = find_gaps(problem, order)
    model = cp_model.CpModel()
    unit = int(np.gcd.reduce([0, *problem.size]))  # pushed down, everything lies at a sum of sizes
    unit = alignment if unit % alignment or not unit else unit
    tall = [-(-size // unit) for size in problem.size]
    across, upwards = [], []
    place: dict[tuple[int, int], cp_model.IntVar] = {}
    for step, op in enumerate(order):
        for buffer in sorted({*problem.reads[op], *problem.writes[op]}):
            highest = max((problem.capacity - problem.size[buffer]) // unit, 0)  # its padding may stand out
            place[buffer, step] = model.new_int_var(0, highest, f"at {buffer} {step}")
            across.append(model.new_fixed_size_interval_var(step, 1, ""))
            upwards.append(model.new_fixed_size_interval_var(place[buffer, step], tall[buffer], ""))
    goes: dict[tuple[int, int], cp_model.IntVar] = {}
    stored: dict[int, cp_model.IntVar] = {}
    for buffer, after, until in zip(gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist(), strict=True):
        goes[buffer, until] = gone = model.new_bool_var(f"goes {buffer} {until}")
        model.add(place[buffer, after] == place[buffer, until]).only_enforce_if(~gone)
        if until > after + 1:
            width = until - after - 1
            across.append(model.new_optional_fixed_size_interval_var(after + 1, width, ~gone, ""))
            upwards.append(model.new_optional_fixed_size_interval_var(place[buffer, after], tall[buffer], ~gone, ""))
        if problem.fresh[buffer]:
            stored.setdefault(buffer, model.new_bool_var(f"stored {buffer}"))
            model.add_implication(gone, stored[buffer])
        model.add_hint(gone, int((buffer, until) in start.found.dropped))
    model.add_no_overlap_2d(across, upwards)
    size = problem.size
    moved = sum(size[b] * gone for (b, _), gone in goes.items()) + sum(size[b] * each for b, each in stored.items())
    model.add(moved >= start.bound)
    model.minimize(moved)
    solver = make_solver(limit.seconds, limit.seed)
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(Status.UNKNOWN, start.bound)
    dropped = frozenset(key for key, gone in goes.items() if solver.boolean_value(gone))
    begins = {(b, order.index(op)) for b, op in enumerate(problem.producer) if op >= 0}
    begins |= {(b, min(order.index(use) for use in uses)) for b, uses in enumerate(problem.readers)
               if problem.producer[b] < 0 and uses}  # fmt: skip
    found = {key: solver.value(place[key]) * unit for key in sorted(begins | dropped)}
    mapped = Mapped(order, dropped, cost_of(problem, dropped))
    status = Status.OPTIMAL if mapped.bytes <= start.bound else Status.FEASIBLE
    return Answer(status, start.bound, Placed(mapped, found), "with addresses")

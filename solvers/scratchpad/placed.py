"""Residency with addresses, in an order that is given: asked where values fit by their sum and not by address.

A value that stays between two uses keeps its address; one that is loaded again may lie elsewhere. So a few more bytes moved
can make room where none was in one piece. Rectangles, time across and addresses upwards, do not overlap: one for each
op that touches a buffer, and one for each gap in which it stays.
"""

from collections.abc import Sequence

import numpy as np
from ortools.sat.python import cp_model

from ..programs.cpsat import make_solver
from .residency import Mapped, Residency, cost_of, find_gaps

Addresses = dict[tuple[int, int], int]  # (buffer, step at which it comes to lie there) -> where


def solve_placed(
    problem: Residency, order: Sequence[int], start: Mapped, alignment: int = 1, seconds: float = 10.0, seed: int = 0
) -> tuple[Mapped, Addresses] | None:
    """The best mapping found that has addresses, and they; None where none was found in time.

    Args:
        problem: what is mapped.
        order: of its ops.
        start: the best without addresses, in this order: no mapping with addresses moves fewer bytes than its bound.
        alignment: every address is a multiple of it.
        seconds: to search for, at most.
        seed: of the search.
    """
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
        model.add_hint(gone, int((buffer, until) in start.dropped))
    model.add_no_overlap_2d(across, upwards)
    size = problem.size
    moved = sum(size[b] * gone for (b, _), gone in goes.items()) + sum(size[b] * each for b, each in stored.items())
    model.add(moved >= start.bound)
    model.minimize(moved)
    solver = make_solver(seconds, seed)
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    dropped = frozenset(key for key, gone in goes.items() if solver.boolean_value(gone))
    begins = {(b, order.index(op)) for b, op in enumerate(problem.producer) if op >= 0}
    begins |= {(b, min(order.index(use) for use in uses)) for b, uses in enumerate(problem.readers)
               if problem.producer[b] < 0 and uses}  # fmt: skip
    found = {key: solver.value(place[key]) * unit for key in sorted(begins | dropped)}
    return Mapped(tuple(order), dropped, cost_of(problem, dropped), start.bound), found

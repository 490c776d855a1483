"""What stays and what goes in an order that is given: an exact choice for each gap, stay or go.

There is a row for each step that is too full, and of steps with the same gaps the tightest has one: CP-SAT takes milliseconds.
Solvers of linear programs, by name, take the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from ..programs import linear
from ..programs.cpsat import make_solver
from .problem import NOTHING, Answer, Gaps, Limit, Mapped, Residency, cost_of, find_gaps, verdict
from .waists import one_order

TOLERANCE = 1e-9  # of integrality and of rows in linear programs, and of their bounds


def solve(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """The best of the base order. Of other orders it knows nothing: its bound is 0 unless there are none."""
    answer = solve_ordered(problem, range(len(problem.reads)), limit)
    return answer if answer.best is None or one_order(problem) else verdict(answer.best, 0, answer.method)


def solve_ordered(problem: Residency, order: Sequence[int], limit: Limit) -> Answer[Mapped, int]:
    """The best of what an order allows; status and bound are of mappings in this order.

    Args:
        problem: what is mapped.
        order: each op once, after what it reads.
        limit: its solver is one of linear programs; default: CP-SAT, which takes a fraction of the time.
    """
    gaps = find_gaps(problem, order)
    if len(gaps.room) and gaps.room.min() < 0:
        return NOTHING
    choice = find_choice(problem, gaps)
    if not choice.rows:
        return verdict(Mapped(tuple(order), frozenset(), 0), 0, "in order")
    goes, bound = by_sat(choice, limit) if limit.solver is None else by_linear(choice, limit.solver, limit)
    gone = choice.pressed if goes is None else goes
    dropped = frozenset((int(gaps.buffer[gap]), int(gaps.until[gap])) for gap in gone)
    return verdict(Mapped(tuple(order), dropped, cost_of(problem, dropped)), bound, "in order")


@dataclass(frozen=True)
class Choice:
    """Stay or go, for each gap that is around a full step.

    Steps where everything fits have no row, and of steps with the same gaps the tightest has one.

    Attributes:
        rows: gaps around a step, and the bytes of them that have to go.
        pressed: the gaps that some row has.
        size: bytes of each of those gaps.
        stored: for each buffer of theirs that has to be stored before it goes, its bytes.
        buffer: for each gap its buffer.
    """

    rows: dict[tuple[int, ...], int]
    pressed: list[int]
    size: dict[int, int]
    stored: dict[int, int]
    buffer: dict[int, int]


def find_choice(problem: Residency, gaps: Gaps) -> Choice:
    """What has to be chosen in an order whose gaps are known."""
    size = np.array(problem.size, np.int64)
    rows: dict[tuple[int, ...], int] = {}
    for crossed, room in zip(gaps.crossed, gaps.room.tolist(), strict=True):
        more = int(size[gaps.buffer[crossed]].sum()) - room if len(crossed) else 0
        if more > 0:
            key = tuple(crossed.tolist())
            rows[key] = max(rows.get(key, more), more)
    pressed = sorted({gap for row in rows for gap in row})
    buffer = {gap: int(gaps.buffer[gap]) for gap in pressed}
    stored = {each: problem.size[each] for each in sorted(set(buffer.values())) if problem.fresh[each]}
    return Choice(rows, pressed, {gap: problem.size[buffer[gap]] for gap in pressed}, stored, buffer)


def by_sat(choice: Choice, limit: Limit) -> tuple[list[int] | None, int]:
    """The gaps that go, by CP-SAT, or None where none were found in time; and the bytes that no choice is below."""
    model, size = cp_model.CpModel(), choice.size
    goes = {gap: model.new_bool_var(f"goes {gap}") for gap in choice.pressed}
    stored = {buffer: model.new_bool_var(f"stored {buffer}") for buffer in choice.stored}
    for row, more in choice.rows.items():
        model.add(sum(size[gap] * goes[gap] for gap in row) >= more)
    for gap in choice.pressed:
        if choice.buffer[gap] in stored:
            model.add_implication(goes[gap], stored[choice.buffer[gap]])
    loads = sum(size[gap] * goes[gap] for gap in choice.pressed)
    model.minimize(loads + sum(choice.stored[buffer] * stored[buffer] for buffer in stored))
    solver = make_solver(limit.seconds, limit.seed)
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, 0
    return [gap for gap in choice.pressed if solver.boolean_value(goes[gap])], int(np.ceil(solver.best_objective_bound - 1e-6))


def by_linear(choice: Choice, solver: str, limit: Limit) -> tuple[list[int] | None, int]:
    """The same by a solver of linear programs, in units that divide all sizes. What it misses in floating point goes too."""
    unit = int(np.gcd.reduce([*choice.size.values()]))
    column = {gap: at for at, gap in enumerate(choice.pressed)}
    first = {buffer: len(column) + at for at, buffer in enumerate(choice.stored)}
    rows: list[linear.Row] = [
        ([column[gap] for gap in row], [choice.size[gap] / unit for gap in row], float(-(-more // unit)))
        for row, more in choice.rows.items()
    ]
    rows += [([first[buffer], column[gap]], [1.0, -1.0], 0.0) for gap, buffer in choice.buffer.items() if buffer in first]
    cost = np.array([*choice.size.values(), *choice.stored.values()]) / unit
    count = len(cost)
    program = linear.of_rows(cost, np.zeros(count), np.ones(count), rows, np.ones(count, bool))
    found = linear.solve(program, solver, limit.seconds, limit.seed, tolerance=TOLERANCE)
    bound = int(np.ceil(max(found.bound, 0.0) * (1 - TOLERANCE) - 1e-6)) * unit if np.isfinite(found.bound) else 0
    if not len(found.values):
        return None, bound
    goes = {gap for gap in choice.pressed if found.values[column[gap]] > 0.5}
    for row, more in choice.rows.items():
        staying = sorted((gap for gap in row if gap not in goes), key=choice.size.__getitem__)
        short = more - sum(choice.size[gap] for gap in row if gap in goes)
        while short > 0:
            goes.add(staying[-1])
            short -= choice.size[staying.pop()]
    return sorted(goes), bound

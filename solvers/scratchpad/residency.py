"""Which values wait in a scratchpad between their uses, and which leave it, in an order that is given.

Each op of a step needs what it reads and what it writes in the scratchpad at once. Between two uses a value either stays
there or is dropped and loaded again. A value that an op has made must be stored before it may be dropped, once however
often it is loaded; one that lies in the large memory from the start need not. First loads and the stores
of outputs are *compulsory*: every mapping has them. All other bytes are what a mapping is judged by (COSMA, arXiv
2311.18246, equation 12).

Addresses are left out: they come after, from `allocate.py`, and where none exist for an answer `placed.py` chooses again, with
them. With addresses in the program its relaxation says nothing until residents are also made to fit by their sum, and
then the addresses only slow it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ortools.sat.python import cp_model

from ..programs import linear
from ..programs.cpsat import make_solver

TOLERANCE = 1e-9  # of integrality and of rows in linear programs, and of their bounds


@dataclass(frozen=True)
class Residency:
    """Ops over buffers and a scratchpad.

    Attributes:
        size: bytes of each buffer.
        reads: for each op the buffers it reads, each once.
        writes: for each op the buffers it makes; a buffer that none makes lies in the large memory from the start.
        capacity: bytes of the scratchpad.
        outputs: buffers that an op makes and that must be stored whatever happens.
        edges: pairs of ops of which the first runs before the second, beside what reads say.
    """

    size: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    capacity: int
    outputs: tuple[int, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """For each buffer the op that makes it, or -1."""
        made = [-1] * len(self.size)
        for op, buffers in enumerate(self.writes):
            for buffer in buffers:
                made[buffer] = op
        return tuple(made)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each buffer the ops that read it, in base order."""
        found: list[list[int]] = [[] for _ in self.size]
        for op, buffers in enumerate(self.reads):
            for buffer in buffers:
                found[buffer].append(op)
        return tuple(map(tuple, found))

    @cached_property
    def before(self) -> tuple[tuple[int, ...], ...]:
        """For each op the ops that run before it: those whose results it reads, and those that an edge leads from."""
        found = [{self.producer[buffer] for buffer in buffers} - {-1} for buffers in self.reads]
        for earlier, later in self.edges:
            found[later].add(earlier)
        return tuple(tuple(sorted(ops)) for ops in found)

    @cached_property
    def need(self) -> tuple[int, ...]:
        """Bytes that each op has in the scratchpad while it runs."""
        return tuple(
            sum(self.size[b] for b in {*reads, *writes}) for reads, writes in zip(self.reads, self.writes, strict=True)
        )

    @cached_property
    def compulsory(self) -> int:
        """Bytes that every mapping moves: what lies in the large memory and is read, once in, and the outputs, once out."""
        loaded = sum(size for size, op, uses in zip(self.size, self.producer, self.readers, strict=True) if op < 0 and uses)
        return loaded + sum(self.size[buffer] for buffer in self.outputs)

    @cached_property
    def fresh(self) -> tuple[bool, ...]:
        """For each buffer whether the large memory would not have it if nobody stored it there for room's sake."""
        return tuple(op >= 0 and buffer not in self.outputs for buffer, op in enumerate(self.producer))


@dataclass(frozen=True)
class Gaps:
    """What lies between uses that follow each other, in an order.

    Attributes:
        buffer: whose uses they are, shape (gaps,).
        after: the step of the earlier use, or of the making.
        until: the step of the later use; the value is in the way of the steps between them.
        room: for each step the bytes that its op leaves, shape (steps,).
    """

    buffer: np.ndarray
    after: np.ndarray
    until: np.ndarray
    room: np.ndarray

    @cached_property
    def crossed(self) -> list[np.ndarray]:
        """For each step the gaps around it."""
        rows: list[list[int]] = [[] for _ in self.room]
        for gap, (low, high) in enumerate(zip(self.after.tolist(), self.until.tolist(), strict=True)):
            for step in range(low + 1, high):
                rows[step].append(gap)
        return [np.array(row, np.int64) for row in rows]


@dataclass(frozen=True)
class Mapped:
    """An order with what is dropped, and what is known of any other.

    Attributes:
        order: ops by step.
        dropped: (buffer, step of the use before which it is loaded again).
        bytes: moved beyond the compulsory ones.
        bound: no mapping moves fewer; from `solve_ordered`, none in the same order.
        again: (buffer, step before which the op that made it runs once more).
    """

    order: tuple[int, ...]
    dropped: frozenset[tuple[int, int]]
    bytes: int
    bound: int
    again: frozenset[tuple[int, int]] = frozenset()


def find_gaps(problem: Residency, order: Sequence[int]) -> Gaps:
    """The gaps of an order."""
    last: dict[int, int] = {}
    rows = []
    for step, op in enumerate(order):
        for buffer in problem.reads[op]:
            if buffer in last:
                rows.append((buffer, last[buffer], step))
            last[buffer] = step
        for buffer in problem.writes[op]:
            last[buffer] = step
    table = np.array(rows, np.int64).reshape(-1, 3)
    room = problem.capacity - np.array([problem.need[op] for op in order], np.int64)
    return Gaps(*table.T, room)  # type: ignore[misc]


def cost_of(problem: Residency, dropped: frozenset[tuple[int, int]] | set[tuple[int, int]]) -> int:
    """Bytes moved for what is dropped: each load, and for what an op made one store."""
    stored = {buffer for buffer, _ in dropped if problem.fresh[buffer]}
    return sum(problem.size[buffer] for buffer, _ in dropped) + sum(problem.size[buffer] for buffer in stored)


def solve_ordered(
    problem: Residency, order: Sequence[int], seconds: float = 10.0, seed: int = 0, solver: str | None = None
) -> Mapped | None:
    """The best of what an order allows; None where an op alone does not fit.

    Args:
        problem: what is mapped.
        order: each op once, after what it reads.
        seconds: to search for, at most.
        seed: of the search.
        solver: of linear programs (`programs/names.py`); default: CP-SAT, which takes a fraction of the time.
    """
    gaps = find_gaps(problem, order)
    if len(gaps.room) and gaps.room.min() < 0:
        return None
    choice = find_choice(problem, gaps)
    if not choice.rows:
        return Mapped(tuple(order), frozenset(), 0, 0)
    goes, bound = by_sat(choice, seconds, seed) if solver is None else by_linear(choice, solver, seconds, seed)
    gone = choice.pressed if goes is None else goes
    dropped = frozenset((int(gaps.buffer[gap]), int(gaps.until[gap])) for gap in gone)
    return Mapped(tuple(order), dropped, cost_of(problem, dropped), bound)


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


def by_sat(choice: Choice, seconds: float, seed: int) -> tuple[list[int] | None, int]:
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
    solver = make_solver(seconds, seed)
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, 0
    return [gap for gap in choice.pressed if solver.boolean_value(goes[gap])], int(np.ceil(solver.best_objective_bound - 1e-6))


def by_linear(choice: Choice, solver: str, seconds: float, seed: int) -> tuple[list[int] | None, int]:
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
    found = linear.solve(program, solver, seconds, seed, tolerance=TOLERANCE)
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

"""Which order and which residency move the fewest bytes through a scratchpad: the statement, the answer, its check and score.

Each op of a step needs what it reads and what it writes in the scratchpad at once. Between two uses a value either stays
there or is dropped and loaded again. A value that an op has made must be stored before it may be dropped, once however
often it is loaded; one that lies in the large memory from the start need not. First loads and the stores
of outputs are *compulsory*: every mapping has them. All other bytes are what a mapping is judged by (COSMA, arXiv
2311.18246, equation 12), and what the bound of an answer is of: `fault` checks a mapping and `cost_of` scores it.

Addresses are left out: they come after, from `solvers/storage`, and where none exist for an answer `placed.py` chooses again,
with them. With addresses in the program its relaxation says nothing until residents are also made to fit by their sum, and
then the addresses only slow it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..face.answer import Answer, Limit, Status


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
    """An order with what is dropped.

    Attributes:
        order: ops by step.
        dropped: (buffer, step of the use before which it is loaded again).
        bytes: moved beyond the compulsory ones.
        again: (buffer, step before which the op that made it runs once more).
    """

    order: tuple[int, ...]
    dropped: frozenset[tuple[int, int]]
    bytes: int
    again: frozenset[tuple[int, int]] = frozenset()


NOTHING: Answer[Mapped, int] = Answer(Status.INFEASIBLE, 0)  # an op alone does not fit


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


def with_capacity(problem: Residency, capacity: int) -> Residency:
    """The same ops with another scratchpad."""
    return replace(problem, capacity=capacity)


def verdict(mapped: Mapped, bound: int, method: str = "") -> Answer[Mapped, int]:
    """The answer of a way that found a mapping, and knows that none moves fewer bytes than a bound."""
    return Answer(Status.OPTIMAL if mapped.bytes <= bound else Status.FEASIBLE, bound, mapped, method)


def fault(problem: Residency, mapped: Mapped) -> str:
    """What is wrong with a mapping that runs no op again, in words; empty where nothing is."""
    if sorted(mapped.order) != list(range(len(problem.reads))):
        return "not every op runs once"
    step = {op: at for at, op in enumerate(mapped.order)}
    for op, others in enumerate(problem.before):
        for other in others:
            if step[other] > step[op]:
                return f"op {op} runs before op {other}, which it waits for"
    gaps = find_gaps(problem, mapped.order)
    rows = list(zip(gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist(), strict=True))
    for buffer, at in mapped.dropped - {(buffer, until) for buffer, _, until in rows}:
        return f"buffer {buffer} is loaded again at step {at}, which does not use it again"
    room = gaps.room.copy()
    for buffer, after, until in rows:
        if (buffer, until) not in mapped.dropped:
            room[after + 1 : until] -= problem.size[buffer]
    if (room < 0).any():
        return f"step {int(room.argmin())} has {-int(room.min())} bytes too many in the scratchpad"
    moved = cost_of(problem, mapped.dropped)
    return "" if moved == mapped.bytes else f"{moved} bytes move, not {mapped.bytes}"


__all__ = [
    "NOTHING", "Answer", "Gaps", "Limit", "Mapped", "Residency", "Status",
    "cost_of", "fault", "find_gaps", "verdict", "with_capacity",
]  # fmt: skip

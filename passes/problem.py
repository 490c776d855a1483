"""Program -> rematerialisation problem: the border between the nouns and the solvers' arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..planner.ir.machine import Machine
from ..planner.ir.program import Op, Program
from ..solvers.remat.problem import NO_TIERS, Problem
from .transfers import routes_of


@dataclass(frozen=True)
class Flat:
    """A problem and the way back.

    Attributes:
        problem: the arrays.
        buffers: the program's index of each of the problem's buffers.
        ops: the program's index of the op at each base time.
    """

    problem: Problem
    buffers: np.ndarray
    ops: np.ndarray


def flatten(
    program: Program, order: Sequence[int] | None = None, machine: Machine | None = None, homes: Mapping[int, int] | None = None
) -> Flat:
    """The arrays of a program whose costs are filled in; its resident buffers on the device become one sum.

    Args:
        program: what is to be planned.
        order: the base order, as op indices; default: the program's own.
        machine: whose tiers behind the device may be used; default: none.
        homes: resident buffers that lie in such a tier before and after the step, and its number, from 1.
    """
    homes = homes or {}
    base = list(range(len(program.ops))) if order is None else list(order)
    ops = [program.ops[index] for index in base]
    when = {index: time for time, index in enumerate(base)}
    owned = [*(buffer for buffer, op in enumerate(program.producer) if op >= 0), *homes]
    index = {buffer: position for position, buffer in enumerate(owned)}
    reads = [[index[buffer] for buffer in op.reads if buffer in index] for op in ops]
    writes = [[index[buffer] for buffer in op.writes] for op in ops]
    reuse = [[(index[new], index[old]) for new, old in op.reuse if old in index] for op in ops]
    changed_start, changed = ragged([[index[buffer] for buffer in op.mutates if buffer in homes] for op in ops])
    uses: list[list[int]] = [[] for _ in owned]
    for at, row in enumerate(reads):
        for buffer in row:
            uses[buffer].append(at)
    read_start, read = ragged(reads)
    write_start, write = ragged(writes)
    use_start, use = ragged(uses)
    reuse_start, _ = ragged([[0] * len(row) for row in reuse])
    outputs = set(program.outputs)
    return Flat(
        Problem(
            seconds=np.array([op.seconds for op in ops]),
            workspace=np.array([op.workspace for op in ops], np.int64),
            size=np.array([program.buffers[buffer].bytes for buffer in owned], np.int64),
            producer=np.array([when.get(program.producer[buffer], len(ops)) for buffer in owned], np.int32),
            read_start=read_start,
            read=read,
            write_start=write_start,
            write=write,
            reuse_start=reuse_start,
            reuse_new=np.array([new for row in reuse for new, _ in row], np.int32),
            reuse_old=np.array([old for row in reuse for _, old in row], np.int32),
            use_start=use_start,
            use=use,
            output=np.array([buffer in outputs for buffer in owned], np.bool_),
            repeatable=repeatable_until(ops),
            resident=program.resident_bytes - sum(program.buffers[buffer].bytes for buffer in homes),
            boundary=when.get(program.boundary, len(ops)),
            tiers=NO_TIERS if machine is None else tiers_of(machine),
            home=np.array([homes.get(buffer, 0) for buffer in owned], np.int8),
            changed_start=changed_start,
            changed=changed,
            kind=kinds_of(ops),
        ),
        np.array(owned, np.int32),
        np.array(base, np.int32),
    )


def repeatable_until(ops: Sequence[Op]) -> np.ndarray:
    """`Problem.repeatable` of ops in base order: what reads a resident buffer may not run again once that has been changed."""
    changed: dict[int, int] = {}
    for at, op in enumerate(ops):
        for buffer in op.mutates:
            changed.setdefault(buffer, at)
    end = len(ops)
    limits = [min((changed.get(buffer, end) for buffer in op.reads), default=end) for op in ops]
    return np.array([limit if op.repeatable else 0 for op, limit in zip(ops, limits, strict=True)], np.int32)


def kinds_of(ops: Sequence[Op]) -> np.ndarray:
    """`Problem.kind` of ops in base order: those with one key do the same."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(op.key, len(number)) for op in ops], np.int32)


def tiers_of(machine: Machine) -> np.ndarray:
    """`Problem.tiers` of a machine."""
    rows = []
    for route in routes_of(machine):
        out, back = machine.links[route.out], machine.links[route.back]
        ways = out.bandwidth, out.latency, out.load, back.bandwidth, back.latency, back.load
        rows.append((*ways, float(machine.tiers[route.tier].capacity), machine.rate_beside(route.out)))
    return np.array(rows, float).reshape(-1, 8)


def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (start of each row and the end, all values)."""
    start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=start[1:])
    return start, np.array([value for row in rows for value in row], np.int32)

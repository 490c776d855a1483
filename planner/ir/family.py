"""`Family`: one step at every size of its inputs.

The ops, what they read and write, and their order are those of one program; what a size decides (bytes, keys, FLOPs, traffic,
scratch space, and which op may write in place) is computed by one function of the sizes. A program made that way is an ordinary
one: the referee judges a schedule of it as of any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from .errors import InvalidSchedule, MemplanError
from .program import Program
from .schedule import Schedule

Sizes = tuple[int, ...]


class Row(NamedTuple):
    """Where the figures of an op stand, for all ops that are alike.

    Attributes:
        key: index into the keys.
        flops: index into the numbers, as the others.
        traffic: of bytes read and written.
        workspace: of bytes beside the results.
    """

    key: int
    flops: int
    traffic: int
    workspace: int


class Figures(NamedTuple):
    """What a function of the sizes gives.

    Attributes:
        numbers: that ops, buffers and pairs name by index; of a pair, whether it may be written in place.
        keys: of ops.
    """

    numbers: Sequence[float]
    keys: Sequence[str]


@dataclass(frozen=True)
class Family:
    """One program for every size.

    Attributes:
        program: at the sizes of the example.
        base: these sizes.
        names: of the sizes.
        figures: from sizes to figures.
        buffers: for each buffer where the figures have its bytes.
        rows: of the ops, each once.
        row_of: for each op its row.
        pairs: for each op that has some, the pairs that it may write in place, and where the figures say whether.
    """

    program: Program
    base: Sizes
    names: tuple[str, ...]
    figures: Callable[..., Figures]
    buffers: tuple[int, ...]
    rows: tuple[Row, ...]
    row_of: tuple[int, ...]
    pairs: dict[int, tuple[tuple[tuple[int, int], int], ...]] = field(default_factory=dict)

    def at(self, sizes: Sizes) -> Program:
        """The program at other sizes, without costs: as a capture at these sizes gives it.

        Raises:
            MemplanError: the sizes are not as many as there are names.
        """
        if len(sizes) != len(self.names):
            raise MemplanError(f"{len(sizes)} sizes for {', '.join(self.names)}: give {len(self.names)}")
        numbers, keys = self.figures(*sizes)
        replace = msgspec.structs.replace
        buffers = tuple(
            buffer if buffer.bytes == numbers[at] else replace(buffer, bytes=int(numbers[at]))
            for buffer, at in zip(self.program.buffers, self.buffers, strict=True)
        )
        ops = list(self.program.ops)
        for index, (op, at) in enumerate(zip(self.program.ops, self.row_of, strict=True)):
            row = self.rows[at]
            found = self.pairs.get(index)
            reuse = op.reuse if found is None else tuple(pair for pair, holds in found if numbers[holds])
            ops[index] = replace(
                op, key=keys[row.key], flops=float(numbers[row.flops]), traffic=int(numbers[row.traffic]),
                workspace=int(numbers[row.workspace]), reuse=reuse,
            )  # fmt: skip
        return Program(self.program.name, buffers, tuple(ops), self.program.outputs, self.program.device)


def rebound(schedule: Schedule, known: Program, program: Program) -> Schedule:
    """A schedule of one member of a family for another, which the referee has to judge before it is used.

    Ops and buffers have the same numbers in both, so that its instructions mean the same. Nothing says that they fit or are
    allowed: that is the referee's to say.

    Args:
        schedule: for `known`.
        known: the program that it was made for.
        program: the other.

    Raises:
        InvalidSchedule: the schedule is not `known`'s, has addresses or homes, or the programs are not of one family.
    """
    if schedule.program != known.digest:
        raise InvalidSchedule("bound", None, f"it was made for program {schedule.program[:12]}, not for {known.digest[:12]}")
    if schedule.placements or schedule.homes or schedule.lent or schedule.outside:
        raise InvalidSchedule("bound", None, "addresses and homes hold for one size alone: plan without arena and offload")
    if [shape_of(op) for op in known.ops] != [shape_of(op) for op in program.ops] or known.outputs != program.outputs:
        raise InvalidSchedule("bound", None, f"{program.name} at these sizes has other ops: plan for them")
    return msgspec.structs.replace(schedule, program=program.digest)


def shape_of(op: object) -> tuple:
    """What the members of a family have in common of an op."""
    return op.target, op.phase, op.reads, op.writes, op.mutates, op.repeatable, op.random  # type: ignore[attr-defined]

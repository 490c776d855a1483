"""Updates as early as they may run: a parameter's new value right after its gradient, once nobody reads the old one."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..planner.ir.program import Phase, Program


@dataclass(frozen=True)
class Promptly:
    """Order -> the same with each in-backward update moved to behind the last op that it has to follow."""

    name = "promptly"

    def __call__(self, program: Program, order: Sequence[int]) -> list[int]:
        """The order.

        Args:
            program: whose ops are ordered.
            order: each op once.
        """
        updates = [index for index in order if is_update(program, index)]
        rest = [index for index in order if not is_update(program, index)]
        made = {buffer: at for at, index in enumerate(rest) for buffer in program.ops[index].writes}
        read = {buffer: at for at, index in enumerate(rest) for buffer in program.ops[index].reads}
        behind: dict[int, list[int]] = {}
        for index in updates:
            op = program.ops[index]
            waits = [made[buffer] for buffer in op.reads if buffer in made]
            waits += [read[buffer] for buffer in op.mutates if buffer in read]
            at = max(waits, default=program.boundary)
            made |= dict.fromkeys(op.writes, at)  # what says in which order several change the same
            behind.setdefault(at, []).append(index)
        return [index for at, first in enumerate(rest) for index in (first, *behind.get(at, ()))]


def is_update(program: Program, index: int) -> bool:
    """Whether an op changes resident buffers in the backward pass."""
    op = program.ops[index]
    return op.phase is Phase.BACKWARD and bool(op.mutates)

"""Which resident buffers may be at home in another tier between steps; those that had better go there first.

Parameters and optimizer state are all of them read in every step, so moving one costs the same whichever it is: its bytes over
the link, once for each part of the step that reads it, and back if it is changed. What differs is how often: state is read
once, a parameter twice (once in an inference). So state goes first; of two alike, the one whose last reader comes first: more
of the step is left behind which it can go home, and, for a parameter, comes before its first reader.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

from ..planner.ir.program import Kind, Phase, Program
from .promptly import Promptly

SMALL = 1 << 16  # bytes: what is smaller costs more in latency than it frees
KINDS = (Kind.STATE, Kind.PARAMETER)


@dataclass(frozen=True)
class Homes:
    """Program -> the resident buffers that may be at home elsewhere; a list of which any beginning is a good choice.

    Attributes:
        room: bytes that there are for them.
        shared: buffers that several tensors share, which stay: only a tensor that has its memory to itself can be sent away.
    """

    name = "homes"
    room: int = 2**62
    shared: Collection[int] = ()

    def __call__(self, program: Program) -> tuple[int, ...]:
        """Their indices: state, then parameters."""
        found = [buffer for buffer in candidates(program) if buffer not in self.shared]
        ranked = [buffer for kind in KINDS for buffer in found if program.buffers[buffer].kind is kind]
        through = accumulate(program.buffers[buffer].bytes for buffer in ranked)
        return tuple(buffer for buffer, size in zip(ranked, through, strict=True) if size <= self.room)


def candidates(program: Program) -> list[int]:
    """Parameters and state that only this program's ops read and change, those first whose last reader comes first.

    What the caller's own optimizer changes after the step stays on the device: parameters of a training step without updates
    in backward, and all state then.
    """
    whole = any(op.phase is Phase.UPDATE for op in program.ops)
    left = any(program.buffers[buffer].kind is Kind.GRADIENT for buffer in program.outputs)
    if whole or left:
        return []
    order = Promptly()(program, range(len(program.ops)))
    last = {buffer: at for at, index in enumerate(order) for buffer in program.ops[index].reads}
    unread = {buffer for op in program.ops for buffer in set(op.mutates) - set(op.reads)}
    found = [
        buffer
        for buffer, value in enumerate(program.buffers)
        if value.kind in KINDS and value.bytes >= SMALL and buffer in last and buffer not in unread
        and program.producer[buffer] < 0 and buffer not in program.outputs
    ]  # fmt: skip
    return sorted(found, key=lambda buffer: last[buffer])

"""Which resident buffers may lie in another tier between their uses, and in which order they had better go there.

Parameters and optimizer state are all of them read in every step, so moving one costs the same whichever it is: its bytes over
the link, once for each part of the step that reads it, and back if it is changed. What differs is how often: state is read
once, a parameter twice (once in an inference). So state goes first; of two alike, the one whose last reader comes first: more
of the step is left behind which it can go home, and, for a parameter, comes before its first reader.
"""

from dataclasses import dataclass
from itertools import accumulate

from ..planner.program import Kind, Phase, Program
from .promptly import Promptly

SMALL = 1 << 16  # bytes: what is smaller costs more in latency than it frees


@dataclass(frozen=True)
class Homes:
    """Program -> sets of resident buffers to have at home elsewhere, from none to all that can be.

    Attributes:
        parts: into how many steps each kind is divided.
        room: bytes that there are for them; what does not fit stays.
    """

    name = "homes"
    parts: int = 2
    room: int = 2**62

    def __call__(self, program: Program) -> list[tuple[int, ...]]:
        """The sets, each holding the one before it; the first is empty."""
        found: list[tuple[int, ...]] = [()]
        for kind in (Kind.STATE, Kind.PARAMETER):
            mine = [buffer for buffer in candidates(program) if program.buffers[buffer].kind is kind]
            before = found[-1]
            left = self.room - sum(program.buffers[buffer].bytes for buffer in before)
            sizes = accumulate(program.buffers[buffer].bytes for buffer in mine)
            mine = [buffer for buffer, size in zip(mine, sizes, strict=True) if size <= left]
            found += [(*before, *part) for part in divided(program, mine, self.parts)]
        return found


def divided(program: Program, buffers: list[int], parts: int) -> list[list[int]]:
    """Beginnings of a list that hold about one part, two parts and so on of its bytes; the last is all of it."""
    made: list[list[int]] = []
    done, total = 0, sum(program.buffers[buffer].bytes for buffer in buffers)
    for number, buffer in enumerate(buffers, 1):
        done += program.buffers[buffer].bytes
        if done * parts >= total * (len(made) + 1):
            made.append(buffers[:number])
    return made


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
    kinds = (Kind.PARAMETER, Kind.STATE)
    found = [
        buffer
        for buffer, value in enumerate(program.buffers)
        if value.kind in kinds and value.bytes >= SMALL and buffer in last and buffer not in unread
        and program.producer[buffer] < 0 and buffer not in program.outputs
    ]  # fmt: skip
    return sorted(found, key=lambda buffer: last[buffer])

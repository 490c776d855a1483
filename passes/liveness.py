"""An order of ops -> a schedule: what each run keeps, where it writes in place, and when each buffer is freed.

An order lists ops by index, in time; an op that appears twice is rematerialised. Everything else follows: a buffer
lives from a run of its producer to its last read before the next run of its producer (or to the end, if it is an
output of the program and that is the last run).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..planner.ir.program import Phase, Program
from ..planner.ir.schedule import Free, Instruction, Run, Schedule, Start


@dataclass(frozen=True)
class Liveness:
    """Order of ops -> schedule with the shortest lives.

    Attributes:
        in_place: let ops take over the bytes of a buffer that they are the last to read.
        only: which ops may; None for all.
    """

    name = "liveness"
    in_place: bool = True
    only: Container[int] | None = None

    def __call__(self, program: Program, order: Sequence[int]) -> Schedule:
        """The schedule that runs `order`.

        Args:
            program: whose ops are ordered.
            order: op indices in time order; each op at least once, inputs before readers.
        """
        last_read = last_reads(program, order)
        end = len(order)
        instructions: list[Instruction] = []
        for at, index in enumerate(order):
            op = program.ops[index]
            keep = tuple(buffer for buffer in op.writes if last_read[at, buffer] > at)
            dying = {buffer for buffer in op.reads if last_read.get((at, buffer), end) == at}
            reuse: list[tuple[int, int]] = []
            if self.in_place and (self.only is None or index in self.only):
                for new, old in op.reuse:
                    if new in keep and old in dying and program.buffers[new].bytes == program.buffers[old].bytes:
                        reuse.append((new, old))
                        dying.discard(old)
                        break
            instructions.append(Run(op=index, keep=keep, reuse=tuple(reuse)))
            instructions.extend(Free(buffer) for buffer in sorted(dying))
        return Schedule(program=program.digest, instructions=tuple(instructions))


def last_reads(program: Program, order: Sequence[int], homes: Container[int] = ()) -> dict[tuple[int, int], int]:
    """For each (position, buffer written or read there) the last position of the buffer's life; -1 if it is not needed.

    The key of a read is present only where the buffer has a producer or is one of `homes`, which may be resident buffers, or
    outputs that need not stay on the device. A number below zero in the order, `-1 - buffer`, is the buffer's fetch from
    another tier, which begins a life as its writing does.
    """
    end = len(order)
    wanted = {buffer: end for buffer in program.outputs if buffer not in homes}
    owned = program.producer
    result: dict[tuple[int, int], int] = {}
    current = dict(wanted)
    first: dict[int, int] = {}
    for at, index in enumerate(order):
        first.setdefault(index, at)
    for at in range(end - 1, -1, -1):
        if order[at] < 0:
            result[at, -1 - order[at]] = current.pop(-1 - order[at], -1)
            continue
        op = program.ops[order[at]]
        for buffer in op.writes:
            held = buffer in wanted and first[order[at]] != at
            result[at, buffer] = -1 if held else current.pop(buffer, -1)
        for buffer in op.reads:
            if owned[buffer] >= 0 or buffer in homes:
                result[at, buffer] = current.setdefault(buffer, at)
    return result


def held_bytes(program: Program, schedule: Schedule) -> int:
    """Bytes of its own that a step holds while other pieces run: after its forward pass, or after its backward pass."""
    return max(bytes_after(program, schedule))


def between_bytes(program: Program, schedule: Schedule) -> int:
    """Bytes of its own that a step holds between its forward and its backward pass; 0 where it has only one."""
    return bytes_after(program, schedule)[0]


def bytes_after(program: Program, schedule: Schedule) -> tuple[int, int]:
    """Bytes of its own that a step holds after its forward pass, and at its end."""
    here: set[int] = set()
    between: set[int] = set()
    for step in schedule.instructions:
        if isinstance(step, Run):
            if program.ops[step.op].phase is Phase.LOSS:
                between = set(here)
            here |= set(step.keep)
            here -= {old for _, old in step.reuse}
        elif isinstance(step, Start):
            here.add(step.buffer)  # a copy out is of what is here
        elif isinstance(step, Free) and step.tier == 0:
            here.discard(step.buffer)
    after, end = (sum(program.buffers[buffer].bytes for buffer in held) for held in (between, here))
    return after, end

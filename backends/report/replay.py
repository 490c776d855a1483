"""What lives when: the replay behind every picture and export.

    lives(program, machine, schedule)   each stay of a buffer in the device's memory, or another, as a range of instructions
    layers(...)                         live bytes per instruction, for each colour of a picture
    held(...)                           live bytes per instruction in any tier
    copies(program, machine, side)      when each copy is on its link

The referee judges; this only draws what it has accepted, so nothing is checked here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...planner.ir.machine import Machine
from ...planner.ir.program import Kind, Phase, Program
from ...planner.ir.schedule import Free, Run, Schedule, Start

if TYPE_CHECKING:
    from ...planner.ir.plan import Side

WORKSPACE = "workspace"
RECOMPUTED = "recomputed"
LAYERS = (
    Kind.PARAMETER,
    Kind.STATE,
    Kind.INPUT,
    Kind.CONSTANT,
    Kind.GRADIENT,
    Kind.OUTPUT,
    Kind.ACTIVATION,
    RECOMPUTED,
    Kind.TEMPORARY,
    WORKSPACE,
)


@dataclass(frozen=True)
class Life:
    """One stay in a tier.

    Attributes:
        buffer: its index in the program, or -1 for the workspace of one run.
        bytes: how much it takes.
        lower: the first instruction during which it is live.
        upper: the first during which it is not.
        maker: the instruction that made it, or -1 for what is live before the step.
        again: it was made by a run that was not its op's first.
        final: it is live when the step ends.
    """

    buffer: int
    bytes: int
    lower: int
    upper: int
    maker: int
    again: bool = False
    final: bool = False


class Copy(NamedTuple):
    """One copy: indices of its link and its buffer, and the seconds from when to when the link is busy with it."""

    link: int
    buffer: int
    begin: float
    end: float


def lives(program: Program, machine: Machine, schedule: Schedule, tier: int = 0) -> list[Life]:
    """Every stay in one tier, in the order in which they end.

    At each instruction the bytes of the first tier's lives that cover it add up to the referee's `Report.timeline`.
    """
    end = len(schedule.instructions)
    works_here = [unit.tier == machine.tiers[tier].name for unit in machine.units]
    leads_here = [link.target == machine.tiers[tier].name for link in machine.links]
    home = dict(schedule.homes)
    born = {buffer: (0, -1, False) for buffer, op in enumerate(program.producer) if op < 0 and home.get(buffer, 0) == tier}
    done: set[int] = set()
    ended: list[Life] = []

    def close(buffer: int, upper: int, final: bool = False) -> None:
        lower, maker, again = born.pop(buffer)
        ended.append(Life(buffer, program.buffers[buffer].bytes, lower, upper, maker, again, final))

    for at, step in enumerate(schedule.instructions):
        if isinstance(step, Run) and works_here[step.unit]:
            op = program.ops[step.op]
            for _, old in step.reuse:
                close(old, at)
            born.update((buffer, (at, at, step.op in done)) for buffer in op.writes)
            for buffer in set(op.writes) - set(step.keep):
                close(buffer, at + 1)
            if op.workspace:
                ended.append(Life(-1, op.workspace, at, at + 1, at, step.op in done))
            done.add(step.op)
        elif isinstance(step, Free) and step.tier == tier:
            close(step.buffer, at + 1)
        elif isinstance(step, Start) and leads_here[step.link] and step.buffer not in born:  # not one that comes home
            born[step.buffer] = (at, at, False)
    for buffer in sorted(born):
        close(buffer, end, final=True)
    return ended


def layer_of(program: Program, life: Life) -> str:
    """The colour of a life: its buffer's kind, unless it is a recomputed tensor or a kernel's workspace."""
    if life.buffer < 0:
        return WORKSPACE
    return RECOMPUTED if life.again else program.buffers[life.buffer].kind


def layers(program: Program, machine: Machine, schedule: Schedule) -> dict[str, NDArray[np.int64]]:
    """Live bytes while each instruction runs, by layer, bottom first; layers that never hold anything are left out."""
    change = {layer: np.zeros(len(schedule.instructions) + 1, np.int64) for layer in LAYERS}
    for life in lives(program, machine, schedule):
        change[layer_of(program, life)][life.lower] += life.bytes
        change[layer_of(program, life)][life.upper] -= life.bytes
    stacked = {layer: np.cumsum(step)[:-1] for layer, step in change.items()}
    return {layer: held for layer, held in stacked.items() if held.any()}


def held(program: Program, machine: Machine, schedule: Schedule, tier: int) -> NDArray[np.int64]:
    """Live bytes in one tier while each instruction runs; a copy's target counts from when the copy is queued."""
    change = np.zeros(len(schedule.instructions) + 1, np.int64)
    for life in lives(program, machine, schedule, tier):
        change[life.lower] += life.bytes
        change[life.upper] -= life.bytes
    return np.cumsum(change)[:-1]


def copies(program: Program, machine: Machine, side: "Side") -> list[Copy]:
    """The copies of a schedule, in the order in which they are queued: a link carries one at a time, first in, first out."""
    free = [0.0] * len(machine.links)
    found = []
    for step, start in zip(side.schedule.instructions, side.report.starts, strict=True):
        if isinstance(step, Start):
            begin = max(start, free[step.link])
            free[step.link] = machine.arrival(step.link, program.buffers[step.buffer].bytes, start, free)
            found.append(Copy(step.link, step.buffer, begin, free[step.link]))
    return found


def phases(program: Program, schedule: Schedule) -> list[tuple[Phase, int]]:
    """The phases that the step goes through, each with the instruction that starts it.

    Recomputation in the backward pass runs ops of the forward pass; only first runs tell the phase.
    """
    order = list(Phase)
    reached: list[tuple[Phase, int]] = []
    for at, step in enumerate(schedule.instructions):
        if isinstance(step, Run):
            phase = program.ops[step.op].phase
            if not reached or order.index(phase) > order.index(reached[-1][0]):
                reached.append((phase, at))
    return reached


def largest(program: Program, machine: Machine, schedule: Schedule, at: int, count: int) -> list[Life]:
    """The `count` largest lives during instruction `at`."""
    alive = [life for life in lives(program, machine, schedule) if life.lower <= at < life.upper]
    return sorted(alive, key=lambda life: (-life.bytes, life.buffer))[:count]

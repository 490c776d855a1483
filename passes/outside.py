"""A schedule -> the same with a few results left where their kernels put them, instead of copied into the arena.

Some kernels only return memory of their own. A result copied from there takes its bytes twice for a moment, so beside
the arena there has to be room for the largest of them anyway. Short-lived results may use that room: they are never
copied, and the arena need not hold them. What lies beside the arena stays below what it was at its worst moment.
"""

from collections import defaultdict
from dataclasses import dataclass

import msgspec
import numpy as np

from ..planner.ir.machine import Machine
from ..planner.ir.program import Program
from ..planner.ir.schedule import Run, Schedule
from .place import Life, find_lives


@dataclass(frozen=True)
class LeaveOutside:
    """Schedule -> schedule that says which buffers lie outside the arena.

    Attributes:
        passing: buffers that pass through memory of their own on their way into the arena, counted as workspace there.
    """

    name = "leave-outside"
    passing: frozenset[int]

    def __call__(self, program: Program, machine: Machine, schedule: Schedule) -> Schedule:
        """The schedule with `outside`, chosen greedily, the shortest lives first."""
        beside = bytes_beside(program, schedule)
        room = int(beside.max(initial=0))
        outside: list[int] = []
        candidates = self.candidates(program, machine, schedule)
        for lives in sorted(candidates, key=lambda lives: sum(life.upper - life.lower for life in lives)):
            more = beside.copy()
            for life in lives:
                size = program.buffers[life.buffer].bytes
                more[life.lower : life.upper] += size
                if life.buffer in self.passing:  # its run has counted the bytes already
                    more[life.lower] -= size
            if more.max() <= room:
                beside = more
                outside += sorted({life.buffer for life in lives})
        return msgspec.structs.replace(schedule, outside=tuple(sorted(outside)))

    def candidates(self, program: Program, machine: Machine, schedule: Schedule) -> list[list[Life]]:
        """Lives that can only lie outside together: of one buffer, or written in place of one another.

        All of them begin with a run that makes a result in memory of its own, and none is lent.
        """
        requests: dict[int, list[Life]] = defaultdict(list)
        for life in find_lives(program, machine, schedule):
            if life.tier == 0:
                requests[life.request].append(life)
        group_of: dict[int, int] = {}  # buffer -> buffer that stands for its group

        def root(buffer: int) -> int:
            while group_of.setdefault(buffer, buffer) != buffer:
                buffer = group_of[buffer]
            return buffer

        for lives in requests.values():
            for life in lives:
                group_of[root(life.buffer)] = root(lives[0].buffer)
        groups: dict[int, list[Life]] = defaultdict(list)
        barred: set[int] = set()
        lent = set(schedule.lent)
        for lives in requests.values():
            groups[root(lives[0].buffer)] += lives
            if min(lives, key=lambda life: life.lower).buffer not in self.passing or lent & {life.buffer for life in lives}:
                barred.add(root(lives[0].buffer))
        return [lives for group, lives in groups.items() if group not in barred]


def bytes_beside(program: Program, schedule: Schedule) -> np.ndarray:
    """Bytes that lie beside the arena while each instruction runs: outputs from when they are made, and workspaces."""
    given, held = set(program.outputs) - set(schedule.lent), 0
    beside = np.zeros(len(schedule.instructions), np.int64)
    for at, step in enumerate(schedule.instructions):
        beside[at] = held
        if isinstance(step, Run):
            op = program.ops[step.op]
            made = sum(program.buffers[buffer].bytes for buffer in op.writes if buffer in given)
            beside[at] += made + op.workspace
            held += sum(program.buffers[buffer].bytes for buffer in step.keep if buffer in given)
    return beside

"""Loads started earlier: beside the computing of the ops before, as far as the scratchpad has room.

The loads of a mapping are taken in order; each moves forward past ops, one at a time, while the bytes live at every
moment between leave room for it, and no further than so many times what it takes to hide the copy behind the ops passed.
Loads keep their order, for the link serves them first come first served.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..planner.ir.machine import Machine
from ..planner.ir.program import Program
from .liveness import last_reads
from .transfers import routes_of


@dataclass(frozen=True)
class Prefetch:
    """Events -> events with fetches moved forward.

    Attributes:
        budget: bytes of the device that loads may fill.
        ahead: times the copy's own seconds that are hidden before a load stops moving.
    """

    name = "prefetch"
    budget: int
    ahead: float = 20.0

    def __call__(
        self,
        program: Program,
        machine: Machine,
        events: Sequence[int],
        tier: Mapping[int, int],
        homes: Container[int] = (),
    ) -> list[int]:
        """The events, arguments as in `Transfers`."""
        routes = routes_of(machine)
        order = list(events)
        live = live_bytes(program, order, homes)
        front = 0  # fetches may not pass the one before
        for at in range(len(order)):
            if order[at] >= 0:
                continue
            buffer = -1 - order[at]
            size = program.buffers[buffer].bytes
            link = machine.links[routes[tier[buffer] - 1].back]
            wanted = self.ahead * (link.latency + size / link.bandwidth)
            made = self.earliest(program, order, at, buffer)
            place, hidden = at, 0.0
            while place > max(front, made) and hidden < wanted and live[place - 1] + size <= self.budget:
                place -= 1
                hidden += program.ops[order[place]].seconds if order[place] >= 0 else 0.0
            if place < at:
                order.insert(place, order.pop(at))
                live[place + 1 : at + 1] = live[place:at] + size
                live[place] = size + (live[place - 1] if place else 0)
            front = place + 1
        return order

    def earliest(self, program: Program, order: Sequence[int], at: int, buffer: int) -> int:
        """The first place that a fetch may have: behind the last event that touches its buffer."""
        for place in range(at - 1, -1, -1):
            event = order[place]
            touched = (-1 - event,) if event < 0 else (*program.ops[event].reads, *program.ops[event].writes)
            if buffer in touched:
                return place + 1
        return 0


def live_bytes(program: Program, order: Sequence[int], homes: Container[int]) -> np.ndarray:
    """Bytes on the device during each event, copies out taken to end at once."""
    last = last_reads(program, order, homes)
    size = [buffer.bytes for buffer in program.buffers]
    live, during = 0, np.zeros(len(order), np.int64)
    for at, event in enumerate(order):
        if event < 0:
            live += size[-1 - event]
            during[at] = live
            continue
        op = program.ops[event]
        during[at] = live + sum(size[b] for b in op.writes) + op.workspace
        live += sum(size[b] for b in op.writes if last[at, b] > at)
        live -= sum(size[b] for b in op.reads if last.get((at, b)) == at)
    return during

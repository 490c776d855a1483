"""A schedule -> the same with an address for every buffer that the step makes: no allocator is asked while it runs.

A buffer lives from the run that makes it to the free that ends it. Where a run writes in place, the new buffer has the
old one's bytes, so both are one request. What the caller owns or is given (parameters, inputs, outputs) lies elsewhere,
but for outputs that the schedule lends; and so does what it says lies outside (see `outside.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from ..planner.ir.machine import Machine
from ..planner.ir.program import Program
from ..planner.ir.schedule import Free, Placement, Run, Schedule, Start
from ..solvers.face.answer import Limit
from ..solvers.storage import allocate
from ..solvers.storage.problem import Packing, Storage, make_storage


class Life(NamedTuple):
    """One stay of a buffer in a tier, during instructions `[lower, upper)`; `request` numbers the bytes it lies in."""

    buffer: int
    tier: int
    lower: int
    upper: int
    request: int


@dataclass(frozen=True)
class Extent:
    """What placing a tier's buffers came to.

    Attributes:
        tier: which.
        bytes: the end of the highest buffer.
        live: the most bytes live at once, padded to the alignment: no arena is smaller.
        packing: the solver's answer.
    """

    tier: int
    bytes: int
    live: int
    packing: Packing


@dataclass(frozen=True)
class Place:
    """Schedule -> schedule with placements.

    Attributes:
        seconds: of search for each tier, at most.
        seed: of the search.
        capacity: bytes of the first tier to fit into; None for as few as possible.
        known: for each buffer the addresses of its stays in the first tier, in time order; None to find them.
    """

    name = "place"
    seconds: float = 2.0
    seed: int = 0
    capacity: int | None = None
    known: Mapping[int, Sequence[int]] | None = None

    def __call__(self, program: Program, machine: Machine, schedule: Schedule) -> tuple[Schedule, list[Extent]]:
        """The schedule with placements, and the arena of each tier that holds any."""
        lives = find_lives(program, machine, schedule)
        size = np.array([buffer.bytes for buffer in program.buffers], np.int64)
        placements: list[Placement] = []
        arenas: list[Extent] = []
        for tier in sorted({life.tier for life in lives}):
            mine = [life for life in lives if life.tier == tier]
            storage, names = requests_of(mine, size, machine.tiers[tier].alignment)
            if self.known is not None and not tier:
                placements += self.recall(mine)
                continue
            packing = allocate.solve(storage, Limit(None if tier else self.capacity, self.seconds, self.seed))
            if packing.best is None:  # it cannot fit: the referee will say so
                packing = allocate.solve(storage, Limit(seconds=0.0, seed=self.seed))
            at = {life: int(packing.found[names[life.request]]) for life in mine}
            placements += [Placement(life.buffer, tier, at[life], life.lower, life.upper) for life in mine]
            end = max(at[life] + int(size[life.buffer]) for life in mine)
            arenas.append(Extent(tier, end, int(storage.load.max()), packing))
        return msgspec.structs.replace(schedule, placements=tuple(placements)), arenas

    def recall(self, lives: list[Life]) -> list[Placement]:
        """The addresses that are known."""
        assert self.known is not None
        rest = {buffer: iter(offsets) for buffer, offsets in self.known.items()}
        lives = sorted(lives, key=lambda life: life.lower)
        return [Placement(life.buffer, life.tier, next(rest[life.buffer]), life.lower, life.upper) for life in lives]


def requests_of(lives: list[Life], size: np.ndarray, alignment: int) -> tuple[Storage, dict[int, int]]:
    """The storage problem of the lives in a tier, one buffer for each request; and which buffer that is."""
    names = {request: index for index, request in enumerate(sorted({life.request for life in lives}))}
    lower, upper = np.full(len(names), 2**62), np.zeros(len(names), np.int64)
    bytes_of = np.zeros(len(names), np.int64)
    for life in lives:
        index = names[life.request]
        lower[index], upper[index] = min(lower[index], life.lower), max(upper[index], life.upper)
        bytes_of[index] = size[life.buffer]
    return make_storage(lower, upper, bytes_of, alignment=alignment), names


def find_lives(program: Program, machine: Machine, schedule: Schedule) -> list[Life]:
    """Every stay of a buffer that the step makes or fetches and does not give away, but for those that lie outside."""
    home = dict(schedule.homes)
    given = set(program.outputs) - home.keys() - set(schedule.lent)
    loose = set(schedule.outside)
    lives: list[Life] = []
    open_at: dict[tuple[int, int], tuple[int, int]] = {}  # (buffer, tier) -> (since, request)
    requests = 0

    def close(buffer: int, tier: int, at: int) -> None:
        since, request = open_at.pop((buffer, tier))
        lives.append(Life(buffer, tier, since, at, request))

    for at, step in enumerate(schedule.instructions):
        if isinstance(step, Run):
            op, tier = program.ops[step.op], machine.tier_index(machine.units[step.unit].tier)
            taken: dict[int, int] = {}
            for new, old in step.reuse:
                if old in loose and not tier:
                    continue
                if new in given:  # it lies elsewhere, so the old bytes are read to the end of the run
                    close(old, tier, at + 1)
                else:
                    taken[new] = open_at[old, tier][1]
                    close(old, tier, at)
            for buffer in op.writes:
                if buffer in given or (buffer in loose and not tier):
                    continue
                request = taken.get(buffer, requests)
                requests += buffer not in taken
                if buffer in step.keep:
                    open_at[buffer, tier] = at, request
                else:
                    lives.append(Life(buffer, tier, at, at + 1, request))
        elif isinstance(step, Free):
            if (step.buffer, step.tier) in open_at:
                close(step.buffer, step.tier, at)
        elif isinstance(step, Start):
            tier = machine.tier_index(machine.links[step.link].target)
            if not tier and step.buffer in given | loose:
                continue
            if home.get(step.buffer) == tier and program.producer[step.buffer] < 0:
                continue  # it goes back to where it came from
            open_at[step.buffer, tier] = at, requests
            requests += 1
    for buffer, tier in list(open_at):
        close(buffer, tier, len(schedule.instructions))
    return lives

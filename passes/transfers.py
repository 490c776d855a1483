"""Events -> schedule with copies between tiers: when each starts, and where the step waits for it.

A value that is fetched later is copied out right after the run that makes it, and what is at home in another tier right after
the run that changes it; the bytes it takes on the device are given
back once the copy has ended and nobody reads it there any more. Where bytes are short the step waits for copies out, the
one that ends first before the others; a run waits for the copies in of what it reads. "Once" is by the machine's
figures: a slower link makes the same schedule wait longer, not differ.
"""

from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..planner.ir.machine import Machine
from ..planner.ir.program import Program
from ..planner.ir.schedule import Free, Instruction, Run, Schedule, Start, Wait
from .liveness import last_reads


class Route(NamedTuple):
    """A tier behind the device: its index, and the links to it and back."""

    tier: int
    out: int
    back: int


def routes_of(machine: Machine) -> list[Route]:
    """The tiers that the first one has links to and from, in the machine's order; of several links the fastest."""
    found = []
    for tier in range(1, len(machine.tiers)):
        ends = machine.tiers[0].name, machine.tiers[tier].name
        links = sorted(enumerate(machine.links), key=lambda pair: -pair[1].bandwidth)
        out = [index for index, link in links if (link.source, link.target) == ends]
        back = [index for index, link in links if (link.target, link.source) == ends]
        if out and back:
            found.append(Route(tier, out[0], back[0]))
    return found


@dataclass(frozen=True)
class Transfers:
    """Events -> schedule.

    Attributes:
        budget: bytes of the device; where an event would take more, it waits for copies out first.
    """

    name = "transfers"
    budget: int

    def __call__(
        self, program: Program, machine: Machine, events: Sequence[int], tier: Mapping[int, int], homes: Container[int] = ()
    ) -> Schedule:
        """The schedule.

        Args:
            program: whose ops run.
            machine: whose links carry the copies.
            events: op indices and fetches (`-1 - buffer`) in time order.
            tier: for each buffer that is fetched the number, from 1, of its route.
            homes: resident buffers that lie in their route's tier before and after the step, and outputs that do after it.
        """
        return _Walk(program, machine, events, tier, homes, self.budget).schedule()


@dataclass
class _Walk:
    """One pass through the events with the machine's clock."""

    program: Program
    machine: Machine
    events: Sequence[int]
    tier: Mapping[int, int]
    homes: Container[int]
    budget: int
    made: list[Instruction] = field(default_factory=list)
    clock: float = 0.0
    live: int = 0
    flying: dict[int, float] = field(default_factory=dict)  # buffer being copied out -> when that ends
    leaving: set[int] = field(default_factory=set)  # of those, buffers that nobody reads on the device any more
    ready: dict[int, float] = field(default_factory=dict)  # buffer being copied in -> when that ends

    def __post_init__(self) -> None:
        self.size = [buffer.bytes for buffer in self.program.buffers]
        self.routes = routes_of(self.machine)
        self.free = [0.0] * len(self.machine.links)
        self.queues: list[deque[int]] = [deque() for _ in self.routes]
        self.last = last_reads(self.program, self.events, self.homes)
        self.away = [buffer for buffer in range(len(self.size)) if buffer in self.homes]
        fetches = ((at, -1 - event) for at, event in enumerate(self.events) if event < 0)
        # what is made again before it is read is not fetched after all
        self.fetches = Counter(buffer for at, buffer in fetches if self.last[at, buffer] > at)
        self.live = self.program.resident_bytes - sum(
            self.size[buffer] for buffer in self.away if self.program.producer[buffer] < 0
        )
        self.ran: set[int] = set()

    def schedule(self) -> Schedule:
        """Walk."""
        for at, event in enumerate(self.events):
            if event >= 0:
                self.run(at, event)
            elif self.last[at, -1 - event] > at:
                self.fetch(-1 - event)
        for buffer in list(self.flying):
            self.wait_out(buffer)
        homes = tuple((buffer, self.route(buffer).tier) for buffer in self.away)
        return Schedule(program=self.program.digest, instructions=tuple(self.made), homes=homes)

    def route(self, buffer: int) -> Route:
        """The tier that a buffer is moved to."""
        return self.routes[self.tier[buffer] - 1]

    def run(self, at: int, index: int) -> None:
        """Run an op: wait for what it reads and for room, then start the copies of what it makes."""
        op, size = self.program.ops[index], self.size
        for buffer in op.reads:
            if buffer in self.ready:
                self.clock = max(self.clock, self.ready.pop(buffer))
                self.made.append(Wait(buffer, self.route(buffer).back))
                self.fetched(buffer)
        for buffer in self.leaving & set(op.writes):  # one value is not there twice
            self.clock = max(self.clock, self.flying[buffer])
        self.give_back()
        keep = {buffer for buffer in op.writes if self.last[at, buffer] > at}
        dying = {buffer for buffer in op.reads if self.last.get((at, buffer)) == at}
        reuse: list[tuple[int, int]] = []
        for new, old in op.reuse:
            if new in keep and old in dying and size[new] == size[old] and old not in self.flying:
                reuse.append((new, old))
                dying.discard(old)
                break
        made = sum(size[buffer] for buffer in op.writes) - sum(size[old] for _, old in reuse)
        self.make_room(made + op.workspace)
        moved = [b for b in op.writes if (self.fetches[b] or b in self.homes) and index not in self.ran]
        self.ran.add(index)
        self.made.append(Run(op=index, keep=tuple(b for b in op.writes if b in keep or b in moved), reuse=tuple(reuse)))
        self.clock += op.seconds
        self.live += sum(size[buffer] for buffer in {*keep, *moved}) - sum(size[old] for _, old in reuse)
        for buffer in (buffer for buffer in op.mutates if buffer in self.homes):
            self.send(buffer)
        for buffer in sorted(dying):
            self.leave(buffer)
        for buffer in moved:
            self.send(buffer)
            if buffer not in keep:
                self.leaving.add(buffer)

    def send(self, buffer: int) -> None:
        """Start a copy out."""
        route = self.route(buffer)
        self.made.append(Start(buffer, route.out))
        self.flying[buffer] = self.carry(route.out, buffer)
        self.queues[self.tier[buffer] - 1].append(buffer)

    def carry(self, link: int, buffer: int) -> float:
        """Put a copy into a link's queue. Returns when it ends."""
        known, size = self.machine.links[link], self.size[buffer]
        self.free[link] = self.machine.arrival(link, size, self.clock, self.free)
        self.clock += known.load * (size / known.bandwidth)
        return self.free[link]

    def leave(self, buffer: int) -> None:
        """Nobody reads a buffer any more until it is next fetched: free it, once it has been copied."""
        if self.flying.get(buffer, 0.0) > self.clock:
            self.leaving.add(buffer)
            return
        if buffer in self.flying:
            self.wait_out(buffer)
        self.made.append(Free(buffer))
        self.live -= self.size[buffer]

    def wait_out(self, buffer: int) -> None:
        """Wait for a copy out; if the buffer is only there for it, free it."""
        self.clock = max(self.clock, self.flying.pop(buffer))
        self.made.append(Wait(buffer, self.route(buffer).out))
        if buffer in self.leaving:
            self.leaving.remove(buffer)
            self.made.append(Free(buffer))
            self.live -= self.size[buffer]
        if not self.fetches[buffer] and buffer not in self.homes:
            self.made.append(Free(buffer, self.route(buffer).tier))

    def next_out(self) -> int | None:
        """The copy out that ends next."""
        heads = []
        for queue in self.queues:
            while queue and queue[0] not in self.flying:
                queue.popleft()
            heads += [queue[0]] if queue else []
        return min(heads, key=self.flying.__getitem__, default=None)

    def give_back(self) -> None:
        """Free what has been copied by now."""
        while (buffer := self.next_out()) is not None and self.flying[buffer] <= self.clock:
            self.wait_out(buffer)

    def make_room(self, more: int) -> None:
        """Wait for copies out until more bytes fit, as long as there is something to wait for."""
        while self.leaving and self.live + more > self.budget:
            buffer = self.next_out()
            assert buffer is not None
            self.wait_out(buffer)

    def fetch(self, buffer: int) -> None:
        """Start a copy in; what has not left yet stays."""
        self.give_back()
        if buffer in self.leaving:
            self.leaving.remove(buffer)
            self.fetches[buffer] -= 1
            return
        self.make_room(self.size[buffer])
        route = self.route(buffer)
        self.made.append(Start(buffer, route.back))
        self.ready[buffer] = self.carry(route.back, buffer)
        self.live += self.size[buffer]

    def fetched(self, buffer: int) -> None:
        """A copy in has ended: after the last one the copy in the slower tier is no longer needed."""
        self.fetches[buffer] -= 1
        if not self.fetches[buffer] and buffer not in self.homes:
            self.made.append(Free(buffer, self.route(buffer).tier))

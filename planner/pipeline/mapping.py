"""Program -> schedule on a machine with a scratchpad: what `memplan map` does.

    fuse -> residency and order (scratchpad/spm.py) -> fetches, earlier where there is room -> transfers -> addresses -> referee

Residency is decided without addresses, so its bytes are a bound for any placement of it. Where the values do not fit by
address though they fit by their sum, it is decided once more, in the same order and with addresses (scratchpad/placed.py).
"""

import math
import time
from dataclasses import dataclass
from functools import cached_property

import msgspec

from ...passes.fuse import Fuse, Fused
from ...passes.place import Place
from ...passes.prefetch import Prefetch
from ...passes.transfers import Transfers, routes_of
from ...solvers.face.answer import Answer, Limit
from ...solvers.scratchpad import spm
from ...solvers.scratchpad.again import solve_again
from ...solvers.scratchpad.overlap import least_time
from ...solvers.scratchpad.placed import Addresses, solve_placed
from ...solvers.scratchpad.problem import Mapped, Residency, verdict, with_capacity
from ...solvers.warm import compile_addresses
from ..ir.errors import BudgetError, InvalidSchedule, MachineError
from ..ir.machine import Machine
from ..ir.program import Program
from ..ir.referee import Report, referee
from ..ir.schedule import Schedule
from ..ir.units import parse_bytes, show_bytes

# How far ahead loads start, in times of what hides them, and how much of the scratchpad they may fill: rising, for the
# fuller it is the sooner no addresses are found.
EARLY = ((20.0, 1.0), *((math.inf, share) for share in (0.8, 0.85, 0.9, 0.95)))
AGAIN = 20.0  # seconds, at most, to look for ops to run again
CLOSE = 1.03  # times the least time: no need to start any earlier
SIZES = ("M_R", "M_H", "M_P")  # COSMA's: the largest op, halfway, the smallest peak


@dataclass(frozen=True)
class Mapping:
    """An inference on a scratchpad.

    Attributes:
        fused: what runs.
        machine: with the scratchpad's size.
        schedule: instructions with addresses, accepted by the referee.
        report: what the referee measured.
        problem: what was solved.
        answer: the order and residency behind it, and what is known of any other.
        least_time: seconds that this order and residency take whenever their copies start, or more.
        seconds: it took to find.
    """

    fused: Fused
    machine: Machine
    schedule: Schedule
    report: Report
    problem: Residency
    answer: Answer[Mapped, int]
    least_time: float
    seconds: float

    @property
    def mapped(self) -> Mapped:
        """The order and residency behind it."""
        return self.answer.found

    @property
    def compulsory(self) -> int:
        """Bytes that every mapping moves."""
        return self.problem.compulsory

    @property
    def bound(self) -> int:
        """No mapping moves fewer bytes beyond those; 0 where ops may run again, for nothing is proven of such mappings."""
        return self.answer.bound

    @property
    def capacity(self) -> int:
        """Bytes of the scratchpad."""
        return self.machine.tiers[0].capacity

    @property
    def noncompulsory(self) -> int:
        """Bytes moved that a larger scratchpad would spare."""
        return sum(self.report.moved) - self.compulsory

    @property
    def gap(self) -> float:
        """How far the bytes are above the bound, as a share of them."""
        return 1 - self.bound / self.noncompulsory if self.noncompulsory else 0.0


@dataclass(frozen=True)
class Mapper:
    """Maps one inference onto scratchpads of any size.

    Attributes:
        program: an inference, with its costs filled in.
        machine: whose first tier is the scratchpad and whose second the memory behind it.
        weights: whether parameters take room in the scratchpad; if not, they reach the unit by a way of their own.
        sizes: bytes of each buffer, where they are not the program's.
        prefetch: start loads as early as there is room.
        recompute: let ops run again in place of loads.
        seed: of the searches.
        alignment: every address is a multiple of it.
        solver: of the residency of an order; see `solve_ordered`.
    """

    program: Program
    machine: Machine
    weights: bool = False
    sizes: tuple[int, ...] | None = None
    prefetch: bool = True
    recompute: bool = False
    seed: int = 0
    alignment: int = 1
    solver: str | None = None

    def __post_init__(self) -> None:
        if len(self.machine.tiers) < 2 or not self.routes:
            raise MachineError(
                f"machine {self.machine.name} has no memory behind its first tier with links there and back: use scratchpad"
            )

    @property
    def routes(self) -> bool:
        """Whether there are links both ways between the first two tiers."""
        ends = {(link.source, link.target) for link in self.machine.links}
        first, second = (tier.name for tier in self.machine.tiers[:2])
        return (first, second) in ends and (second, first) in ends

    @cached_property
    def fused(self) -> Fused:
        """What runs."""
        return Fuse(self.weights)(self.program, self.sizes)

    @cached_property
    def problem(self) -> Residency:
        """The same as arrays, for a scratchpad that holds nothing."""
        program = self.fused.program
        sizes = tuple(buffer.bytes for buffer in program.buffers)
        reads, writes = (tuple(getattr(op, side) for op in program.ops) for side in ("reads", "writes"))
        return Residency(sizes, reads, writes, 0, program.outputs)

    @cached_property
    def repeatable(self) -> frozenset[int]:
        """Ops that give the same when they run again; those that draw random numbers are left alone."""
        return frozenset(index for index, op in enumerate(self.fused.program.ops) if op.repeatable and not op.random)

    @cached_property
    def landmarks(self) -> dict[str, int]:
        """COSMA's sizes of a scratchpad for this program, in bytes."""
        largest, least = spm.peaks(self.problem)
        return {"M_R": largest, "M_H": (largest + least) // 2, "M_P": least}

    def capacity_of(self, asked: int | str) -> int:
        """Bytes asked for: a size, or the name of one."""
        return self.landmarks[asked] if asked in SIZES else parse_bytes(asked, what="scratchpad")  # type: ignore[index]

    @cached_property
    def homes(self) -> dict[int, int]:
        """What lies in the memory behind before the step or after it, and the number of the route there."""
        lasting = {buffer for buffer, op in enumerate(self.problem.producer) if op < 0}
        return dict.fromkeys(sorted(lasting | set(self.fused.program.outputs)), 1)

    def map(self, capacity: int, seconds: float = 60.0) -> Mapping:
        """The mapping that moves the fewest bytes, or the best found.

        Args:
            capacity: bytes of the scratchpad.
            seconds: to search for, at most.

        Raises:
            BudgetError: some op alone needs more, and is named; or no addresses were found.
        """
        self.check(capacity)
        compile_addresses()
        began = time.monotonic()
        problem = with_capacity(self.problem, capacity)
        answer = once = spm.solve(problem, Limit(seconds=seconds, seed=self.seed, solver=self.solver))
        made = None
        if self.recompute and once.found.bytes:
            left = max(seconds - (time.monotonic() - began), 1.0)
            again = solve_again(problem, Limit(seconds=min(left, AGAIN), seed=self.seed), once, self.repeatable)
            made = self.schedule(again.found, capacity) if again.found.again else None
            answer = again if made is not None else verdict(once.found, again.bound)
        made = made or self.schedule(answer.found, capacity)
        if made is None:  # it fits by the sum of what is there, and not by address
            left = max(seconds - (time.monotonic() - began), 1.0)
            placed = solve_placed(problem, Limit(seconds=left, seed=self.seed), once, self.alignment)
            if placed.best is not None:
                answer = verdict(placed.best.mapped, min(placed.bound, answer.bound))
                made = self.schedule(answer.found, capacity, placed.best.addresses)
        if made is None:
            enough = self.enough(capacity)
            raise BudgetError(
                f"no addresses found for {self.program.name} in a scratchpad of {show_bytes(capacity)} ({capacity} bytes), "
                f"though every op fits it: {show_bytes(enough)} ({enough} bytes) are enough; or try a longer time limit",
                enough,
            )
        return Mapping(self.fused, self.sized(capacity), *made, problem, answer,
                       self.least_time(answer.found, capacity), time.monotonic() - began)  # fmt: skip

    def check(self, capacity: int) -> None:
        """Refuse a scratchpad in which some op does not fit."""
        worst = max(range(len(self.problem.need)), key=self.problem.need.__getitem__, default=None)
        if worst is not None and self.problem.need[worst] > capacity:
            op = self.fused.program.ops[worst]
            raise BudgetError(
                f"a scratchpad of {show_bytes(capacity)} ({capacity} bytes) cannot hold the operands of {op.name} "
                f"({op.target.partition('+')[0]}{', in ' + op.where if op.where else ''}): it needs "
                f"{self.problem.need[worst]} bytes at once",
                self.problem.need[worst],
            )

    def enough(self, capacity: int) -> int:
        """Bytes beyond a capacity with which nothing moves that could stay, and everything has an address."""
        room = max(self.landmarks["M_P"], capacity)
        while True:
            room += room // 16 + self.alignment
            answer = spm.solve(with_capacity(self.problem, room), Limit(seconds=1.0, seed=self.seed, solver=self.solver))
            if answer.best is not None and self.schedule(answer.best, room) is not None:
                return room

    def sized(self, capacity: int) -> Machine:
        """The machine with a scratchpad of so many bytes."""
        change = msgspec.structs.replace
        tiers = [change(tier, alignment=max(tier.alignment, self.alignment)) for tier in self.machine.tiers]
        return change(self.machine, tiers=(change(tiers[0], capacity=capacity), *tiers[1:]))

    def schedule(self, mapped: Mapped, capacity: int, addresses: Addresses | None = None) -> tuple[Schedule, Report] | None:
        """Instructions and addresses for a residency, with loads early if they fit so; None where nothing fits by address.

        The fastest with loads early, and with loads where they are needed and stores beside the ops that follow; else stores
        are waited for at once too, which is what a residency with addresses speaks of.
        """
        late = events_of(self.problem, mapped)
        if addresses is not None:
            known: dict[int, list[int]] = {}
            for (buffer, _), offset in sorted(addresses.items(), key=lambda item: item[0]):
                known.setdefault(buffer, []).append(offset)
            return self.place(late, capacity, 0, known)
        least = self.least_time(mapped, capacity)
        best = self.early(late, capacity, least) if self.prefetch else None
        if best is None or best[1].time > least * (1 + 1e-9):  # early loads can hold up others
            plain = self.place(late, capacity, capacity)
            best = min((made for made in (best, plain) if made is not None), key=lambda made: made[1].time, default=None)
        return best or self.place(late, capacity, 0)

    def early(self, late: list[int], capacity: int, least: float) -> tuple[Schedule, Report] | None:
        """The fastest with loads started early that has addresses; a scratchpad filled to the brim with loads has none.

        It is fast enough close to `least` seconds.
        """
        machine, program = self.sized(capacity), self.fused.program
        best: tuple[Schedule, Report] | None = None
        for ahead, share in EARLY:
            fill = Prefetch(int(capacity * share), ahead)
            made = self.place(fill(program, machine, late, self.tiers(late), self.homes), capacity, capacity)
            if made is not None and (best is None or made[1].time < best[1].time):
                best = made
            if (made is None and share < 1) or (best is not None and best[1].time <= CLOSE * least):
                break
        return best

    def place(
        self, events: list[int], capacity: int, room: int, known: dict[int, list[int]] | None = None
    ) -> tuple[Schedule, Report] | None:
        """Instructions and addresses for ops and fetches; None where there are none.

        Args:
            events: ops and fetches.
            capacity: bytes of the scratchpad.
            room: bytes within which stores need not be waited for.
            known: addresses of each buffer's stays; None to find them.
        """
        machine, program = self.sized(capacity), self.fused.program
        schedule = Transfers(room)(program, machine, events, self.tiers(events), self.homes)
        schedule, _ = Place(capacity=capacity, known=known)(program, machine, schedule)
        try:
            return schedule, referee(program, machine, schedule)
        except InvalidSchedule as error:
            if error.rule not in ("place", "capacity"):
                raise
        return None

    def tiers(self, events: list[int]) -> dict[int, int]:
        """For each buffer that is ever away from the scratchpad the number of the route there."""
        return {**self.homes, **{-1 - event: 1 for event in events if event < 0}}

    def least_time(self, mapped: Mapped, capacity: int) -> float:
        """Seconds that an order and residency take whenever their copies start, or more."""
        if mapped.again:  # its computing alone
            made = [self.problem.producer[buffer] for buffer, _ in mapped.again]
            return sum(self.fused.program.ops[op].seconds for op in (*mapped.order, *made))
        program, route = self.fused.program, routes_of(self.machine)[0]
        links = self.machine.links[route.back], self.machine.links[route.out]
        load, store = ([link.latency + buffer.bytes / link.bandwidth for buffer in program.buffers] for link in links)
        return least_time(with_capacity(self.problem, capacity), mapped, [op.seconds for op in program.ops], load, store)


def events_of(problem: Residency, mapped: Mapped) -> list[int]:
    """Ops and fetches (`-1 - buffer`) in time order, each fetch right before the op that reads it; ops run again likewise."""
    events: list[int] = []
    known: set[int] = set()
    at = {op: step for step, op in enumerate(mapped.order)}
    repeated: dict[int, list[int]] = {}
    for buffer, step in sorted(mapped.again, key=lambda key: at[problem.producer[key[0]]]):
        repeated.setdefault(step, []).append(problem.producer[buffer])
    for step, last in enumerate(mapped.order):
        fetched: set[int] = set()
        for op in (*repeated.get(step, ()), last):
            for buffer in problem.reads[op]:
                first = problem.producer[buffer] < 0 and buffer not in known
                if first or ((buffer, step) in mapped.dropped and buffer not in fetched):
                    events.append(-1 - buffer)
                    fetched.add(buffer)
                known.add(buffer)
            events.append(op)
    return events

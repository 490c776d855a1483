"""A handful of schedules for every size of one trace, judged by the referee at each."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..cost.resized import Resized
from ..cost.table import Table
from ..ir.errors import BudgetError, InvalidSchedule
from ..ir.family import Family, Sizes, rebound
from ..ir.plan import Side, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import Run, Schedule
from .calls import together
from .planner import Planner

KNOWN = 64  # sizes whose program is kept
WAYS = 8  # schedules that are looked for beyond the first two
WORTH = 0.03  # one is, where those that are known take so much longer than keeping everything
ALIKE = 0.1  # memory that is as short as where a schedule has been looked for, but for this share, needs no other
LEAST = 0.5  # seconds that looking for a schedule is taken to need at least
TRIES = 3  # targets for the peak of one step beside others


class Way:
    """One schedule that any size may take where the referee accepts it, and its code.

    Attributes:
        schedule: of the family's program at the sizes of the example.
        runs: how often it runs each op.
    """

    def __init__(self, schedule: Schedule, write: Callable[[Schedule], Any]):
        self.schedule = schedule
        self.write = write
        self.runs = Counter(step.op for step in schedule.instructions if isinstance(step, Run))

    def seconds(self, program: Program) -> float:
        """What it takes with the costs of a program of the family."""
        return sum(count * program.ops[op].seconds for op, count in self.runs.items())

    @cached_property
    def code(self) -> Any:
        """Functions that carry it out with inputs of any size."""
        return self.write(self.schedule)


@dataclass(frozen=True)
class Choice:
    """A way at some sizes: the referee has accepted it.

    Attributes:
        way: the schedule at the sizes of the example, with its code.
        side: the same at these sizes, and what the referee says of it.
    """

    way: Way
    side: Side


class Ways:
    """Schedules for every size of one trace.

    Attributes:
        program: at the sizes of the example, with costs.
        family: at any.
        machine: that they run on.
        costs: of the family.
        planner: of the program; what it may do holds at other sizes too.
        write: makes code of a schedule.
        ways: the schedules known.
        known: programs by their sizes.
        tried: how short memory was where schedules have been looked for: what a step may take of its own, as a share of what
            it takes where everything is kept.
        lost: seconds that steps took beyond what keeping everything takes, since a schedule was last looked for, and
        price: how many that took.
    """

    def __init__(self, planner: Planner, family: Family, table: Table | None, write: Callable[[Schedule], Any]):
        """Nothing is solved yet."""
        self.planner, self.program, self.machine = planner, planner.program, planner.machine
        self.family, self.write = family, write
        self.costs = Resized(self.program, self.machine, table)
        self.ways: list[Way] = []
        self.tried: list[float] = []
        self.known: dict[Sizes, Program] = {family.base: self.program}
        self.lost = self.price = 0.0

    def at(self, sizes: Sizes) -> Program:
        """The program at these sizes, with costs: measured where the table has them, else estimated."""
        if sizes not in self.known:
            if len(self.known) >= KNOWN:
                self.known.pop(next(each for each in self.known if each != self.family.base))
            self.known[sizes] = self.costs.apply(self.family.at(sizes))
        return self.known[sizes]

    def solve(self, sizes: Sizes, budget: int, time_limit: float = 10.0) -> Choice:
        """Plan for one more size, without tracing; the schedule joins the ways.

        Raises:
            BudgetError: no schedule was found.
        """
        own = self.planner_of(sizes)
        own.deadline = time.monotonic() + time_limit
        side = self.search(own, min(budget, self.machine.tiers[0].capacity))
        return Choice(self.add(rebound(side.schedule, self.at(sizes), self.program)), side)

    def planner_of(self, sizes: Sizes) -> Planner:
        """What plans the program at some sizes."""
        base = self.planner
        return Planner(self.at(sizes), self.machine, base.recompute, base.reorder, seed=base.seed, solver=base.solver)

    def search(self, planner: Planner, budget: int) -> Side:
        """The fastest schedule that a planner finds until its deadline.

        Raises:
            BudgetError: it finds none.
        """
        return planner.solve(budget).found

    def add(self, schedule: Schedule) -> Way:
        """Let a schedule of the program at the sizes of the example be one of the ways.

        Raises:
            InvalidSchedule: it breaks a rule there, whatever the machine holds.
        """
        referee(self.program, unlimited(self.machine), schedule)
        for way in self.ways:
            if way.schedule.instructions == schedule.instructions:
                return way
        way = Way(schedule, self.write)
        self.ways.append(way)
        return way

    def side(self, way: Way, sizes: Sizes, budget: int | None = None) -> Side:
        """A way at these sizes.

        Raises:
            InvalidSchedule: the referee refuses it there, within the budget.
        """
        program = self.at(sizes)
        schedule = rebound(way.schedule, self.program, program)
        return Side(program, schedule, referee(program, self.machine, schedule, budget))

    def fastest(self, sizes: Sizes, room: int, calls: int = 1, patient: bool = False) -> Choice | None:
        """The fastest schedule that fits; one more is looked for where that may be worth it.

        Args:
            sizes: of the inputs.
            room: bytes for one step and what others like it hold.
            calls: how many there are, this one among them.
            patient: look for none where one is known that fits: `is_due` tells when that is worth it.

        Returns:
            None where none is known and none was found.
        """
        found = self.fitting(sizes, room, calls)
        wanted = found is None or (not patient and self.loss(found.way, sizes) > 0)
        if wanted and self.is_new(sizes, room):
            return self.solved(sizes, room, calls) or found
        return found

    def loss(self, way: Way, sizes: Sizes) -> float:
        """Seconds that a schedule takes beyond what keeping everything takes; 0 where those are not worth a search."""
        program = self.at(sizes)
        kept, taken = sum(op.seconds for op in program.ops), way.seconds(program)
        return taken - kept if taken > kept * (1 + WORTH) else 0.0

    def is_due(self, lost: float, sizes: Sizes, room: int, calls: int = 1) -> bool:
        """Look for another schedule once steps have lost as many seconds for want of one as looking takes.

        Whoever rents until the rent has come to the price, and buys then, pays at most twice what would have been best with
        the future known (Karlin, Manasse, Rudolph and Sleator, Competitive snoopy caching, Algorithmica 3, 1988).

        Args:
            lost: by a step that has come.
            sizes: of its inputs.
            room: as for `fastest`.
            calls: likewise.

        Returns:
            Whether one has been looked for.
        """
        self.lost += lost
        if self.lost < max(self.price, LEAST):
            return False
        self.lost, began = 0.0, time.monotonic()
        if not self.is_new(sizes, room):
            return False
        self.solved(sizes, room, calls)
        self.price = time.monotonic() - began
        return True

    def is_new(self, sizes: Sizes, room: int) -> bool:
        """Whether no schedule has been looked for where memory was about as short; then one is, up to `WAYS` of them."""
        side = self.accepted(self.ways[0], sizes)  # what keeps everything
        resident = self.at(sizes).resident_bytes
        short = 1.0 if side is None else max(room - resident, 1) / max(side.peak - resident, 1)
        if len(self.tried) >= WAYS or any(abs(short - known) < ALIKE * known for known in self.tried):
            return False
        self.tried.append(short)
        return True

    def solved(self, sizes: Sizes, room: int, calls: int) -> Choice | None:
        """What fits once one more schedule has been looked for."""
        target = room
        for _ in range(TRIES if calls > 1 else 1):
            try:
                side = self.solve(sizes, target).side
            except BudgetError:
                break
            short = together(side, calls) - room
            if short <= 0:
                break
            target = min(target, side.peak) - max(short // calls, room // 100)
        return self.fitting(sizes, room, calls)

    def fitting(self, sizes: Sizes, room: int, calls: int = 1) -> Choice | None:
        """The fastest of the schedules that are known that fits."""
        program, best = self.at(sizes), None
        for way in self.ways:
            if best is not None and way.seconds(program) >= best.way.seconds(program):
                continue
            side = self.accepted(way, sizes)
            if side is not None and together(side, calls) <= room:
                best = Choice(way, side)
        return best

    def accepted(self, way: Way, sizes: Sizes) -> Side | None:
        """A way at some sizes; None where the referee refuses it."""
        try:
            return self.side(way, sizes)
        except InvalidSchedule:
            return None


__all__ = ["Choice", "Way", "Ways"]

"""The largest size whose step has a schedule within a budget.

A schedule of one size is one of another where both have the same ops (`planner/ir/family.py`); the referee says in a tenth of
a second whether it fits there. So the sizes that the schedules known reach are found by doubling and halving, and only beyond
them is anything searched. Where each size has ops of its own, as with depth, each is traced; bytes then grow by a layer's for
each layer, and the next size to try follows from two that are known.

Both take it that what fits at one size fits at any smaller. That is looked at again in the end, at sizes behind the boundary
that kernels like better.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...solvers.remat.descent import least_of
from ..ir.errors import BudgetError, InvalidSchedule, MemplanError
from ..ir.family import rebound
from ..ir.fit import Why
from ..ir.plan import Side, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import Schedule
from ..pipeline.planner import Planner
from .steps import LEAST, Steps

ROUND = (8, 64)  # multiples that kernels pad to
AGAIN = 3  # times that the search goes on from a size behind the boundary
FAR = 32  # times the largest size known, to which bytes are extrapolated
STRAIGHT = 4  # sizes found by lines, before a bracket is halved
SHORT = 0.25  # seconds of search for a size, at least
PART, LAST = 1 / 10, 1 / 5  # of the time: for a size, and for the one after the largest
PROVED = 1.0  # seconds for the smallest schedule of a size that cannot fit


@dataclass(frozen=True)
class Trial:
    """What is known of a size.

    Attributes:
        side: a schedule within the budget, or the smallest known, where that was asked for; None where there is no such model.
        why: why it does not fit; empty where it does.
    """

    side: Side | None
    why: Why | None

    @property
    def fits(self) -> bool:
        """Whether the referee has accepted a schedule within the budget."""
        return self.why is None


class FitSearch:
    """Looks for the largest size.

    Attributes:
        steps: at every size.
        limit: bytes.
        most: the largest size asked for.
        seconds: of search; then what is left of the halving is searched in as little time as can be.
        trials: what was searched, by size.
        beyond: why a size cannot be built.
        ways: schedules known, each with its program.
    """

    def __init__(self, steps: Steps, limit: int, most: int, seconds: float):
        self.steps, self.limit, self.most = steps, limit, most
        self.seconds, self.ends = seconds, time.monotonic() + seconds
        self.trials: dict[int, Trial] = {}
        self.beyond: dict[int, str] = {}
        self.ways: list[tuple[Program, Schedule]] = []

    def run(self, base: int) -> int:
        """The largest size that fits, and `trials` of it and of the next one.

        Args:
            base: the size to begin with.

        Raises:
            BudgetError: not even 1 fits.
        """
        low = self.by_replay(min(base, self.most)) if self.steps.plans is not None else self.by_lines(min(base, self.most))
        for _ in range(AGAIN):
            low = self.settled(low)
            later = [size for size in self.behind(low) if self.steps.is_cheap(size) and self.reaches(size)]
            if not later:
                break
            low = self.reach(max(later), None)
        return low

    def settled(self, low: int) -> int:
        """The boundary, whose next size has been searched for longer, and for the smallest schedule."""
        while True:
            low = self.climb(low)
            if not self.searched(low + 1, self.seconds * LAST, True).fits:
                break
            low += 1
        if low == 0:
            raise self.refusal()
        return low

    def refusal(self) -> MemplanError:
        """The error where nothing fits."""
        trial = self.trials[1]
        if trial.side is None:
            return MemplanError(self.beyond.get(1, f"{self.steps.over} 1 does not fit"))
        error = self.steps.at(1).planner.refuse(self.limit, trial.side)
        return BudgetError(f"at {self.steps.over} 1: {error}", error.minimum)

    # --- sizes with one trace

    def by_replay(self, base: int) -> int:
        """The largest size that the schedules of the first reach; 0 for none."""
        start = min(max(base, LEAST), self.most)
        fits = self.searched(start, self.part, True).fits
        if fits:
            self.add(self.steps.at(start).planner.kept)
        return self.reach(start, None) if fits else self.halve(0, start)

    def reach(self, low: int, high: int | None) -> int:
        """The largest size that the schedules known reach, in steps that double, then by halving.

        Args:
            low: a size that fits.
            high: one that does not, or None.
        """
        end, step = self.most + 1 if high is None else high, 1
        while end - low > 1:
            size = min(low + step, end - 1)
            if not self.reaches(size):
                return self.halve(low, size)
            low, step = size, 2 * step
        return low

    def halve(self, low: int, high: int) -> int:
        """The same between a size that fits and one that does not."""
        while high - low > 1:
            middle = (low + high) // 2
            if self.reaches(middle):
                low = middle
            else:
                high = middle
        return low

    def reaches(self, size: int) -> bool:
        """Whether a schedule known fits at a size; it is not where that takes a trace, or cannot be built."""
        if not self.is_built(size) or not self.steps.is_cheap(size):
            return False
        return (size in self.trials and self.trials[size].fits) or next(self.replays(size, self.limit), None) is not None

    def climb(self, low: int) -> int:
        """The largest size that a search finds a schedule for, from one that fits: twice as large, then by halving.

        It goes on when the time is up, in shorter searches, until the size after the largest has been tried.
        """
        high = min((size for size, trial in self.trials.items() if not trial.fits and size > low), default=self.most + 1)
        while high - low > 1:
            size = min(2 * low, high - 1) if high > self.most and low else (low + high) // 2
            if self.searched(size, self.part).fits:
                low = self.reach(size, high) if self.steps.is_cheap(size) else size
            else:
                high = size
        return low

    def behind(self, low: int) -> set[int]:
        """Sizes a little larger than the one after the boundary."""
        return {size for size in (low + 2, *(-(-(low + 2) // each) * each for each in ROUND)) if size <= self.most}

    # --- sizes that are traced each

    def by_lines(self, base: int) -> int:
        """The largest size by lines through the bytes of the smallest schedules; 0 for none."""
        low, high, tried = 0, self.most + 1, 0
        known: dict[int, int] = {}
        size = min(base, LEAST) if self.steps.over == "layers" else base
        while high - low > 1:
            trial = self.searched(size, self.part, True)
            if trial.side is not None:
                planner = self.steps.at(size).planner
                planner.deadline = time.monotonic() + self.part / 2
                known[size] = min(planner.quick_floor.peak, trial.side.peak)
            low, high = (size, high) if trial.fits else (low, size)
            tried += 1
            size = self.next_size(known, low, high, tried)
        return low

    def next_size(self, known: dict[int, int], low: int, high: int, tried: int) -> int:
        """The size at which bytes reach the limit, on the line through the two sizes known that are closest to it."""
        guess = (low + high) // 2 if high <= self.most or tried > STRAIGHT else 2 * max(low, 1)
        if len(known) > 1 and tried <= 2 * STRAIGHT:
            (one, here), (other, there) = sorted(known.items(), key=lambda pair: abs(pair[1] - self.limit))[:2]
            if one != other and (here - there) * (one - other) > 0:
                guess = int(one + (self.limit - here) * (other - one) / (there - here))
                guess = min(guess, FAR * max(known))
        return min(max(guess, low + 1), high - 1)

    # --- one size

    @property
    def part(self) -> float:
        """Seconds for one size: the less, the less time is left."""
        return max(SHORT, min(self.seconds * PART, self.ends - time.monotonic()))

    def is_built(self, size: int) -> bool:
        """Whether there is a model of this size; if not, why is kept."""
        if size > self.most or size >= min(self.beyond, default=self.most + 1):
            return False
        try:
            self.steps.make(size)
        except MemplanError as error:
            self.beyond[size] = str(error)
            return False
        return True

    def searched(self, size: int, seconds: float, smallest: bool = False) -> Trial:
        """What a search says of a size.

        Args:
            size: which.
            seconds: for it.
            smallest: look for the smallest schedule, where none fits.
        """
        there = self.is_built(size)
        trial = self.search(size, seconds, smallest) if there else Trial(None, "most" if size > self.most else "built")
        self.trials[size] = trial
        if trial.side is not None:
            self.add(trial.side)
        return trial

    def search(self, size: int, seconds: float, smallest: bool) -> Trial:
        """The same, of a model that there is."""
        known = next(self.replays(size, self.limit), None)
        if known is not None:
            return Trial(known, None)
        planner = self.steps.at(size).planner
        planner.known = min(self.replays(size, None), key=lambda side: side.peak, default=None)
        proved = least_of(planner.flat.problem) > self.limit
        planner.deadline = time.monotonic() + (PROVED if proved else seconds)
        if not proved:
            answer = planner.within(self.limit)
            if answer is not None:
                return Trial(answer.found, None)
        why = "bytes" if proved else "search"
        if not smallest:
            return Trial(None, why)
        if not proved and self.no_order(planner):
            why = "order"
        return Trial(planner.quick_floor if proved else planner.floor, why)

    def no_order(self, planner: Planner) -> bool:
        """Whether linear programs say of every base order that was tried that no schedule keeps it."""
        return not any(np.isfinite(way.bound(self.limit)) for way in (planner, *planner.others))

    def add(self, side: Side) -> None:
        """Let a schedule be tried at other sizes. One with homes or copies is of its own bytes."""
        if not side.schedule.homes and all(known.instructions != side.schedule.instructions for _, known in self.ways):
            self.ways.append((side.program, side.schedule))

    def replays(self, size: int, limit: int | None) -> Iterator[Side]:
        """The schedules known that the referee accepts at a size within a number of bytes, the latest first; None for any."""
        program, machine = self.steps.program(size), self.steps.machine
        for known, schedule in reversed(self.ways):
            try:
                same = rebound(schedule, known, program)
                yield Side(program, same, referee(program, machine if limit is not None else unlimited(machine), same, limit))
            except InvalidSchedule:
                continue

    def fastest(self, size: int, seconds: float) -> Side:
        """The fastest schedule at a size that fits: of those known, and of some seconds' search."""
        sides = list(self.replays(size, self.limit))
        trial = self.trials.get(size)
        if trial is not None and trial.fits and trial.side is not None:
            sides.append(trial.side)
        best = min(sides, key=lambda side: side.time)
        if seconds <= 0 or best.time <= sum(op.seconds for op in best.program.ops):
            return best
        planner = self.steps.at(size).planner
        planner.known, planner.deadline = best, time.monotonic() + seconds
        found = planner.solve(self.limit).found
        self.add(found)
        return min(best, found, key=lambda side: side.time)

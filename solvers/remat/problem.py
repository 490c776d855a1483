"""The rematerialisation problem as flat arrays, and the exact simulation that checks every answer and scores it.

A *base order* of ops is given. Between the making of a buffer, its uses in that order, and the end lie its *gaps*. A
solution has five numbers for every gap, the rows of an int32 array:

    SINCE   the base time from which the value stays resident until the use that ends the gap; a time before the gap
            means kept throughout
    BEGIN   and from this base time,
    HOLD    until this one, it is resident as well, for the sake of recomputations that read it; a BEGIN before the gap
            means from the use or making that opens the gap
    EAGER   whether the value is made at SINCE (bit 1) or at BEGIN (bit 2) though nobody needs it then; otherwise the
            interval starts when somebody first does
    MOVE    0, or the number (from 1) of the tier from which the value is *fetched* where this gap misses it. The fetch is
            started at SINCE; in the last gap, whose value only recomputations read, at BEGIN. A value that is ever fetched
            is copied out as soon as it is made; from then on it is fetched, not recomputed, wherever it is missing.

A buffer that may be at home in another tier, a parameter say, has the same gaps, one before its first use and one between any
two. It *stays* on the device all step long, at no cost, where its first gap fetches nothing (SINCE a time before the gap); else
it lies elsewhere and is fetched, at SINCE, wherever it is missing.

These are the retention intervals of Moccasin (Bartan et al. 2023), at most three a gap. A value that is missing where it
is needed is rematerialised there, with whatever of its inputs is missing, so that nesting needs nothing more. Eager
starts are for values that are smaller than the inputs they are made of. From a solution an order of *events* follows (an op
runs, or the fetch of a buffer starts), and from the order each buffer's lives, the bytes at every event, and the time.

Each tier behind the device has a queue of copies out and one of copies in, first come first served. A copy out holds its
bytes on the device until it has ended; a run waits for what it reads, and where bytes are short for copies out to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..face.answer import Answer, Limit, Status
from .replay import BEGIN, EAGER, HOLD, IN, IN_DELAY, MOVE, NEVER, SINCE, evaluate, expand, replay

KEEP = -1  # a time before any base time: kept throughout, or not held
NO_TIERS = np.zeros((0, 8))
AHEAD = 32.0  # see `Problem.keep_all`
ROOMY = 2**62  # bytes: a budget that everything fits
EXACT = 1e-9  # by which times that are summed in another order may differ


@dataclass(frozen=True)
class Problem:
    """A step in arrays. Buffers are those with a producer; resident ones are only a sum of bytes.

    Attributes:
        seconds: time of each op, shape (ops,), float64.
        workspace: bytes an op needs beside its outputs, shape (ops,), int64.
        size: bytes of each buffer, shape (buffers,), int64.
        producer: the op that makes each buffer, shape (buffers,), int32.
        read_start: op i reads `read[read_start[i]:read_start[i + 1]]`; likewise `write` and the rest.
        reuse_start: op i may write `reuse_new[k]` in place of `reuse_old[k]` for k in its range.
        use_start: buffer b is read at base times `use[use_start[b]:use_start[b + 1]]`, ascending.
        output: buffers that are live at the end, shape (buffers,), bool.
        repeatable: the last base time before which each op may run again, shape (ops,), int32; 0 for one that may not.
        resident: bytes live throughout.
        boundary: base time of the loss; ops after it are the backward pass.
        tiers: the tiers behind the device, shape (tiers, 8): bytes per second out, seconds per copy out, seconds of computing
            lost for a second of copying out; the same in; capacity in bytes; and the rate, as a share, of a copy while
            another goes the other way, which keeps its own.
        home: for each buffer 0, or the number of the tier where it may lie before the step and after it: a parameter, say. Such
            buffers are the last ones, in the order in which they had better lie there; their producer is a time after the last
            op; they are fetched, never made.
        changed_start: op i changes `changed[changed_start[i]:changed_start[i + 1]]`, which may be at home in a tier, is the
            last to read them, and sends them home.
        kind: ops with equal numbers do the same, shape (ops,), int32.
    """

    seconds: np.ndarray
    workspace: np.ndarray
    size: np.ndarray
    producer: np.ndarray
    read_start: np.ndarray
    read: np.ndarray
    write_start: np.ndarray
    write: np.ndarray
    reuse_start: np.ndarray
    reuse_new: np.ndarray
    reuse_old: np.ndarray
    use_start: np.ndarray
    use: np.ndarray
    output: np.ndarray
    repeatable: np.ndarray
    resident: int
    boundary: int
    tiers: np.ndarray
    home: np.ndarray
    changed_start: np.ndarray
    changed: np.ndarray
    kind: np.ndarray

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arguments that the compiled functions share, in their order."""
        return (
            self.seconds, self.workspace, self.size, self.producer, self.read_start, self.read, self.write_start,
            self.write, self.reuse_start, self.reuse_new, self.reuse_old, self.use_start, self.use, self.output,
            self.repeatable, self.resident, self.tiers, self.home, self.changed_start, self.changed,
        )  # fmt: skip

    @property
    def expanded(self) -> tuple[Any, ...]:
        """What `expand` takes before a solution."""
        return (
            self.producer, self.read_start, self.read, self.write_start, self.write, self.use_start, self.use, self.output,
            self.repeatable, self.home,
        )  # fmt: skip

    @property
    def replayed(self) -> tuple[Any, ...]:
        """What `replay` takes before events."""
        return (
            self.seconds, self.workspace, self.size, self.read_start, self.read, self.write_start, self.write,
            self.reuse_start, self.reuse_new, self.reuse_old, self.output, self.resident, self.tiers, self.home,
            self.changed_start, self.changed,
        )  # fmt: skip

    @property
    def last_gap(self) -> np.ndarray:
        """For each buffer the gap that no use ends. Buffer b has the gaps `use_start[b] + b` to this one."""
        return self.use_start[1:] + np.arange(len(self.size))

    def inputs(self, op: int) -> np.ndarray:
        """What an op reads of the buffers that the step makes."""
        read = self.read[self.read_start[op] : self.read_start[op + 1]]
        return read[self.home[read] == 0]

    @property
    def first_gap(self) -> np.ndarray:
        """For each buffer the gap that its first use ends."""
        return self.use_start[:-1] + np.arange(len(self.size))

    def keep_all(self, away: float = 0.0, ahead: float = AHEAD) -> np.ndarray:
        """The solution that recomputes nothing and moves only what is at home elsewhere: an int32 array of shape (5, gaps).

        That is fetched for the forward pass, and again for the backward pass, just in time: the last copy ends when it is
        needed, the one before it then or when the last begins, and so on.

        Args:
            away: the share, in bytes, of the buffers that may be at home elsewhere which are, the first ones first.
            ahead: a copy starts no earlier than so many times what it takes before it is needed.
        """
        solution = np.full((5, len(self.use) + len(self.size)), KEEP, np.int32)
        solution[SINCE, self.last_gap] = NEVER
        solution[EAGER] = solution[MOVE] = 0
        ends = np.concatenate([[0.0], np.cumsum(self.seconds)])
        guests = np.flatnonzero(self.home)
        leave = np.cumsum(self.size[guests]) <= away * self.size[guests].sum()
        needed = []
        for buffer in guests:
            uses = self.use[self.use_start[buffer] : self.use_start[buffer + 1]].tolist()
            for index, (previous, at) in enumerate(zip([-1, *uses], uses, strict=False), int(self.use_start[buffer])):
                if previous < 0 or previous <= self.boundary < at:
                    needed.append((at, previous, index + int(buffer), int(buffer)))
        begins = np.full(len(self.tiers), np.inf)  # of the copy after it on the same link
        for at, previous, gap, buffer in sorted(needed, reverse=True):
            link = self.home[buffer] - 1
            seconds = self.size[buffer] / self.tiers[link, IN] + self.tiers[link, IN_DELAY]
            begin = max(min(begins[link], ends[at]) - seconds, ends[at] - ahead * seconds)
            since = int(np.searchsorted(ends, begin, side="right")) - 1
            solution[SINCE, gap], solution[MOVE, gap] = min(max(since, previous + 1, 0), at), self.home[buffer]
            if leave[buffer - guests[0]]:
                begins[link] = begin
        solution[SINCE, self.first_gap[guests[~leave]]] = KEEP
        solution[MOVE, self.first_gap[guests[~leave]]] = 0
        return solution


@dataclass(frozen=True)
class Score:
    """What a solution costs.

    Attributes:
        time: seconds of all runs; infinite where a solution needs to repeat what may not be repeated, or comes to more events
            than `replay.limit_of` allows.
        peak: largest number of live bytes, resident ones included.
        excess: how far the timeline is over the budget: the sum over base times of the bytes above it.
    """

    time: float
    peak: int
    excess: float


def score(problem: Problem, solution: np.ndarray, budget: int) -> Score:
    """Simulate a solution."""
    time, peak, excess, _ = evaluate(*problem.arrays, solution, np.int64(budget))  # pyright: ignore[reportCallIssue]
    return Score(float(time), int(peak), float(excess))


def fault(problem: Problem, solution: np.ndarray, budget: int = ROOMY) -> str:
    """What is wrong with a solution, in words; empty where nothing is."""
    found = score(problem, solution, budget)
    if not np.isfinite(found.time):
        return "it repeats what may not be repeated, or too much"
    return f"it takes {found.peak} bytes, and the budget is {budget}" if found.excess > 0 else ""


def budget_of(limit: Limit) -> int:
    """Bytes that a solution may take."""
    return ROOMY if limit.bytes is None else limit.bytes


def verdict(
    problem: Problem, solutions: Sequence[np.ndarray], limit: Limit, bound: float, method: str
) -> Answer[np.ndarray, float]:
    """The answer of a way that found these solutions, and knows that none within the limit is faster than a bound."""
    budget = budget_of(limit)
    fit = [solution for solution in solutions if not fault(problem, solution, budget)]
    if not fit:
        return Answer(Status.UNKNOWN if np.isfinite(bound) else Status.INFEASIBLE, bound, None, method)
    times = [score(problem, solution, budget).time for solution in fit]
    status = Status.OPTIMAL if min(times) <= bound * (1 + EXACT) else Status.FEASIBLE
    return Answer(status, min(bound, *times), fit[int(np.argmin(times))], method)


@dataclass(frozen=True)
class Events:
    """What a solution comes to, in time order; nothing where its time is infinite (see `Score`).

    Attributes:
        order: the op that runs, or `-1 - buffer` for a buffer whose fetch starts.
        when: base time at which each happens.
        tier: for each buffer the number (from 1) of the tier that it is copied to and fetched from, else 0: it is not.
    """

    order: np.ndarray
    when: np.ndarray
    tier: np.ndarray


def events_of(problem: Problem, solution: np.ndarray) -> Events:
    """The events of a solution."""
    order, when, count, tier = expand(*problem.expanded, solution)  # pyright: ignore[reportCallIssue]
    count = max(count, 0)
    return Events(order[:count], when[:count], tier)


def profile(problem: Problem, solution: np.ndarray, budget: int = ROOMY) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The events of a solution, the base time of each, and the live bytes during each.

    All three are empty where the solution's time is infinite (see `Score`).
    """
    events = events_of(problem, solution)
    memory = np.zeros(len(events.order), np.int64)
    found = (events.order, events.when, len(events.order), events.tier)
    replay(*problem.replayed, *found, np.int64(budget), memory)  # pyright: ignore[reportCallIssue]
    return events.order, events.when, memory


__all__ = [
    "BEGIN", "EAGER", "HOLD", "KEEP", "MOVE", "NEVER", "NO_TIERS", "SINCE",
    "Answer", "Events", "Limit", "Problem", "Score", "Status",
    "budget_of", "events_of", "fault", "profile", "score", "verdict",
]  # fmt: skip

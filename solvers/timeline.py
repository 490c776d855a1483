"""The rematerialisation problem as flat arrays, and the exact simulation that every solver scores its answers with.

A *base order* of ops is given. Between the making of a buffer, its uses in that order, and the end lie its *gaps*. A
solution has four numbers for every gap, the rows of an int32 array:

    SINCE   the base time from which the value stays resident until the use that ends the gap; a time before the gap
            means kept throughout
    BEGIN   and from this base time,
    HOLD    until this one, it is resident as well, for the sake of recomputations that read it; a BEGIN before the gap
            means from the use or making that opens the gap
    EAGER   whether the value is made at SINCE (bit 1) or at BEGIN (bit 2) though nobody needs it then; otherwise the
            interval starts when somebody first does

These are the retention intervals of Moccasin (Bartan et al. 2023), at most three a gap. A value that is missing where it
is needed is rematerialised there, with whatever of its inputs is missing, so that nesting needs nothing more. Eager
starts are for values that are smaller than the inputs they are made of. From a solution the order of runs follows, and
from the order each buffer's lives and the bytes at every run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

SINCE, BEGIN, HOLD, EAGER = range(4)  # rows of a solution
KEEP = -1  # a time before any base time: kept throughout, or not held
NEVER = 2**30  # a time after any base time: the `since` of a buffer's last gap, which no use ends


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
        repeatable: ops that may run again, shape (ops,), bool.
        resident: bytes live throughout.
        boundary: base time of the loss; ops after it are the backward pass.
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

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arguments that the compiled functions share, in their order."""
        return (
            self.seconds, self.workspace, self.size, self.producer, self.read_start, self.read, self.write_start,
            self.write, self.reuse_start, self.reuse_new, self.reuse_old, self.use_start, self.use, self.output,
            self.repeatable, self.resident,
        )  # fmt: skip

    @property
    def last_gap(self) -> np.ndarray:
        """For each buffer the gap that no use ends. Buffer b has the gaps `use_start[b] + b` to this one."""
        return self.use_start[1:] + np.arange(len(self.size))

    def keep_all(self) -> np.ndarray:
        """The solution that recomputes nothing: an int32 array of shape (4, gaps)."""
        solution = np.full((4, len(self.use) + len(self.size)), KEEP, np.int32)
        solution[SINCE, self.last_gap] = NEVER
        solution[EAGER] = 0
        return solution


@dataclass(frozen=True)
class Score:
    """What a solution costs.

    Attributes:
        time: seconds of all runs; infinite where a solution needs to repeat what may not be repeated.
        peak: largest number of live bytes, resident ones included.
        excess: how far the timeline is over the budget: the sum over base times of the bytes above it.
    """

    time: float
    peak: int
    excess: float


def score(problem: Problem, solution: np.ndarray, budget: int) -> Score:
    """Simulate a solution."""
    time, peak, excess, _ = _evaluate(*problem.arrays, solution, np.int64(budget))  # pyright: ignore[reportCallIssue]
    return Score(float(time), int(peak), float(excess))


def order_of(problem: Problem, solution: np.ndarray) -> np.ndarray:
    """The runs of a solution in time order; empty where it needs to repeat what may not be repeated."""
    order, _, count = _expand(*problem.arrays[3:8], *problem.arrays[11:15], solution)  # pyright: ignore[reportCallIssue]
    return order[: max(count, 0)]


def profile(problem: Problem, solution: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of runs, the base time at which each happens, and the live bytes during each.

    All three are empty where the solution needs to repeat what may not be repeated.
    """
    order, when, count = _expand(*problem.arrays[3:8], *problem.arrays[11:15], solution)  # pyright: ignore[reportCallIssue]
    count = max(count, 0)
    memory = np.zeros(count, np.int64)
    a = problem.arrays
    _replay(*a[:3], *a[4:11], a[13], a[15], order, when, count, np.int64(2**62), memory)  # pyright: ignore[reportCallIssue]
    return order[:count], when[:count], memory


@njit(cache=True)
def _stays(buffer, base, upcoming, output, solution):  # pragma: no cover
    """Until when a buffer that is resident at a base time stays so."""
    gap = upcoming[buffer] + buffer
    since, hold = solution[SINCE, gap], solution[HOLD, gap]
    if output[buffer] or since <= base:
        return NEVER
    if solution[BEGIN, gap] <= base < hold:
        return NEVER if since <= hold else hold
    return -1


@njit(cache=True)
def _starts(ops, use_start, solution):  # pragma: no cover
    """What is made though nobody needs it, as linked lists: (first of each base time, next of each, buffer, gap)."""
    count = 0
    for gap in range(solution.shape[1]):
        count += (solution[EAGER, gap] & 1) + (solution[EAGER, gap] >> 1)
    first = np.full(ops if count else 0, -1, np.int32)
    following, owner, place = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    if count:
        count = 0
        for buffer in range(len(use_start) - 1):
            for gap in range(use_start[buffer] + buffer, use_start[buffer + 1] + buffer + 1):
                for bit in range(2):
                    at = solution[SINCE if bit == 0 else BEGIN, gap]
                    if solution[EAGER, gap] >> bit & 1 and 0 <= at < ops:
                        owner[count], place[count] = buffer, gap
                        following[count], first[at] = first[at], count
                        count += 1
    return first, following, owner, place


@njit(cache=True)
def _expand(producer, read_start, read, write_start, write, use_start, use, output, repeatable, solution):  # pragma: no cover
    """Base order and solution -> runs in time order. Returns (order, base time of each run, count or -1)."""
    ops, buffers = len(read_start) - 1, len(producer)
    limit = 8 * ops + 64
    order = np.empty(limit, np.int32)
    when = np.empty(limit, np.int32)
    until = np.full(buffers, -1, np.int32)  # the last base time at which each buffer is resident
    upcoming = use_start[:-1].copy()
    stack = np.empty(2 * buffers + 2 * ops + 16, np.int32)
    touched = np.empty(buffers, np.int32)
    first, following, owner, place = _starts(ops, use_start, solution)
    count = 0
    for base in range(ops):
        seen = 0
        early = first[base] if len(first) else -1
        k = read_start[base]
        while early >= 0 or k < read_start[base + 1]:
            if early >= 0:
                wanted = owner[early]
                due = place[early] == upcoming[wanted] + wanted and producer[wanted] < base
                early = following[early]
                if not due:
                    continue
            else:
                wanted = read[k]
                k += 1
            if until[wanted] >= base:
                continue
            stack[0] = producer[wanted]
            depth = 1
            while depth > 0:
                op = stack[depth - 1]
                missing = False
                for j in range(read_start[op], read_start[op + 1]):
                    if until[read[j]] < base:
                        missing = True
                        if depth >= len(stack) - 1:
                            return order, when, -1
                        stack[depth] = producer[read[j]]
                        depth += 1
                        break
                if missing:
                    continue
                depth -= 1
                if not repeatable[op] or op >= base or count >= limit - 2:
                    return order, when, -1
                order[count], when[count] = op, base
                count += 1
                for j in range(write_start[op], write_start[op + 1]):
                    if until[write[j]] < base:
                        until[write[j]] = base
                        touched[seen] = write[j]
                        seen += 1
        if count >= limit - 2:
            return order, when, -1
        order[count], when[count] = base, base
        count += 1
        for k in range(read_start[base], read_start[base + 1]):
            upcoming[read[k]] += 1
            until[read[k]] = _stays(read[k], base, upcoming, output, solution)
        for k in range(write_start[base], write_start[base + 1]):
            until[write[k]] = _stays(write[k], base, upcoming, output, solution)
        for k in range(seen):
            until[touched[k]] = _stays(touched[k], base, upcoming, output, solution)
    return order, when, count


@njit(cache=True)
def _replay(
    seconds, workspace, size, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old, output, resident,
    order, when, count, budget, memory,
):  # fmt: skip # pragma: no cover
    """Bytes during each run of an order. Returns (time, peak, excess); fills `memory` where it is long enough."""
    needed = output.copy()
    total = 0
    for at in range(count):
        total += read_start[order[at] + 1] - read_start[order[at]] + write_start[order[at] + 1] - write_start[order[at]]
    flags = np.empty(total, np.bool_)
    place = total
    for at in range(count - 1, -1, -1):
        op = order[at]
        for k in range(write_start[op + 1] - 1, write_start[op] - 1, -1):
            place -= 1
            if output[write[k]] and when[at] != op:  # the caller holds the first one; a second is dropped at once
                flags[place] = False
                continue
            flags[place] = needed[write[k]]
            needed[write[k]] = False
        for k in range(read_start[op + 1] - 1, read_start[op] - 1, -1):
            place -= 1
            flags[place] = not needed[read[k]]
            needed[read[k]] = True
    dying = np.zeros(len(size), np.bool_)
    kept = np.zeros(len(size), np.bool_)
    live = resident
    time, peak, excess = 0.0, resident, 0.0
    worst = 0
    previous = -1
    for at in range(count):
        op = order[at]
        time += seconds[op]
        gone, come, made = 0, 0, 0
        for k in range(read_start[op], read_start[op + 1]):
            dying[read[k]] = flags[place]
            if flags[place]:
                gone += size[read[k]]
            place += 1
        for k in range(write_start[op], write_start[op + 1]):
            kept[write[k]] = flags[place]
            made += size[write[k]]
            if flags[place]:
                come += size[write[k]]
            place += 1
        for k in range(reuse_start[op], reuse_start[op + 1]):
            if kept[reuse_new[k]] and dying[reuse_old[k]] and size[reuse_new[k]] == size[reuse_old[k]]:
                made -= size[reuse_old[k]]
                break
        during = live + made + workspace[op]
        live += come - gone
        if at < len(memory):
            memory[at] = during
        if during > peak:
            peak = during
        if when[at] != previous:
            excess += worst
            worst = 0
            previous = when[at]
        if during - budget > worst:
            worst = during - budget
    return time, peak, excess + worst


@njit(cache=True)
def _evaluate(
    seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
    use_start, use, output, repeatable, resident, solution, budget,
):  # fmt: skip # pragma: no cover
    """Expand and replay. Returns (time, peak, excess, count)."""
    order, when, count = _expand(producer, read_start, read, write_start, write, use_start, use, output, repeatable, solution)
    if count < 0:
        return np.inf, np.int64(2**62), np.inf, count
    memory = np.empty(0, np.int64)
    time, peak, excess = _replay(
        seconds, workspace, size, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old, output,
        resident, order, when, count, budget, memory,
    )  # fmt: skip
    return time, peak, excess, count

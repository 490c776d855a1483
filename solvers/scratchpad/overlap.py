"""The least time of a mapping, whenever its copies start.

Ops run one after another, loads on one link and stores on another, each link one copy at a time. With order and residency
given, a load cannot start before the last op beside which the scratchpad has no room for what it brings, and has to end before
the op that reads it. A store cannot start before its value is made, and has to end before the first op that needs the room.
So between the end of one step and the start of another lie at least the copies that have to start and end between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .problem import Mapped, Residency, find_gaps


@dataclass(frozen=True)
class Copy:
    """A copy that starts when step `after` has ended (-1: at once) or later, and ends before step `before` starts."""

    after: int
    before: int
    seconds: float


def least_time(
    problem: Residency, mapped: Mapped, seconds: Sequence[float], load: Sequence[float], store: Sequence[float]
) -> float:
    """Seconds that no choice of when copies start goes below.

    Args:
        problem: what is mapped.
        mapped: its order and residency.
        seconds: of each op.
        load: of each buffer's way into the scratchpad.
        store: of each buffer's way out.
    """
    live = live_bytes(problem, mapped)
    links = [(copies, {copy.before for copy in copies})
             for copies in (loads_of(problem, mapped, live, load), stores_of(problem, mapped, live, store))]  # fmt: skip
    ends = [0.0]  # when each step ends, by its number and one
    for step in range(len(mapped.order) + 1):
        start = ends[-1]
        for copies, due in links:
            if step in due:
                busy = 0.0
                for copy in copies:  # those that may start last come first
                    if copy.before <= step:
                        busy += copy.seconds
                        start = max(start, ends[copy.after + 1] + busy)
        ends.append(start + (seconds[mapped.order[step]] if step < len(mapped.order) else 0.0))
    return ends[-1]


def live_bytes(problem: Residency, mapped: Mapped) -> np.ndarray:
    """Bytes that the residency has in the scratchpad at each step, shape (steps,)."""
    live = np.array([problem.need[op] for op in mapped.order], np.int64)
    gaps = find_gaps(problem, mapped.order)
    for buffer, low, high in zip(gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist(), strict=True):
        if (buffer, high) not in mapped.dropped:
            live[low + 1 : high] += problem.size[buffer]
    return live


def loads_of(problem: Residency, mapped: Mapped, live: np.ndarray, seconds: Sequence[float]) -> list[Copy]:
    """Loads, those that may start last first."""
    copies, last = [], {}
    for step, op in enumerate(mapped.order):
        for buffer in problem.reads[op]:
            if (buffer, step) in mapped.dropped or (problem.producer[buffer] < 0 and buffer not in last):
                after, use = step - 1, last.get(buffer, -1)
                while after > use and live[after] + problem.size[buffer] <= problem.capacity:
                    after -= 1
                copies.append(Copy(after, step, seconds[buffer]))
            last[buffer] = step
        last |= dict.fromkeys(problem.writes[op], step)
    return sorted(copies, key=lambda copy: -copy.after)


def stores_of(problem: Residency, mapped: Mapped, live: np.ndarray, seconds: Sequence[float]) -> list[Copy]:
    """Stores, those that may start last first."""
    step_of = {op: step for step, op in enumerate(mapped.order)}
    copies = [Copy(step_of[problem.producer[b]], len(mapped.order), seconds[b]) for b in problem.outputs]
    gaps = find_gaps(problem, mapped.order)
    stored: set[int] = set()
    for gap in np.argsort(gaps.until).tolist():
        buffer, until = int(gaps.buffer[gap]), int(gaps.until[gap])
        if (buffer, until) in mapped.dropped and problem.fresh[buffer] and buffer not in stored:
            stored.add(buffer)
            before = int(gaps.after[gap]) + 1
            while before < until and live[before] + problem.size[buffer] <= problem.capacity:
                before += 1
            copies.append(Copy(step_of[problem.producer[buffer]], before, seconds[buffer]))
    return sorted(copies, key=lambda copy: -copy.after)

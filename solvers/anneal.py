"""Simulated annealing over retention intervals, with moves that act on every layer of a kind at once.

A slot's *code* says from when its value is resident before the use that ends the slot:

    0  kept throughout            3  from its first rematerialisation on
    1  made again at its use      4 + d  from when the d-th later segment's backward pass opens
    2  from when the backward pass of its own segment opens

Codes are relative to the segment, so that one layer's pattern can be copied to another.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from .master import Slots
from .segments import Segments
from .timeline import KEEP, Problem, _evaluate

NESTED = 4


@dataclass(frozen=True)
class Space:
    """What the moves know of the slots.

    Attributes:
        slots: the choices.
        segment: segment of each slot's buffer.
        opened: as in `Segments`.
        group_start: slots of one role are `group[group_start[g]:group_start[g + 1]]`, in order of segment.
        place_start: slots of segment s are `place[place_start[s]:place_start[s + 1]]`, alike in alike segments.
        kind: class of each segment.
        boundary: base time of the loss.
    """

    slots: Slots
    segment: np.ndarray
    opened: np.ndarray
    group_start: np.ndarray
    group: np.ndarray
    place_start: np.ndarray
    place: np.ndarray
    kind: np.ndarray
    boundary: int

    @property
    def arrays(self) -> tuple:
        """The arguments that the compiled search takes, in its order."""
        return (
            self.slots.use, self.slots.at, self.segment, self.opened, self.group_start, self.group, self.place_start,
            self.place, self.kind, self.boundary,
        )  # fmt: skip

    def decode(self, codes: np.ndarray, uses: int) -> np.ndarray:
        """Codes of slots -> `since` of all uses."""
        since = np.full(uses, KEEP, np.int32)
        _decode_all(codes, since, self.slots.use, self.slots.at, self.segment, self.opened, self.boundary)
        return since


def make_space(problem: Problem, segments: Segments, slots: Slots) -> Space:
    """Group the slots by role and by segment."""
    segment = segments.of_buffer[slots.buffer]
    nth = slots.use - problem.use_start[slots.buffer]
    late = np.array([np.searchsorted(problem.use[problem.use_start[b] : problem.use_start[b + 1]], problem.boundary)
                     for b in slots.buffer], np.int64)  # fmt: skip
    label: dict[tuple[int, int], list[int]] = {}
    places: list[list[int]] = [[] for _ in segments.start]
    for slot in range(len(slots.use)):
        label.setdefault((int(segments.role[slots.buffer[slot]]), int(nth[slot] - late[slot])), []).append(slot)
        places[segment[slot]].append(slot)
    groups = list(label.values())
    signature: dict[tuple, int] = {}
    shapes = [tuple((int(segments.role[slots.buffer[s]]), int(nth[s] - late[s])) for s in row) for row in places]
    kind = np.array([signature.setdefault(shape, len(signature)) for shape in shapes], np.int64)
    return Space(
        slots=slots,
        segment=segment.astype(np.int64),
        opened=segments.opened,
        group_start=np.concatenate([[0], np.cumsum([len(row) for row in groups])]).astype(np.int64),
        group=np.array([slot for row in groups for slot in row], np.int64),
        place_start=np.concatenate([[0], np.cumsum([len(row) for row in places])]).astype(np.int64),
        place=np.array([slot for row in places for slot in row], np.int64),
        kind=kind,
        boundary=problem.boundary,
    )


def anneal(
    problem: Problem, space: Space, codes: np.ndarray, budget: int, steps: int, hot: float, seed: int
) -> tuple[np.ndarray, float]:
    """Improve codes for a number of steps.

    Args:
        problem: what is timed.
        space: the moves.
        codes: where to start, shape (slots,), int32.
        budget: bytes.
        steps: simulations to make.
        hot: first temperature, as a fraction of the base time.
        seed: of the random moves; the same seed gives the same answer.

    Returns:
        The best codes that fit the budget, and their time; infinite (and the codes of least excess) where none did.
    """
    if len(codes) == 0:
        return codes, float("inf")
    best, time = _anneal(*problem.arrays, *space.arrays, codes.astype(np.int32), np.int64(budget), steps, hot, seed)
    return best, float(time)


@njit(cache=True)
def _decode(code, slot, at, segment, opened, boundary):  # pragma: no cover
    if code == 0:
        return -1
    if code == 1:
        return at[slot]
    if code == 2:
        return opened[segment[slot]]
    if code == 3:
        return boundary
    return opened[min(segment[slot] + code - 3, len(opened) - 1)]


@njit(cache=True)
def _decode_all(codes, since, use, at, segment, opened, boundary):  # pragma: no cover
    for slot in range(len(codes)):
        since[use[slot]] = _decode(codes[slot], slot, at, segment, opened, boundary)


@njit(cache=True)
def _anneal(
    seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
    use_start, use_list, output, repeatable, resident,
    use, at, segment, opened, group_start, group, place_start, place, kind, boundary,
    start, budget, steps, hot, seed,
):  # fmt: skip # pragma: no cover
    np.random.seed(seed)
    slots, segments = len(start), len(kind)
    codes = start.copy()
    since = np.full(len(use_list), -1, np.int32)
    _decode_all(codes, since, use, at, segment, opened, boundary)
    base = seconds.sum()
    time, peak, excess, count = _evaluate(
        seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
        use_start, use_list, output, repeatable, resident, since, budget,
    )  # fmt: skip
    best, best_time, best_excess = codes.copy(), np.inf, np.inf
    changed = np.empty(slots, np.int64)
    former = np.empty(slots, np.int32)
    for step in range(steps):
        progress = step / steps
        heat = hot * (1.0 - progress) ** 2 + 1e-9
        # a byte over the budget at one moment weighs more and more
        weight = (0.5 + 20.0 * progress) / budget
        energy = time / base + weight * excess
        moved = 0
        dice = np.random.random()
        if dice < 0.25:  # one slot
            slot = np.random.randint(slots)
            code = _draw()
            changed[0], former[0] = slot, codes[slot]
            codes[slot] = code
            moved = 1
        elif dice < 0.75:  # the same slot in a range of layers
            g = np.random.randint(len(group_start) - 1)
            low, high = group_start[g], group_start[g + 1]
            a = low + np.random.randint(high - low)
            b = low + np.random.randint(high - low)
            if np.random.random() < 0.3:
                a, b = low, high - 1
            code = _draw()
            for k in range(min(a, b), max(a, b) + 1):
                changed[moved], former[moved] = group[k], codes[group[k]]
                codes[group[k]] = code
                moved += 1
        else:  # a layer's pattern to a range of layers like it
            source = np.random.randint(segments)
            target = np.random.randint(segments)
            length = place_start[source + 1] - place_start[source]
            for s in range(min(source, target), max(source, target) + 1):
                if s != source and kind[s] == kind[source]:
                    for k in range(length):
                        slot = place[place_start[s] + k]
                        changed[moved], former[moved] = slot, codes[slot]
                        codes[slot] = codes[place[place_start[source] + k]]
                        moved += 1
        real = False
        for k in range(moved):
            slot = changed[k]
            value = _decode(codes[slot], slot, at, segment, opened, boundary)
            if since[use[slot]] != value:
                since[use[slot]] = value
                real = True
        if not real:
            continue
        new_time, new_peak, new_excess, count = _evaluate(
            seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new,
            reuse_old, use_start, use_list, output, repeatable, resident, since, budget,
        )  # fmt: skip
        delta = new_time / base + weight * new_excess - energy
        if delta <= 0 or np.random.random() < np.exp(-delta / heat):
            time, excess = new_time, new_excess
            if excess <= 0 and time < best_time:
                best[:] = codes
                best_time, best_excess = time, 0.0
            elif best_time == np.inf and excess < best_excess:
                best[:] = codes
                best_excess = excess
        else:
            for k in range(moved - 1, -1, -1):
                slot = changed[k]
                codes[slot] = former[k]
                since[use[slot]] = _decode(former[k], slot, at, segment, opened, boundary)
    return best, best_time


@njit(cache=True)
def _draw():  # pragma: no cover
    """A code: mostly one of the plain four, sometimes a nested one."""
    dice = np.random.random()
    if dice < 0.3:
        return 0
    if dice < 0.45:
        return 1
    if dice < 0.7:
        return 2
    if dice < 0.85:
        return 3
    return NESTED + np.random.randint(8)

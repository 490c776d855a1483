"""Simulated annealing over retention intervals, with moves that act on every layer of a kind at once.

A move draws new times for one gap, for the same gap in a range of layers, or copies a layer's times to a range of
layers. From layer to layer times are translated by the distance between the moments at which their backward passes
open, so that what is learnt of one layer is tried on all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from .master import Slots
from .segments import Segments
from .timeline import Problem, _evaluate


@dataclass(frozen=True)
class Space:
    """What the moves know of the gaps.

    Attributes:
        slots: the gaps that are choices.
        segment: segment of each slot's buffer.
        opened: as in `Segments`.
        group_start: slots of one role are `group[group_start[g]:group_start[g + 1]]`, in order of segment.
        place_start: slots of segment s are `place[place_start[s]:place_start[s + 1]]`, alike in alike segments.
        kind: class of each segment.
        uses: number of slots that a use ends; they come first in `draw_from`.
        draw_from: slots, those that a use ends first.
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
    uses: int
    draw_from: np.ndarray
    boundary: int

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arguments that the compiled search takes, in its order."""
        slots = self.slots
        return (
            slots.gap, slots.before, slots.at, slots.last, self.segment, self.opened, self.group_start, self.group,
            self.place_start, self.place, self.kind, self.uses, self.draw_from, self.boundary,
        )  # fmt: skip


def make_space(problem: Problem, segments: Segments, slots: Slots) -> Space:
    """Group the slots by role and by segment."""
    made = problem.producer[slots.buffer]
    by_time = np.argmin(np.where(segments.opened[None, :] <= made[:, None], made[:, None] - segments.opened, 2**30), axis=1)
    segment = np.where(segments.of_buffer[slots.buffer] >= 0, segments.of_buffer[slots.buffer], by_time)
    label: dict[tuple[int, int], list[int]] = {}
    places: list[list[int]] = [[] for _ in segments.start]
    shapes: list[list[tuple[int, int]]] = [[] for _ in segments.start]
    for slot, buffer in enumerate(slots.buffer.tolist()):
        late = int(np.searchsorted(problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]], problem.boundary))
        role = int(segments.role[buffer]) if segments.of_buffer[buffer] >= 0 else -1 - buffer
        name = (role, int(slots.gap[slot]) - int(problem.use_start[buffer]) - buffer - late)
        label.setdefault(name, []).append(slot)
        places[segment[slot]].append(slot)
        shapes[segment[slot]].append(name)
    groups = list(label.values())
    signature: dict[tuple, int] = {}
    return Space(
        slots=slots,
        segment=segment.astype(np.int64),
        opened=segments.opened,
        group_start=np.concatenate([[0], np.cumsum([len(row) for row in groups])]).astype(np.int64),
        group=np.array([slot for row in groups for slot in row], np.int64),
        place_start=np.concatenate([[0], np.cumsum([len(row) for row in places])]).astype(np.int64),
        place=np.array([slot for row in places for slot in row], np.int64),
        kind=np.array([signature.setdefault(tuple(shape), len(signature)) for shape in shapes], np.int64),
        uses=int((slots.last == 0).sum()),
        draw_from=np.argsort(slots.last, kind="stable"),
        boundary=problem.boundary,
    )


def anneal(
    problem: Problem,
    space: Space,
    solution: np.ndarray,
    budget: int,
    steps: int,
    hot: float,
    seed: int,
    care: float = 1.0,
) -> tuple[np.ndarray, float]:
    """Improve a solution for a number of steps.

    Args:
        problem: what is timed.
        space: the moves.
        solution: where to start.
        budget: bytes.
        steps: simulations to make.
        hot: first temperature, as a fraction of the base time.
        seed: of the random moves; the same seed gives the same answer.
        care: what a second counts against bytes over the budget; less than 1 looks for something that fits, whatever its time.

    Returns:
        The best solution that fits the budget, and its time; infinite (and the solution of least excess) where none did.
    """
    if len(space.slots.gap) == 0 or space.uses == 0:
        return solution, float("inf")
    arguments: tuple[Any, ...] = (*problem.arrays, *space.arrays, solution.copy(), np.int64(budget), steps, hot, seed, care)
    best, time = _anneal(*arguments)
    return best, float(time)


@njit(cache=True)
def _shifted(time, source, target, opened, boundary, ops):  # pragma: no cover
    """A time of one segment's gap as it applies to another's."""
    if time <= boundary or time >= ops:
        return time
    return max(boundary, min(time + opened[target] - opened[source], ops))


@njit(cache=True)
def _draw(slot, since, hold, before, at, last, segment, opened, boundary):  # pragma: no cover
    """New (since, hold) for a slot, out of its old ones."""
    own = segment[slot]
    low, high = max(before[slot], boundary), at[slot]
    anytime = low + 1 + np.random.randint(max(high - low, 1))
    dice = np.random.random()
    if last[slot] or dice > 0.9:
        dice = np.random.random()
        if dice < 0.5:
            return since, -1
        if dice < 0.7:
            return since, opened[own]
        if dice < 0.8 and own > 0:
            return since, min(opened[own - 1], high)
        return since, anytime
    if dice < 0.3:
        return -1, -1
    if dice < 0.45:
        return at[slot], -1
    if dice < 0.65:
        return opened[own], -1
    if dice < 0.75:
        return boundary, -1
    if dice < 0.83:
        return opened[min(own + 1 + np.random.randint(8), len(opened) - 1)], -1
    return anytime, hold


@njit(cache=True)
def _anneal(
    seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
    use_start, use_list, output, repeatable, resident,
    gap, before, at, last, segment, opened, group_start, group, place_start, place, kind, uses, draw_from, boundary,
    solution, budget, steps, hot, seed, care,
):  # fmt: skip # pragma: no cover
    np.random.seed(seed)
    slots, segments, ops = len(gap), len(kind), len(seconds)
    base = seconds.sum()
    time, _, excess, _ = _evaluate(
        seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
        use_start, use_list, output, repeatable, resident, solution, budget,
    )  # fmt: skip
    best, best_time, best_excess = solution.copy(), np.inf, np.inf
    changed = np.empty(slots, np.int64)
    former = np.empty((2, slots), np.int32)
    for step in range(steps):
        progress = step / steps
        heat = hot * (1.0 - progress) ** 2 + 1e-9
        # a byte over the budget at one moment weighs more and more
        weight = (0.5 + 20.0 * progress) / budget
        energy = care * time / base + weight * excess
        moved = 0
        real = False
        dice = np.random.random()
        if dice < 0.75:
            pool = slots if np.random.random() < 0.15 else uses
            slot = draw_from[np.random.randint(pool)]
            since, hold = _draw(
                slot, solution[0, gap[slot]], solution[1, gap[slot]], before, at, last, segment, opened, boundary
            )
            first, final, g = 0, 0, 0
            if dice > 0.35:  # the same gap in a range of layers
                g = np.random.randint(len(group_start) - 1)
                low, high = group_start[g], group_start[g + 1]
                pick = low + np.random.randint(high - low)
                slot = group[pick]
                since, hold = _draw(
                    slot, solution[0, gap[slot]], solution[1, gap[slot]], before, at, last, segment, opened, boundary
                )
                other = low + np.random.randint(high - low)
                first, final = min(pick, other), max(pick, other)
                if np.random.random() < 0.3:
                    first, final = low, high - 1
            for k in range(first, final + 1):
                target = slot if dice <= 0.35 else group[k]
                new_since = _shifted(since, segment[slot], segment[target], opened, boundary, ops)
                if since == at[slot]:
                    new_since = at[target]
                new_hold = _shifted(hold, segment[slot], segment[target], opened, boundary, ops)
                changed[moved] = target
                former[0, moved], former[1, moved] = solution[0, gap[target]], solution[1, gap[target]]
                if solution[0, gap[target]] != new_since or solution[1, gap[target]] != new_hold:
                    solution[0, gap[target]], solution[1, gap[target]] = new_since, new_hold
                    real = True
                moved += 1
        else:  # a layer's times to a range of layers like it
            source = np.random.randint(segments)
            goal = np.random.randint(segments)
            length = place_start[source + 1] - place_start[source]
            for s in range(min(source, goal), max(source, goal) + 1):
                if s != source and kind[s] == kind[source]:
                    for k in range(length):
                        slot, target = place[place_start[source] + k], place[place_start[s] + k]
                        changed[moved] = target
                        former[0, moved], former[1, moved] = solution[0, gap[target]], solution[1, gap[target]]
                        since, hold = solution[0, gap[slot]], solution[1, gap[slot]]
                        new_since = _shifted(since, source, s, opened, boundary, ops)
                        if since == at[slot]:
                            new_since = at[target]
                        new_hold = _shifted(hold, source, s, opened, boundary, ops)
                        if former[0, moved] != new_since or former[1, moved] != new_hold:
                            solution[0, gap[target]], solution[1, gap[target]] = new_since, new_hold
                            real = True
                        moved += 1
        if not real:
            continue
        new_time, _, new_excess, _ = _evaluate(
            seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new,
            reuse_old, use_start, use_list, output, repeatable, resident, solution, budget,
        )  # fmt: skip
        delta = care * new_time / base + weight * new_excess - energy
        if delta <= 0 or np.random.random() < np.exp(-delta / heat):
            time, excess = new_time, new_excess
            if excess <= 0 and time < best_time:
                best[:] = solution
                best_time, best_excess = time, 0.0
            elif best_time == np.inf and excess < best_excess:
                best[:] = solution
                best_excess = excess
        else:
            for k in range(moved - 1, -1, -1):
                solution[0, gap[changed[k]]], solution[1, gap[changed[k]]] = former[0, k], former[1, k]
    return best, best_time

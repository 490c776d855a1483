"""Simulated annealing over retention intervals, with moves that act on every layer of a kind at once.

A move draws new times for one gap (and may go on to gaps of the same op's other results and of its inputs), for the
same gap in a range of layers, or copies a layer's times to a range of layers. From layer to layer times are translated
by the distance between the moments at which their backward passes open, so that what is learnt of one layer is tried
on all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..jit.compiled import compiled
from .exact import SMALL, Slots, find_slots
from .problem import BEGIN, EAGER, HOLD, MOVE, NEVER, SINCE, Answer, Limit, Problem, budget_of, score, verdict
from .replay import evaluate
from .segments import Segments, find_segments

RELATED = 4  # at most so many gaps change in one move, beside the moves on layers
STEPS, HOT = 20_000, 0.05  # simulations, and the first temperature, where nobody says how many and how hot
FEW = 150  # ops: programs up to this size are searched for eager starts and middle intervals more


def solve(problem: Problem, limit: Limit) -> Answer[np.ndarray, float]:
    """One annealing from nothing dropped: so many simulations, whatever the seconds. It knows no bound but the time without."""
    space = make_space(problem, find_segments(problem), find_slots(problem, len(problem.seconds) <= SMALL))
    found, _ = anneal(problem, space, problem.keep_all(), budget_of(limit), STEPS, HOT, limit.seed)
    return verdict(problem, [found], limit, float(problem.seconds.sum()), "annealing")


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
        slot_of: slot of each gap, else -1.
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
    slot_of: np.ndarray

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arguments that the compiled search takes, in its order."""
        slots = self.slots
        return (
            slots.gap, slots.before, slots.at, slots.last, self.segment, self.opened, self.group_start, self.group,
            self.place_start, self.place, self.kind, self.uses, self.draw_from, self.boundary, slots.buffer, self.slot_of,
            slots.movable,
        )  # fmt: skip


def make_space(problem: Problem, segments: Segments, slots: Slots) -> Space:
    """Group the slots by role and by segment."""
    made = problem.producer[slots.buffer]
    segment = segments.of_buffer[slots.buffer]
    backward = np.flatnonzero(segment < 0)
    segment[backward] = segment_open(segments.opened, made[backward])
    label: dict[tuple[int, int], list[int]] = {}
    places: list[list[int]] = [[] for _ in segments.start]
    shapes: list[list[tuple[int, int]]] = [[] for _ in segments.start]
    for slot, buffer in enumerate(slots.buffer.tolist()):
        late = int(np.searchsorted(problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]], problem.boundary))
        role = int(segments.role[buffer]) if segments.of_buffer[buffer] >= 0 else -1 - buffer
        name = (role, int(slots.gap[slot]) - int(problem.use_start[buffer]) - buffer - late)
        if problem.home[buffer]:  # of one kind: what has as many uses
            name = (-1 - len(problem.size) - int(problem.use_start[buffer + 1] - problem.use_start[buffer]), name[1] + late)
        label.setdefault(name, []).append(slot)
        if not problem.home[buffer]:
            places[segment[slot]].append(slot)
            shapes[segment[slot]].append(name)
    groups = list(label.values())
    slot_of = np.full(len(problem.use) + len(problem.size), -1, np.int64)
    slot_of[slots.gap] = np.arange(len(slots.gap))
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
        slot_of=slot_of,
    )


def segment_open(opened: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For each time the segment whose backward pass has opened last, the first of several; 0 where none has."""
    order = np.argsort(opened, kind="stable")
    ascending = opened[order]
    last = ascending[np.maximum(np.searchsorted(ascending, times, side="right") - 1, 0)]
    first = order[np.searchsorted(ascending, last)]
    return np.where(last <= times, first, 0)


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
        The best solution that fits the budget, the start among them, and its time; infinite (and the solution of least
        excess) where none did.
    """
    if len(space.slots.gap) == 0 or space.uses == 0:
        found = score(problem, solution, budget)
        return solution, found.time if found.excess <= 0 else float("inf")
    few = len(problem.seconds) <= FEW
    single, fine = (0.8, 0.25) if few else (0.35, 0.02)
    how = (solution.copy(), np.int64(budget), steps, hot, seed, care, single, fine)
    arguments: tuple[Any, ...] = (*problem.arrays, *space.arrays, *how)
    best, time = _anneal(*arguments)
    return best, float(time)


@compiled()
def _shifted(time, source, target, opened, boundary, ops):  # pragma: no cover
    """A time of one segment's gap as it applies to another's."""
    if time <= boundary or time >= ops:
        return time
    return max(boundary, min(time + opened[target] - opened[source], ops))


@compiled()
def _draw(fresh, slot, before, at, last, segment, opened, boundary, fine, tiers, movable, home):  # pragma: no cover
    """Change a slot's times in place."""
    own = segment[slot]
    if movable[slot] == 3:  # fetched from home in good time, or kept from the use before; before the first use: at home here
        if np.random.random() < 0.5:
            fresh[SINCE], fresh[MOVE] = -1, 0
            return
        reach = 1 << np.random.randint(10)
        fresh[SINCE] = max(at[slot] - np.random.randint(reach), before[slot] + 1, 0)
        fresh[MOVE] = home
        return
    if movable[slot] > 0 and (movable[slot] == 2 or np.random.random() < 0.5):
        fresh[BEGIN], fresh[HOLD], fresh[EAGER] = -1, -1, 0
        fresh[MOVE] = 1 + np.random.randint(tiers)
        dice = np.random.random()
        if last[slot]:  # read by recomputations alone, mostly by those of the segments that follow
            other = min(own + np.random.randint(3), len(opened) - 1)
            fresh[HOLD] = opened[other]
            fresh[BEGIN] = -1 if dice < 0.2 else max(opened[min(other + 1, len(opened) - 1)], boundary)
            return
        if dice < 0.3:
            fresh[SINCE], fresh[MOVE] = -1, 0
        elif dice < 0.5:
            fresh[SINCE] = opened[own]
        elif dice < 0.8:  # while the backward pass of a segment before is running
            fresh[SINCE] = opened[min(own + 1 + np.random.randint(3), len(opened) - 1)]
        else:
            fresh[SINCE] = at[slot] - np.random.randint(32)
        fresh[SINCE] = -1 if fresh[SINCE] < 0 else min(max(fresh[SINCE], before[slot] + 1, boundary), at[slot])
        return
    fresh[MOVE] = 0
    low, high = max(before[slot], boundary), at[slot]
    if high <= low:
        low = before[slot]
    anytime = low + 1 + np.random.randint(max(high - low, 1))
    dice = np.random.random()
    if last[slot] or dice > 0.9:
        dice = np.random.random()
        fresh[BEGIN] = -1
        fresh[EAGER] &= 1
        if dice < fine:
            other = low + 1 + np.random.randint(max(high - low, 1))
            fresh[BEGIN], fresh[HOLD] = min(anytime, other), max(anytime, other)
            if np.random.random() < 0.5:
                fresh[EAGER] |= 2
            return
        dice = np.random.random()
        if dice < 0.5:
            fresh[HOLD] = -1
        elif dice < 0.7:
            fresh[HOLD] = opened[own]
        elif dice < 0.8 and own > 0:
            fresh[HOLD] = min(opened[own - 1], high)
        else:
            fresh[HOLD] = anytime
        return
    fresh[EAGER] &= 2
    if dice < 0.3:
        fresh[SINCE] = -1
    elif dice < 0.45:
        fresh[SINCE] = at[slot]
    elif dice < 0.65:
        fresh[SINCE] = opened[own]
    elif dice < 0.75:
        fresh[SINCE] = boundary
    elif dice < 0.83:
        fresh[SINCE] = opened[min(own + 1 + np.random.randint(8), len(opened) - 1)]
    else:
        fresh[SINCE] = anytime
        if np.random.random() < 2.0 * fine:
            fresh[EAGER] |= 1
        return
    if np.random.random() > fine:  # a middle interval is worth keeping where it was hard to find
        fresh[BEGIN], fresh[HOLD], fresh[EAGER] = -1, -1, 0


@compiled()
def _place(
    solution, former, changed, moved, fresh, source, slot, target, gap, before, at, segment, opened, boundary, ops, movable
):  # pragma: no cover
    """Write one slot's times, moved to where the target is, into the solution. Returns whether that changes anything."""
    changed[moved] = target
    real = False
    for row in range(5):
        value = fresh[row]
        if movable[slot] == 3:  # as long before the use
            if row == SINCE and value >= 0:
                value = max(at[target] - at[slot] + value, before[target] + 1, 0)
        elif row == SINCE and value == at[slot]:
            value = at[target]
        elif row != EAGER and row != MOVE:
            value = _shifted(value, source, segment[target], opened, boundary, ops)
        former[row, moved] = solution[row, gap[target]]
        real |= former[row, moved] != value
        solution[row, gap[target]] = value
    return real


@compiled()
def _relative(slot, fresh, owner, slot_of, use_start, use, producer, read_start, read, write_start, write):  # pragma: no cover
    """A slot that a slot's new times concern: of another output, or of an input, of the op that is to run then; or -1."""
    now = fresh[SINCE] if fresh[SINCE] < NEVER else fresh[HOLD]
    op = producer[owner[slot]]
    if now < 0 or fresh[MOVE] > 0:
        return -1
    dice = np.random.randint(3)
    if dice == 0 and write_start[op + 1] - write_start[op] > 1:
        buffer = write[write_start[op] + np.random.randint(write_start[op + 1] - write_start[op])]
        if buffer == owner[slot]:
            return -1
    elif dice == 1 and read_start[op + 1] > read_start[op]:
        buffer = read[read_start[op] + np.random.randint(read_start[op + 1] - read_start[op])]
    else:
        return -1
    index = use_start[buffer]
    while index < use_start[buffer + 1] and use[index] < now:
        index += 1
    return slot_of[index + buffer]


@compiled(nogil=True)
def _anneal(
    seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
    use_start, use_list, output, repeatable, resident, tiers, home, changed_start, changed_list,
    gap, before, at, last, segment, opened, group_start, group, place_start, place, kind, uses, draw_from, boundary,
    owner, slot_of, movable, solution, budget, steps, hot, seed, care, single, fine,
):  # fmt: skip # pragma: no cover
    np.random.seed(seed)
    slots, segments, ops = len(gap), len(kind), len(seconds)
    base = 0.0
    for op in range(ops):  # seconds.sum(), whose errors in words take numba seconds to compile
        base += seconds[op]
    base = base if base > 0 else 1.0
    time, _, excess, _ = evaluate(
        seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
        use_start, use_list, output, repeatable, resident, tiers, home, changed_start, changed_list, solution, budget,
    )  # fmt: skip
    best, best_time, best_excess = solution.copy(), time if excess <= 0 else np.inf, max(excess, 0.0)
    changed = np.empty(slots + RELATED, np.int64)
    former, fresh = np.empty((5, slots + RELATED), np.int32), np.empty(5, np.int32)
    for step in range(steps):
        progress = step / steps
        heat = hot * (1.0 - progress) ** 2 + 1e-9
        # a byte over the budget at one moment weighs more and more
        weight = (0.5 + 20.0 * progress) / max(budget, 1)
        energy = care * time / base + weight * excess
        moved = 0
        real = False
        dice = np.random.random()
        if dice < single:  # one gap, or a few together
            slot, linked = draw_from[np.random.randint(slots if np.random.random() < 0.15 else uses)], False
            while moved < RELATED:
                if not linked:
                    fresh[:] = solution[:, gap[slot]]
                    _draw(
                        fresh, slot, before, at, last, segment, opened, boundary, fine, len(tiers), movable, home[owner[slot]]
                    )
                real |= _place(
                    solution, former, changed, moved, fresh, segment[slot], slot, slot, gap, before, at, segment,
                    opened, boundary, ops, movable,
                )  # fmt: skip
                moved += 1
                if np.random.random() > 0.5:
                    break
                follow = -1
                if movable[slot] < 3:
                    follow = _relative(
                        slot, fresh, owner, slot_of, use_start, use_list, producer, read_start, read, write_start, write
                    )
                linked = follow >= 0 and movable[follow] < 3
                slot = follow if linked else draw_from[np.random.randint(uses)]
                if linked and producer[owner[slot]] != producer[owner[changed[moved - 1]]]:
                    now = fresh[SINCE] if fresh[SINCE] < NEVER else fresh[HOLD]
                    fresh[:] = solution[:, gap[slot]]
                    fresh[BEGIN], fresh[HOLD], fresh[EAGER], fresh[MOVE] = -1, now, fresh[EAGER] & 1, 0
        elif dice < 0.5 + single / 2:  # the same gap in a range of layers
            g = np.random.randint(len(group_start) - 1)
            low, high = group_start[g], group_start[g + 1]
            pick, other = low + np.random.randint(high - low), low + np.random.randint(high - low)
            slot = group[pick]
            fresh[:] = solution[:, gap[slot]]
            _draw(fresh, slot, before, at, last, segment, opened, boundary, fine, len(tiers), movable, home[owner[slot]])
            whole = np.random.random() < 0.3
            for k in range(low if whole else min(pick, other), high if whole else max(pick, other) + 1):
                real |= _place(
                    solution, former, changed, moved, fresh, segment[slot], slot, group[k], gap, before, at, segment,
                    opened, boundary, ops, movable,
                )  # fmt: skip
                moved += 1
        else:  # a layer's times to a range of layers like it
            source, goal = np.random.randint(segments), np.random.randint(segments)
            for s in range(min(source, goal), max(source, goal) + 1):
                if s != source and kind[s] == kind[source]:
                    for k in range(place_start[source + 1] - place_start[source]):
                        slot, target = place[place_start[source] + k], place[place_start[s] + k]
                        fresh[:] = solution[:, gap[slot]]
                        real |= _place(
                            solution, former, changed, moved, fresh, source, slot, target, gap, before, at, segment,
                            opened, boundary, ops, movable,
                        )  # fmt: skip
                        moved += 1
        if not real:
            continue
        new_time, _, new_excess, _ = evaluate(
            seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new,
            reuse_old, use_start, use_list, output, repeatable, resident, tiers, home, changed_start, changed_list,
            solution, budget,
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
                solution[:, gap[changed[k]]] = former[:, k]
    return best, best_time

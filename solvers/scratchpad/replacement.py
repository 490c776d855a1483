"""What is compared with: an order as it comes, values thrown out when room runs out, and an arena filled by rules.

Each op in turn needs its operands and results; where they do not fit beside what is there, something leaves. *Belady*
throws out what is needed last; *greedy* the set of values that costs least to store and load again, by a small integer
program for each op (COSMA's baselines, arXiv 2311.18246). Neither looks further ahead. Addresses come after: TensorFlow Lite's
arena planner (decreasing size, the tightest gap), or XLA's heap simulator (best fit by decreasing size and by decreasing
lifetime, the better of the two: `GlobalDecreasingSizeBestFitHeap`, spatial and temporal).
Where those do not fit the scratchpad, the same is tried with less of it, so a baseline's bytes are those of a mapping
that has addresses, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from ortools.sat.python import cp_model

from ..programs.cpsat import make_solver
from ..storage.canonical import make_instance
from ..storage.greedy import first_fit
from ..storage.problem import Storage, make_storage, peak_of
from .problem import NOTHING, Answer, Limit, Mapped, Residency, cost_of, verdict

SHRINK = 0.99  # of what was tried before
TRIES = 60
ARENAS = {"tflite": ("size",), "xla": ("size", "lifetime")}  # orders of best fit, of which the better one counts

# (buffers that may leave, bytes short, next use of each, cost of each, size of every buffer) -> those that leave
Policy = Callable[[list[int], int, dict[int, int], dict[int, int], Sequence[int]], list[int]]


def belady(idle: list[int], short: int, upcoming: dict[int, int], cost: dict[int, int], size: Sequence[int]) -> list[int]:
    """What is needed last leaves first."""
    gone: list[int] = []
    for buffer in sorted(idle, key=lambda each: (-upcoming[each], each)):
        if short <= 0:
            break
        gone.append(buffer)
        short -= size[buffer]
    return gone


def greedy(idle: list[int], short: int, upcoming: dict[int, int], cost: dict[int, int], size: Sequence[int]) -> list[int]:
    """The cheapest set that leaves enough."""
    if sum(size[buffer] for buffer in idle) <= short:
        return list(idle)
    model = cp_model.CpModel()
    goes = {buffer: model.new_bool_var(str(buffer)) for buffer in idle}
    model.add(sum(size[buffer] * goes[buffer] for buffer in idle) >= short)
    model.minimize(sum(cost[buffer] * goes[buffer] for buffer in idle))
    solver = make_solver(5.0, 0, workers=1)  # there are many of them, and they are small
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return belady(idle, short, upcoming, cost, size)
    return [buffer for buffer in idle if solver.boolean_value(goes[buffer])]


POLICIES: dict[str, Policy] = {"belady": belady, "greedy": greedy}


def solve(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """The better of what the policies make of the base order, at once and before addresses; they know no bound but 0."""
    order = range(len(problem.reads))
    found = {name: replace_in_order(problem, order, policy) for name, policy in POLICIES.items()}
    known = [(mapped, name) for name, mapped in found.items() if mapped is not None]
    if not known:
        return NOTHING
    mapped, name = min(known, key=lambda pair: pair[0].bytes)
    return verdict(mapped, 0, name)


def replace_in_order(problem: Residency, order: Sequence[int], policy: Policy) -> Mapped | None:
    """The mapping that a policy makes of an order; None where an op alone does not fit."""
    uses: list[list[int]] = [[] for _ in problem.size]
    for step, op in enumerate(order):
        for buffer in problem.reads[op]:
            uses[buffer].append(step)
    there: set[int] = set()
    seen: set[int] = set()
    stored: set[int] = set()
    dropped: set[tuple[int, int]] = set()
    for step, op in enumerate(order):
        wanted = {*problem.reads[op], *problem.writes[op]}
        for buffer in problem.reads[op]:
            if buffer not in there and buffer in seen:
                dropped.add((buffer, step))
                stored.add(buffer)
            seen.add(buffer)
        seen |= set(problem.writes[op])
        short = sum(problem.size[buffer] for buffer in there | wanted) - problem.capacity
        if short > 0:
            idle = sorted(there - wanted)
            upcoming = {buffer: next((use for use in uses[buffer] if use > step), len(order)) for buffer in idle}
            fresh = {buffer: problem.fresh[buffer] and buffer not in stored for buffer in idle}
            cost = {buffer: problem.size[buffer] * (2 if fresh[buffer] else 1) for buffer in idle}
            gone = policy(idle, short, upcoming, cost, problem.size)
            there -= set(gone)
            stored |= {buffer for buffer in gone if fresh[buffer]}
            if sum(problem.size[buffer] for buffer in there | wanted) > problem.capacity:
                return None
        there |= wanted
        there = {buffer for buffer in there if uses[buffer] and uses[buffer][-1] > step}
    return Mapped(tuple(order), frozenset(dropped), cost_of(problem, dropped))


def stays(problem: Residency, mapped: Mapped) -> Storage:
    """Each stay of a buffer in the scratchpad as a request for an address."""
    spans: list[list[int]] = []
    current: dict[int, int] = {}
    for step, op in enumerate(mapped.order):
        for buffer in (*problem.reads[op], *problem.writes[op]):
            if buffer not in current or (buffer, step) in mapped.dropped:
                current[buffer] = len(spans)
                spans.append([step, step + 1, problem.size[buffer]])
            spans[current[buffer]][1] = step + 1
    lower, upper, size = np.array(spans, np.int64).reshape(-1, 3).T
    return make_storage(lower, upper, size)


def baseline(problem: Residency, order: Sequence[int], policy: str, arena: str) -> int | None:
    """Bytes beyond the compulsory ones that a rule moves, with addresses from an arena planner; None where it finds none.

    Args:
        problem: what is mapped.
        order: of its ops.
        policy: one of POLICIES.
        arena: one of ARENAS.
    """
    room = problem.capacity
    for _ in range(TRIES):
        mapped = replace_in_order(replace(problem, capacity=room), order, POLICIES[policy])
        if mapped is None:
            return None
        storage = stays(problem, mapped)
        instance = make_instance(storage)
        if min(peak_of(storage, first_fit(storage, instance, key, True)) for key in ARENAS[arena]) <= problem.capacity:
            return mapped.bytes
        room = int(room * SHRINK)
    return None


def baselines(problem: Residency, orders: dict[str, Sequence[int]]) -> dict[str, int | None]:
    """All of them: the name has the arena, the order and the policy."""
    return {
        f"{arena} {name} {policy}": baseline(problem, order, policy, arena)
        for arena in ARENAS
        for name, order in orders.items()
        for policy in POLICIES
    }

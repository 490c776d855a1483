"""Scratchpad problems to draw, and the obvious ways to check and to solve them."""

import heapq
import itertools
import random

from hypothesis import strategies as st
from memplan.solvers.scratchpad.problem import Residency, find_gaps, with_capacity
from memplan.solvers.scratchpad.spm import peaks


def make_problem(rng: random.Random, ops: int, sizes: int = 6) -> Residency:
    """A random graph of ops with one or two results, which reads values made before it or given."""
    size, reads, writes = [rng.randint(1, sizes) for _ in range(rng.randint(1, 2))], [], []
    given = list(range(len(size)))
    unread: set[int] = set()
    for _ in range(ops):
        known = list(range(len(size)))
        recent = known[-3:]
        mine = {rng.choice(recent if rng.random() < 0.7 else known) for _ in range(rng.choice([1, 1, 2, 2, 3]))}
        mine |= {rng.choice(given)} if rng.random() < 0.15 else set()
        made = []
        for _ in range(2 if rng.random() < 0.15 else 1):
            size.append(rng.randint(1, sizes))
            made.append(len(size) - 1)
        reads.append(tuple(sorted(mine)))
        writes.append(tuple(made))
        unread = (unread | set(made)) - mine
    outputs = {buffer for buffer in unread if rng.random() < 0.8}
    outputs |= {rng.choice([b for row in writes for b in row])} if rng.random() < 0.2 else set()
    return Residency(tuple(size), tuple(reads), tuple(writes), 0, tuple(sorted(outputs)))


@st.composite
def problems(draw, most: int) -> Residency:
    """A problem with a scratchpad between its largest op and its smallest peak."""
    problem = make_problem(random.Random(draw(st.integers(0, 2**32))), draw(st.integers(2, most)))
    low, high = peaks(problem)
    return with_capacity(problem, draw(st.integers(low, max(low, high))))


def orders(problem: Residency):
    """Every order."""
    for order in itertools.permutations(range(len(problem.reads))):
        at = {op: step for step, op in enumerate(order)}
        if all(at[other] < at[op] for op, others in enumerate(problem.before) for other in others):
            yield order


def fewest_bytes(problem: Residency) -> int | None:
    """By brute force, a cheapest path over (ops done, values resident, values stored); None where nothing fits."""
    size = problem.size
    everything = frozenset(range(len(problem.reads)))
    heap = [(0, 0, frozenset(), frozenset(), frozenset())]
    seen = set()
    count = itertools.count(1)
    while heap:
        cost, _, done, resident, stored = heapq.heappop(heap)
        if done == everything:
            return cost
        if (done, resident, stored) in seen:
            continue
        seen.add((done, resident, stored))
        for op in everything - done:
            if not set(problem.before[op]) <= done:
                continue
            wanted = {*problem.reads[op], *problem.writes[op]}
            others = sorted(b for b in resident - wanted if any(reader not in done for reader in problem.readers[b]))
            for count_kept in range(len(others) + 1):
                for kept in itertools.combinations(others, count_kept):
                    if sum(size[b] for b in {*kept, *wanted}) > problem.capacity:
                        continue
                    more, there = cost, set(stored)
                    for buffer in set(others) - set(kept):  # it leaves; a store is paid when it does
                        if problem.fresh[buffer] and buffer not in there:
                            more += size[buffer]
                            there.add(buffer)
                    for buffer in problem.reads[op]:
                        used = problem.producer[buffer] >= 0 or any(reader in done for reader in problem.readers[buffer])
                        more += size[buffer] if buffer not in resident and used else 0
                    state = (done | {op}, frozenset({*kept, *wanted}), frozenset(there))
                    heapq.heappush(heap, (more, next(count), *state))
    return None


def replayed(problem: Residency, order, dropped) -> int:
    """Bytes of a mapping, with every step checked, in the obvious way."""
    resident: dict[int, bool] = {}
    stored: set[int] = set()
    cost = 0
    seen: set[int] = set()
    last = {b: max(order.index(op) for op in uses) for b, uses in enumerate(problem.readers) if uses}
    following = {(int(g), int(a)): int(u) for g, a, u in zip(*[iter(x) for x in gaps_of(problem, order)], strict=True)}
    for step, op in enumerate(order):
        for buffer in problem.reads[op]:
            if buffer not in resident:
                assert problem.producer[buffer] < 0 or (buffer, step) in dropped
                cost += problem.size[buffer] if buffer in seen else 0
            resident[buffer] = True
            seen.add(buffer)
        for buffer in problem.writes[op]:
            resident[buffer] = True
            seen.add(buffer)
        assert sum(problem.size[b] for b in resident) <= problem.capacity
        for buffer in list(resident):
            until = following.get((buffer, step))
            if last.get(buffer, -1) <= step:
                del resident[buffer]
            elif until is not None and (buffer, until) in dropped:
                if problem.fresh[buffer] and buffer not in stored:
                    cost += problem.size[buffer]
                    stored.add(buffer)
                del resident[buffer]
    return cost


def gaps_of(problem: Residency, order):
    """The gaps as lists."""
    gaps = find_gaps(problem, order)
    return gaps.buffer.tolist(), gaps.after.tolist(), gaps.until.tolist()

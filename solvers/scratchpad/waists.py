"""A graph cut at its waists: ops that every other one comes before or after, with nothing live beside what they make.

Whatever the order, such an op runs at the same step, and what happens before it and after it has nothing in common but
its results, which are in the scratchpad at that moment. So the parts may be solved apart, and equal parts once: the sum of
their optima is the optimum of the whole, over all orders.
"""

from dataclasses import dataclass, replace

from .problem import Residency


@dataclass(frozen=True)
class Part:
    """Consecutive ops of any order.

    Attributes:
        problem: the ops, numbered anew; the first, but in the first part, stands for the waist that makes the part's input.
        ops: their numbers in the whole.
        buffers: numbers of its buffers in the whole.
        leads: whether the first op belongs to the part before, and is here only for what it leaves.
    """

    problem: Residency
    ops: tuple[int, ...]
    buffers: tuple[int, ...]
    leads: bool


def find_waists(problem: Residency) -> list[int]:
    """The ops to cut behind, in base order."""
    count = len(problem.reads)
    past, future = ancestors(problem.before), descendants(problem.before)
    open_until = [0] * (count + 1)  # how many buffers are in use from before each op to after it
    for buffer, uses in enumerate(problem.readers):
        first = problem.producer[buffer] + 1 if problem.producer[buffer] >= 0 else min(uses, default=0)
        if uses and uses[-1] > first:  # what a waist makes may cross it, what it reads may not
            open_until[first] += 1
            open_until[uses[-1]] -= 1
    found, across = [], 0
    for op in range(count):
        across += open_until[op]
        if past[op].bit_count() + future[op].bit_count() == count - 1 and not across and op < count - 1:
            found.append(op)
    return found


def ancestors(before: tuple[tuple[int, ...], ...]) -> list[int]:
    """For each op the ops that come before it in any order, as bits. Ops are numbered in an order that works."""
    past = [0] * len(before)
    for op, others in enumerate(before):
        for other in others:
            past[op] |= past[other] | 1 << other
    return past


def descendants(before: tuple[tuple[int, ...], ...]) -> list[int]:
    """For each op the ops that come after it in any order, as bits."""
    future = [0] * len(before)
    for op in range(len(before) - 1, -1, -1):
        for other in before[op]:
            future[other] |= future[op] | 1 << op
    return future


def one_order(problem: Residency) -> bool:
    """Whether the ops can run in one order only."""
    return all(past.bit_count() == op for op, past in enumerate(ancestors(problem.before)))


def cut(problem: Residency) -> list[Part]:
    """The parts, in the order that they run in."""
    parts = []
    start = 0
    for end in [*find_waists(problem), len(problem.reads) - 1]:
        leads = start > 0
        ops = tuple(range(start - leads, end + 1))
        parts.append(take(problem, ops, leads))
        start = end + 1
    return parts


def take(problem: Residency, ops: tuple[int, ...], leads: bool) -> Part:
    """The problem of consecutive ops; the first one's inputs are left out if it only leads."""
    reads = [() if leads and index == 0 else problem.reads[op] for index, op in enumerate(ops)]
    writes = [problem.writes[op] for op in ops]
    buffers = tuple(dict.fromkeys(buffer for row in zip(reads, writes, strict=True) for part in row for buffer in part))
    new = {old: index for index, old in enumerate(buffers)}
    at = {op: index for index, op in enumerate(ops)}
    part = replace(
        problem,
        size=tuple(problem.size[old] for old in buffers),
        reads=tuple(tuple(new[old] for old in row) for row in reads),
        writes=tuple(tuple(new[old] for old in row) for row in writes),
        outputs=tuple(new[old] for old in problem.outputs if old in new),
        edges=tuple((at[earlier], at[later]) for earlier, later in problem.edges if earlier in at and later in at),
    )
    return Part(part, ops, buffers, leads)

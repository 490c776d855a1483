"""A step mapped onto a scratchpad: parts between waists, in each the best order and what stays resident.

cut at waists -> for each different part: base order, smallest-peak order, a narrow search -> exact residency of each ->
order and residency together, best first; what that does not finish, with walls; or best first after all -> the parts'
answers joined
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from . import walls
from .ordered import solve_ordered
from .orders import BestFirst, beam
from .peakorder import find_order
from .problem import NOTHING, Answer, Limit, Mapped, Residency, Status, verdict
from .waists import Part, cut, one_order

MANY = 12  # ops from which a narrow search is worth its time
WIDTH = 60  # of it
LEAST = 0.1  # seconds that a solver is given even when the time is up
SHARES = 0.25, 0.45  # of the time: for the search best first, and for walls; then the search goes on


def peaks(problem: Residency) -> tuple[int, int]:
    """The largest op (COSMA's M_R), and the smallest peak of any order without a load or store that could be spared (M_P)."""
    return max(problem.need, default=0), max((find_order(part.problem)[1] for part in distinct(cut(problem))), default=0)


def smallest_peak_order(problem: Residency) -> list[int]:
    """An order with the smallest peak."""
    order: list[int] = []
    for part in cut(problem):
        order += [part.ops[op] for op in find_order(part.problem)[0][part.leads :]]
    return order


def distinct(parts: Iterable[Part]) -> list[Part]:
    """Parts of which none has another's problem."""
    return list({part.problem: part for part in parts}.values())


def solve(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """The mapping that moves the fewest bytes, or the best found in time.

    Args:
        problem: what is mapped.
        limit: its solver is of the residency of an order; see `solve_ordered`.
    """
    if max(problem.need, default=0) > problem.capacity:
        return NOTHING
    until = time.monotonic() + limit.seconds
    parts = cut(problem)
    answers: dict[Residency, Answer[Mapped, int]] = {}
    rest = distinct(parts)
    for number, part in enumerate(sorted(rest, key=lambda each: len(each.ops))):
        share = max(until - time.monotonic(), LEAST) / (len(rest) - number)
        answers[part.problem] = solve_part(part.problem, replace(limit, seconds=share))
    return join([(part, answers[part.problem]) for part in parts])


def solve_part(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """The best mapping of one part found, with a bound over all orders; every op fits."""
    until = time.monotonic() + limit.seconds
    known = best_of(problem, [list(range(len(problem.reads))), find_order(problem, until=until)[0]], until, limit)
    if not known.found.bytes or one_order(problem):
        return known
    if len(problem.reads) >= MANY:
        narrow = best_of(problem, [beam(problem, WIDTH, until)], until, limit)
        known = min(known, narrow, key=lambda answer: answer.found.bytes)
    if not known.found.bytes:
        return known
    search = BestFirst(problem, known.found, solver=limit.solver)
    answer = search.run(min(limit.seconds * SHARES[0], until - time.monotonic()), limit.seed)
    if answer.status is not Status.OPTIMAL:
        left = until - time.monotonic()
        share = max(left if search.over else min(left, limit.seconds * SHARES[1]), LEAST)
        answer = walls.solve(problem, replace(limit, seconds=share), answer)
        search.best, search.bound = answer.found, answer.bound
    if answer.status is not Status.OPTIMAL:
        answer = search.run(until - time.monotonic(), limit.seed)
    return answer


def best_of(problem: Residency, orders: Sequence[list[int]], until: float, limit: Limit) -> Answer[Mapped, int]:
    """The best residency of some orders, which share the time that is left; every op fits, and the bound is of its order."""
    answers = []
    for number, order in enumerate(orders):
        left = max(until - time.monotonic(), LEAST)
        answers.append(solve_ordered(problem, order, replace(limit, seconds=left / (len(orders) - number))))
    return min(answers, key=lambda answer: answer.found.bytes)


def join(answers: list[tuple[Part, Answer[Mapped, int]]]) -> Answer[Mapped, int]:
    """One mapping of the parts' answers."""
    order: list[int] = []
    dropped: set[tuple[int, int]] = set()
    for part, answer in answers:
        first = len(order) - part.leads
        order += [part.ops[op] for op in answer.found.order[part.leads :]]
        dropped |= {(part.buffers[buffer], first + step) for buffer, step in answer.found.dropped}
    moved, bound = sum(answer.found.bytes for _, answer in answers), sum(answer.bound for _, answer in answers)
    return verdict(Mapped(tuple(order), frozenset(dropped), moved), bound, "by parts")

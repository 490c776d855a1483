"""A step mapped onto a scratchpad: parts between waists, in each the best order and what stays resident.

cut at waists -> for each different part: base order, smallest-peak order, a narrow search -> exact residency of each ->
order and residency together, best first; what that does not finish, with walls; or best first after all -> the parts'
answers joined
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .orders import Search, beam
from .peakorder import find_order
from .residency import Mapped, Residency, solve_ordered
from .waists import Part, ancestors, cut
from .walls import solve_walls

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


def solve(problem: Residency, seconds: float = 60.0, seed: int = 0, solver: str | None = None) -> Mapped | None:
    """The mapping that moves the fewest bytes, or the best found in time; None where an op alone does not fit.

    Args:
        problem: what is mapped.
        seconds: for all of it.
        seed: of the searches.
        solver: of the residency of an order; see `solve_ordered`.
    """
    if max(problem.need, default=0) > problem.capacity:
        return None
    until = time.monotonic() + seconds
    parts = cut(problem)
    answers: dict[Residency, Mapped] = {}
    rest = distinct(parts)
    for number, part in enumerate(sorted(rest, key=lambda each: len(each.ops))):
        share = max(until - time.monotonic(), LEAST) / (len(rest) - number)
        answers[part.problem] = solve_part(part.problem, share, seed, solver)
    return join(problem, [(part, answers[part.problem]) for part in parts])


def solve_part(problem: Residency, seconds: float, seed: int, solver: str | None = None) -> Mapped:
    """The best mapping of one part found, with a bound over all orders."""
    until = time.monotonic() + seconds
    best = best_of(problem, [list(range(len(problem.reads))), find_order(problem, until=until)[0]], until, seed, solver)
    if not best.bytes or one_order(problem):
        return best
    if len(problem.reads) >= MANY:
        narrow = best_of(problem, [beam(problem, WIDTH, until)], until, seed, solver)
        best = min(best, narrow, key=lambda answer: answer.bytes)
    if not best.bytes:
        return best
    search = Search(problem, best, solver=solver)
    found = search.run(min(seconds * SHARES[0], until - time.monotonic()), seed)
    if found.bytes > found.bound:
        left = until - time.monotonic()
        share = max(left if search.over else min(left, seconds * SHARES[1]), LEAST)
        found = solve_walls(problem, found, share, seed, solver)
        search.best, search.bound = found, found.bound
    if found.bytes > found.bound:
        found = search.run(until - time.monotonic(), seed)
    return found


def best_of(problem: Residency, orders: Sequence[list[int]], until: float, seed: int, solver: str | None = None) -> Mapped:
    """The best residency of some orders, which share the time that is left; every op fits."""
    answers = []
    for number, order in enumerate(orders):
        left = max(until - time.monotonic(), LEAST)
        answers.append(solve_ordered(problem, order, left / (len(orders) - number), seed, solver))
    return min((answer for answer in answers if answer is not None), key=lambda answer: answer.bytes)


def one_order(problem: Residency) -> bool:
    """Whether the ops can run in one order only."""
    return all(past.bit_count() == op for op, past in enumerate(ancestors(problem.before)))


def join(problem: Residency, answers: list[tuple[Part, Mapped]]) -> Mapped:
    """One mapping of the parts' answers."""
    order: list[int] = []
    dropped: set[tuple[int, int]] = set()
    for part, answer in answers:
        first = len(order) - part.leads
        order += [part.ops[op] for op in answer.order[part.leads :]]
        dropped |= {(part.buffers[buffer], first + step) for buffer, step in answer.dropped}
    moved, bound = (sum(getattr(answer, part) for _, answer in answers) for part in ("bytes", "bound"))
    return Mapped(tuple(order), frozenset(dropped), moved, bound)


def with_capacity(problem: Residency, capacity: int) -> Residency:
    """The same ops with another scratchpad."""
    return replace(problem, capacity=capacity)

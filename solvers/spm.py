"""A step mapped onto a scratchpad: parts between waists, in each the best order and what stays resident.

cut at waists -> for each different part: base order and smallest-peak order -> exact residency of each -> order and
residency together, where they are not proven best -> the parts' answers, one after another
"""

import time
from collections.abc import Iterable
from dataclasses import replace

from .joint import solve_free
from .peakorder import find_order
from .residency import Mapped, Residency, solve_ordered
from .waists import Part, cut


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


def solve(problem: Residency, seconds: float = 10.0, seed: int = 0) -> Mapped | None:
    """The mapping that moves the fewest bytes, or the best found in time; None where an op alone does not fit.

    Args:
        problem: what is mapped.
        seconds: for all of it.
        seed: of the searches.
    """
    if max(problem.need, default=0) > problem.capacity:
        return None
    until = time.monotonic() + seconds
    parts = cut(problem)
    answers: dict[Residency, Mapped] = {}
    rest = distinct(parts)
    for number, part in enumerate(sorted(rest, key=lambda each: len(each.ops))):
        share = max(until - time.monotonic(), 0.1) / (len(rest) - number)
        answers[part.problem] = solve_part(part.problem, share, seed)
    return join(problem, [(part, answers[part.problem]) for part in parts])


def solve_part(problem: Residency, seconds: float, seed: int) -> Mapped:
    """The best mapping of one part found, with a bound over all orders."""
    began = time.monotonic()
    best: Mapped | None = None
    for order in (list(range(len(problem.reads))), find_order(problem)[0]):
        found = solve_ordered(problem, order, seconds, seed)
        assert found is not None
        best = found if best is None or found.bytes < best.bytes else best
        if not best.bytes:
            return best
    assert best is not None
    return solve_free(problem, best, seconds - (time.monotonic() - began), seed)


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

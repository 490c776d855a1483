"""What else a planner may do with the levers it has: other base orders, and fewer levers.

A search among more choices finds less in the same time. So whatever fewer levers reach is tried too, and the better kept: then
another lever never makes a plan worse, but where the time is up.
"""

import dataclasses
from typing import TYPE_CHECKING

from ...passes.defer import Defer
from ...passes.problem import flatten
from ...passes.promptly import Promptly
from ...passes.reorder import Reorder
from ...solvers.remat.problem import score
from ..ir.program import Program

if TYPE_CHECKING:
    from .planner import Planner

MOST = 2000  # ops: larger programs are searched in one base order, for each takes a minute


def orders_of(program: Program, reorder: bool) -> list[list[int]]:
    """Base orders, the one of smallest peak first; then the traced one, and what differs from the first in `Defer` alone."""
    traced = list(range(len(program.ops)))
    if not reorder:
        return [Promptly()(program, traced)]
    deferred = Defer()(program)
    pairs = [(Reorder()(program, deferred), Reorder()(program)), (deferred, traced)]
    made = [[Promptly()(program, order) for order in pair] for pair in pairs]
    first = min((order for pair in made for order in pair), key=lambda order: peak_of(program, order))
    partners = [order for pair in made if first in pair for order in pair]
    unique: list[list[int]] = []
    for order in (first, made[1][1], *partners):
        if order not in unique:
            unique.append(order)
    return unique


def peak_of(program: Program, order: list[int]) -> int:
    """Bytes at the peak of an order in which nothing is repeated."""
    problem = flatten(program, order).problem
    return score(problem, problem.keep_all(), 0).peak


def others_of(planner: "Planner") -> "list[Planner]":
    """Planners of the other base orders, and of offload without recomputation in all of them."""
    if planner.order is not None:
        return []
    orders = [tuple(order) for order in planner.orders]
    made = []
    for order in orders if len(planner.program.ops) <= MOST else orders[:1]:
        if order != orders[0]:
            made.append(dataclasses.replace(planner, order=order))
        if planner.moves and planner.recompute:
            made.append(dataclasses.replace(planner, order=order, recompute=False))
    return made

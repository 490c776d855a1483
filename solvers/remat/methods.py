"""The ways to choose when each value is resident, by name: one row each.

A row is a file of this room, which has `solve(problem, limit) -> Answer[np.ndarray, float]`; the best is a solution of
`problem.py`, the bound is in seconds. Nothing is loaded before it is asked for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .problem import Answer, Limit, Problem

METHODS = {
    "auto": "search",
    "integer program": "exact",
    "annealing": "anneal",
}


def method(name: str) -> "Callable[[Problem, Limit], Answer[np.ndarray, float]]":
    """The way of a name in `METHODS`."""
    return import_module(f".{METHODS[name]}", __package__).solve

"""The ways to map a step onto a scratchpad, by name: one row each.

A row is a file of this room, which has `solve(problem, limit) -> Answer[Mapped, int]`. Nothing is loaded before it is asked
for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .problem import Answer, Limit, Mapped, Residency

METHODS = {
    "auto": "spm",
    "base order": "ordered",
    "best first": "orders",
    "walls": "walls",
    "cosma": "cosma",
    "rules": "replacement",
}


def method(name: str) -> "Callable[[Residency, Limit], Answer[Mapped, int]]":
    """The way of a name in `METHODS`."""
    return import_module(f".{METHODS[name]}", __package__).solve

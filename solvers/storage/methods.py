"""The ways to place buffers, by name: one row each. Everything that offers a choice of them reads it here.

A row is a file of this room, which has `solve(storage, limit) -> Packing`. Nothing is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .problem import Way

METHODS = {
    "auto": "allocate",
    "cp-sat": "cpsat",
    "mip": "mip",
}


def method(name: str) -> "Way":
    """The way of a name in `METHODS`."""
    return import_module(f".{METHODS[name]}", __package__).solve

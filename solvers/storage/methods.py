"""The ways to place buffers, by name: one row each. Everything that offers a choice of them reads it here.

A row is `file:function` of this room. The function takes a problem, a capacity or None for the smallest peak, seconds and a
seed, and returns a `Packing`: addresses, a bound that none is below, and whether they are optimal, feasible, impossible or not
found. Nothing is loaded before it is asked for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .problem import Packing

METHODS = {
    "auto": "allocate:pack",
    "cp-sat": "formulations:pack_sat",
    "mip": "formulations:pack_mip",
}


def method(name: str) -> "Callable[..., Packing]":
    """The function of a name in `METHODS`."""
    file, _, function = METHODS[name].partition(":")
    return getattr(import_module(f".{file}", __package__), function)

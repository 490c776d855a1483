"""What can be told of a hook from its code, without calling it: that it only keeps what it sees, or may return a value.

A hook that only keeps tensors (`store["h"] = output`) is traced: its Python does not run at a planned step, and what it keeps
is an output of it. That is right only if it does nothing else, such as to print or to tell a logger. Every name in its code has
to be one of tensors' or containers', or stand for something that is known to have no effects; else it is taken to have some.
"""

import collections
import dis
import functools
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .reads import is_plain

CONTAINERS = (dict, list, tuple, collections.deque)
HARMLESS = {"isinstance", "len", "tuple", "list", "dict", "type", "getattr", "hasattr", "id", "str", "zip", "range"}
KNOWN = {name for kind in (torch.Tensor, *CONTAINERS, str) for name in dir(kind)} | {
    "nn",
    "functional",
    "training",
    "weight",
    "bias",
}
RETURNS = ("RETURN_VALUE", "RETURN_CONST")


def function_of(hook: Any) -> types.FunctionType | None:
    """The Python function that a hook is, or calls; None where there is none."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    found = getattr(hook, "__func__", hook)
    if not isinstance(found, types.FunctionType):
        found = getattr(type(hook), "__call__", None)  # noqa: B004
    return found if isinstance(found, types.FunctionType) else None


def may_return(hook: Any) -> bool:
    """Whether a hook's code returns anything but None. A lambda's always does, so of it nothing is known, and it may not."""
    function = function_of(hook)
    if function is None or function.__code__.co_name == "<lambda>":
        return function is None
    steps = list(dis.get_instructions(function.__code__))
    ends = [(before, end) for before, end in pairwise(steps) if end.opname in RETURNS]
    return any((end if end.opname == "RETURN_CONST" else before).argval is not None for before, end in ends)


def only_keeps(hook: Any) -> bool:
    """Whether a hook can do nothing but compute with tensors and put them into attributes and containers."""
    return all(harmless(function, holders, set()) for function, holders in parts_of(hook))


def parts_of(hook: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The function that a hook calls, and the objects that it is bound to."""
    holders = []
    while isinstance(hook, functools.partial):
        holders += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    bound = getattr(hook, "__self__", None)
    holders += [value for value in (bound, None if isinstance(hook, types.FunctionType) else hook) if value is not None]
    yield function_of(hook), holders


def harmless(function: Any, holders: list[Any], done: set[Any]) -> bool:
    """Whether every name in a function's code, and in those that it calls, is known to have no effects.

    Args:
        function: to look into.
        holders: objects whose attributes it may name.
        done: code that has been looked into.
    """
    if not isinstance(function, types.FunctionType):
        return False
    if function.__code__ in done:
        return True
    done.add(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
    holders = [*holders, *cells, *(function.__defaults__ or ())]
    outside = [value for value in cells if isinstance(value, types.FunctionType)]
    if any(not harmless(value, holders, done) for value in outside):
        return False
    return all(is_harmless(name, function, holders, done) for code in codes(function.__code__) for name in code.co_names)


def is_harmless(name: str, function: types.FunctionType, holders: list[Any], done: set[Any]) -> bool:
    """Whether a name has no effects, whatever it is the name of there."""
    space = function.__globals__
    if name in space:
        value = space[name]
        if isinstance(value, types.FunctionType) and not is_of_torch(value):
            return harmless(value, holders, done)
        return is_of_torch(value) or is_data(value)
    for holder in holders:
        if name in getattr(holder, "__dict__", {}):
            return is_data(vars(holder)[name])
        method = getattr(type(holder), name, None)
        if isinstance(method, types.FunctionType) and not is_of_torch(method):
            return harmless(method, [*holders, holder], done)
    return name in KNOWN or name in HARMLESS or hasattr(nn.functional, name)


def is_data(value: Any) -> bool:
    """Whether it is something to keep tensors in, or to compute with."""
    if isinstance(value, CONTAINERS):
        inner = value.values() if isinstance(value, dict) else value
        return not any(callable(item) and not isinstance(item, nn.Module) for item in inner)
    return is_plain(value) or isinstance(value, torch.Tensor | nn.Module)


def is_of_torch(value: Any) -> bool:
    """Whether it is a module, a function or a class of torch's."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0] == "torch"


def is_filled(cell: Any) -> bool:
    """Whether a closure's cell holds anything yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


__all__ = ["may_return", "only_keeps"]

"""What can be reached from a model: its modules, what they hold, what its hooks and functions hold, and where each is.

Whatever a traced call may write to has to be put back, and whatever it reads has to be watched, so both begin with this walk.
It follows modules, containers, plain objects, bound methods, closures, and globals that the model's own code names; it does
not enter torch, threads, files or anything that is larger than a model's own settings.
"""

import collections
import enum
import functools
import gc
import io
import logging
import random
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .own import own_of

ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum, type, types.ModuleType, weakref.ref, logging.Logger, io.IOBase, torch.Tensor, torch.UntypedStorage,
)  # fmt: skip
FUNCTIONS = (
    types.FunctionType, types.MethodType, functools.partial, types.BuiltinFunctionType, types.MethodWrapperType,
    property, classmethod, staticmethod, functools._lru_cache_wrapper,
)  # fmt: skip
NOT_FOLLOWED = {"torch", "numpy", *sys.stdlib_module_names} - {"__main__"}  # whose own code keeps no state of a model
ENTERED = {"types", "argparse", "weakref"}  # of the standard library, whose objects hold what a model puts there
TABLES = ("_parameters", "_buffers", "_modules")
MOST = 100_000  # things held; what lies beyond is not looked at: a data set, say, and no state of a model
LARGE = 20_000  # elements of one container, likewise


@dataclass(frozen=True)
class Step:
    """One step of a way: how to take it, and by which key."""

    how: str
    key: Any = None

    def take(self, thing: Any) -> Any:
        """What lies there. Raises LookupError, AttributeError, ValueError or TypeError where nothing does."""
        match self.how:
            case "vars":
                return vars(thing)[self.key]
            case "slot":
                return getattr(thing, self.key)
            case "item":
                return thing[self.key]
            case "module":
                return thing._modules[self.key]
            case "cell":
                return thing.__closure__[self.key].cell_contents
            case "closure":
                return thing.__closure__[self.key]
            case "global":
                return thing.__globals__[self.key]
            case "globals":
                return thing.__globals__
            case "class":
                return self.key
            case "args":
                return (*thing.args, *thing.keywords.values())[self.key]
            case "default":
                return (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())[self.key]
            case "wrapped":
                return thing.fget if isinstance(thing, property) else thing.func if isinstance(thing, functools.partial) else (
                    thing.__func__ if hasattr(thing, "__func__") else thing.__wrapped__)  # fmt: skip
            case "self":
                return thing.__self__
        raise AssertionError(self.how)


@dataclass(frozen=True, eq=False)
class Held:
    """A thing that holds others.

    Attributes:
        thing: a module or an object (for its attributes), a dict, list, set, deque, tuple, function, cell or class.
        way: from the root.
        name: what to call it: `layers.0`, `config`, `stats['seen']`.
    """

    thing: Any
    way: tuple[Step, ...]
    name: str

    def of(self, key: Any) -> str:
        """What to call one of the things in it."""
        table = self.way and self.way[-1].how == "vars" and self.way[-1].key in TABLES
        if not table and isinstance(self.thing, dict | list | tuple | collections.deque):
            return f"{self.name}[{key!r}]"
        return f"{self.name}.{key}" if self.name else str(key)


def take(root: Any, way: tuple[Step, ...]) -> Any:
    """What lies at the end of a way."""
    for step in way:
        root = step.take(root)
    return root


def is_atom(thing: Any) -> bool:
    """Whether nothing is held by it that could be written to."""
    return isinstance(thing, ATOMS)


def is_object(thing: Any) -> bool:
    """Whether it is held for its attributes: a module, or an object of a class that is not the system's or torch's."""
    if isinstance(thing, nn.Module):
        return True
    if is_atom(thing) or isinstance(thing, FUNCTIONS) or type(thing).__module__.partition(".")[0] in NOT_FOLLOWED - ENTERED:
        return isinstance(thing, collections.UserDict | collections.UserList)
    return own_of(thing) is not None or bool(slots_of(type(thing)))


def slots_of(kind: type) -> list[str]:
    """Names of the slots of a class."""
    found = []
    for each in kind.__mro__:
        names = vars(each).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def reach(root: Any, hooks: bool = True) -> list[Held]:
    """Everything that holds something, from the nearest to the farthest, each once.

    Args:
        root: where to begin.
        hooks: follow the tables of modules' hooks too.
    """
    queue = collections.deque([Held(root, (), "")])
    seen = {id(root)}
    found: list[Held] = []
    while queue and len(found) < MOST:
        held = queue.popleft()
        found.append(held)
        for step, value, name in inside(held):
            left_out = not hooks and step.how == "vars" and str(step.key).endswith("hooks")
            if id(value) not in seen and not left_out and (step.how == "class" or not is_atom(value)):
                seen.add(id(value))
                queue.append(Held(value, (*held.way, step), name))
    return found


def inside(held: Held) -> Iterator[tuple[Step, Any, str]]:
    """What a thing holds: the step to it, itself, and its name."""
    thing, name = held.thing, held.name
    if isinstance(thing, FUNCTIONS):
        yield from inside_function(thing, name)
    elif isinstance(thing, types.CellType):
        return  # its contents are found through the function
    elif isinstance(thing, type):
        yield from ((Step("vars", key), value, f"{name}.{key}") for key, value in list(vars(thing).items()))
    elif isinstance(thing, dict):
        items = list(thing.items()) if len(thing) <= LARGE else []
        yield from ((Step("item", key), value, held.of(key)) for key, value in items)
    elif isinstance(thing, list | tuple | collections.deque):
        items = list(enumerate(thing)) if len(thing) <= LARGE else []
        yield from ((Step("item", index), value, held.of(index)) for index, value in items)
    if is_object(thing):
        yield from inside_object(thing, held)


def inside_object(thing: Any, held: Held) -> Iterator[tuple[Step, Any, str]]:
    """Attributes, slots, and the class with what it holds. A module's tables keep the module's name."""
    for key, value in list((own_of(thing) or {}).items()):
        own = isinstance(thing, nn.Module) and key in TABLES
        if own and isinstance(value, dict):
            yield Step("vars", key), value, held.name
            for name, child in list(value.items()):
                if isinstance(child, nn.Module):
                    yield Step("module", name), child, held.of(name)
        else:
            yield Step("vars", key), value, held.of(key)
    for key in slots_of(type(thing)):
        if hasattr(thing, key):
            yield Step("slot", key), getattr(thing, key), held.of(key)
    for kind in type(thing).__mro__:
        if kind.__module__.partition(".")[0] in NOT_FOLLOWED:
            break
        yield Step("class", kind), kind, kind.__name__


def inside_function(thing: Any, name: str) -> Iterator[tuple[Step, Any, str]]:
    """What a function can reach: where it is bound to, its closure, its defaults, and the globals that its code names.

    Not so one of these files' own, which stands in another's place while a model is traced.
    """
    if isinstance(thing, types.FunctionType) and thing.__globals__.get("__package__") == __package__:
        return
    if isinstance(thing, types.FunctionType):
        for index, cell in enumerate(thing.__closure__ or ()):
            label = thing.__code__.co_freevars[index]
            yield Step("closure", index), cell, label
            try:
                yield Step("cell", index), cell.cell_contents, label
            except ValueError:
                continue
        for index, value in enumerate((*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())):
            yield Step("default", index), value, f"a default of {thing.__name__}"
        if "__wrapped__" in vars(thing):
            yield Step("wrapped"), vars(thing)["__wrapped__"], name
        if str(thing.__module__).partition(".")[0] not in NOT_FOLLOWED:
            yield from ((Step("global", key), value, key) for key, value in globals_of(thing).items())
    elif isinstance(thing, types.MethodType | types.BuiltinFunctionType | types.MethodWrapperType):
        yield Step("self"), thing.__self__, name
        if isinstance(thing, types.MethodType):
            yield Step("wrapped"), thing.__func__, name
    elif isinstance(thing, functools.partial):
        yield Step("wrapped"), thing.func, name
        for index, value in enumerate((*thing.args, *thing.keywords.values())):
            yield Step("args", index), value, f"an argument of {name}"
    elif isinstance(thing, property):
        yield Step("wrapped"), thing.fget, name
    elif hasattr(thing, "__wrapped__") or hasattr(thing, "__func__"):
        yield Step("wrapped"), getattr(thing, "__func__", getattr(thing, "__wrapped__", None)), name


def globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function's code names."""
    names: list[str] = []
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names += code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    space = function.__globals__
    return {name: space[name] for name in names if name in space}


def generators(found: list[Held]) -> list[tuple[str, Any]]:
    """Generators of random numbers that are held somewhere, with their names."""
    kinds = [random.Random, torch.Generator]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kinds += [numpy.random.Generator, numpy.random.RandomState]
    known = tuple(kinds)
    return [(held.name, held.thing) for held in found if isinstance(held.thing, known)]


def cached_by(thing: Any) -> list[Any]:
    """What a function that remembers its results has remembered."""
    remembered = [part for part in gc.get_referents(thing) if isinstance(part, dict) and part is not vars(thing)]
    return [value for part in remembered for value in part.values()]

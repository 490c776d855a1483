"""What a traced call leaves behind in the model and around it, found and put back.

A model's forward is Python: it may bind attributes, fill dicts and lists, count in objects, draw from generators. While it is
traced all of that would happen to the user's own model, several times, with fake tensors. So everything reachable is noted
before, compared after, and put back.
"""

import collections
import dis
import functools
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.errors import CaptureError
from .own import own_of
from .reach import FUNCTIONS, Held, cached_by, generators, globals_of, inside, is_object, reach, slots_of

MISSING = type("Missing", (), {"__repr__": lambda self: "absent"})()


@dataclass(frozen=True, eq=False)
class Change:
    """One thing that a call has put into another.

    Attributes:
        held: what it was put into.
        key: attribute, key of a dict; None for a list, set or deque, which is told as a whole.
        before: what was there, `MISSING` if nothing; all elements of a list.
        after: what is there.
    """

    held: Held
    key: Any
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """What to call it."""
        return self.held.name if self.key is None else self.held.of(self.key)


def contents(thing: Any) -> Any:
    """What a thing holds at the moment: a dict by attribute or key, else a list; None for what cannot change."""
    if isinstance(thing, type):
        return {key: value for key, value in vars(thing).items() if not key.startswith("__")}
    if isinstance(thing, types.FunctionType):
        return globals_of(thing) if sets_globals(thing.__code__) else None
    if isinstance(thing, types.CellType):
        try:
            return {"cell_contents": thing.cell_contents}
        except ValueError:
            return {}
    if isinstance(thing, FUNCTIONS):
        return None
    if isinstance(thing, dict):
        return dict(thing.items())
    if isinstance(thing, list | set | collections.deque):
        return list(thing)
    if is_object(thing):
        own = dict(own_of(thing) or {})
        return own | {key: getattr(thing, key) for key in slots_of(type(thing)) if hasattr(thing, key)}
    return None


def sets_globals(code: types.CodeType) -> bool:
    """Whether a function's code binds globals: instructions are two bytes, the first of which says what they do."""
    return dis.opmap["STORE_GLOBAL"] in code.co_code[::2]


def same(one: Any, other: Any) -> bool:
    """Whether two contents are the same things, by identity and in the same order."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(a is b for a, b in zip(one.values(), other.values(), strict=True))
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def put_back(thing: Any, was: Any) -> None:
    """Give a thing its former contents."""
    if isinstance(thing, collections.OrderedDict):
        collections.OrderedDict.clear(thing)
        for key, value in was.items():
            collections.OrderedDict.__setitem__(thing, key, value)
    elif isinstance(thing, dict):
        dict.clear(thing)
        dict.update(thing, was)
    elif isinstance(thing, list):
        list.__setitem__(thing, slice(None), was)
    elif isinstance(thing, set):
        thing.clear()
        thing.update(was)
    elif isinstance(thing, collections.deque):
        thing.clear()
        thing.extend(was)
    elif isinstance(thing, types.FunctionType):
        thing.__globals__.update(was)
    elif isinstance(thing, types.CellType):
        thing.cell_contents = was["cell_contents"]
    else:
        put_back_attributes(thing, was)


def put_back_attributes(thing: Any, was: dict[str, Any]) -> None:
    """Give an object or a class its former attributes."""
    owner: Any = type if isinstance(thing, type) else object
    found = own_of(thing) if owner is object else None
    own: Any = {} if found is None else found
    slots = set(slots_of(type(thing))) if owner is object else set(contents(thing)) | set(was)
    own.clear()
    own.update({key: value for key, value in was.items() if key not in slots})
    now = contents(thing)
    for key in slots & (set(now) | set(was)):
        if key not in was:
            owner.__delattr__(thing, key)
        elif now.get(key, MISSING) is not was[key]:
            owner.__setattr__(thing, key, was[key])


class Snapshot:
    """What everything reachable holds at one moment."""

    def __init__(self, found: list[Held]):
        self.kept = [(held, now) for held in found if (now := contents(held.thing)) is not None]
        self.caches = [held.thing for held in found if isinstance(held.thing, functools._lru_cache_wrapper)]

    def changes(self) -> list[Change]:
        """What is there by now that was not, and the other way round."""
        found = []
        for held, was in self.kept:
            now = contents(held.thing)
            if same(was, now):
                continue
            if isinstance(was, dict):
                keys = [*now, *(key for key in was if key not in now)]
                pairs = [(key, was.get(key, MISSING), now.get(key, MISSING)) for key in keys]
                found += [Change(held, key, one, other) for key, one, other in pairs if one is not other]
            else:
                found.append(Change(held, None, was, now))
        return found

    def restore(self) -> None:
        """Put everything back. Functions that remember results forget those that tracing made."""
        for held, was in self.kept:
            if not same(was, contents(held.thing)):
                put_back(held.thing, was)
        for cache in self.caches:
            if any(is_traced(value) for value in flat(cached_by(cache))):
                cache.cache_clear()


def flat(value: Any, depth: int = 4) -> Iterator[Any]:
    """The elements of nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset | collections.deque) and depth:
        for item in list(value):
            yield from flat(item, depth - 1)
    else:
        yield value


def is_traced(value: Any) -> bool:
    """Whether it is a tensor of a tracer's."""
    return isinstance(value, FakeTensor | FunctionalTensor)


def traced_in(roots: list[Any], hooks: bool = True) -> dict[int, tuple[str, Any]]:
    """Tensors of a tracer's that are held somewhere, with the names of the places; the arguments are those of `reach`."""
    found: dict[int, tuple[str, Any]] = {}
    for held in (held for root in roots for held in reach(root, hooks)):
        inner = list(held.thing) if isinstance(held.thing, set | frozenset) else [
            value for _, value, _ in inside(held)]  # fmt: skip
        if isinstance(held.thing, functools._lru_cache_wrapper):
            inner += list(flat(cached_by(held.thing)))
        found.update({id(value): (held.name, value) for value in inner if is_traced(value)})
    return found


class Randomness:
    """The states of all generators that a model may draw from."""

    def __init__(self, found: list[Held]):
        self.known: list[tuple[str, Any, Any]] = []  # what it is called, how to get its state, how to set it
        self.add("Python's random", random.getstate, random.setstate)
        self.add("torch's generator", torch.get_rng_state, torch.set_rng_state)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            self.add("numpy.random", lambda: numpy.random.get_state(legacy=False), numpy.random.set_state)
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                self.add("CUDA's generator", lambda i=index: torch.cuda.get_rng_state(i),
                         lambda state, i=index: torch.cuda.set_rng_state(state, i))  # fmt: skip
        for name, thing in generators(found):
            self.add_held(name, thing)
        self.before = [get() for _, get, _ in self.known]

    def add(self, name: str, get: Any, put: Any) -> None:
        """One more."""
        self.known.append((name, get, put))

    def add_held(self, name: str, thing: Any) -> None:
        """A generator that the model holds."""
        if isinstance(thing, random.Random):
            self.add(name, thing.getstate, thing.setstate)
        elif isinstance(thing, torch.Generator):
            self.add(name, thing.get_state, thing.set_state)
        elif hasattr(thing, "bit_generator"):
            bits = thing.bit_generator
            self.add(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
        else:
            self.add(name, lambda: thing.get_state(legacy=False), thing.set_state)

    def moved(self) -> list[str]:
        """The generators that have been drawn from."""
        with _disable_current_modes():
            pairs = zip(self.known, self.before, strict=True)
            return [name for (name, get, _), was in pairs if not equal_states(get(), was)]

    def restore(self) -> None:
        """Put all of them back."""
        with _disable_current_modes():
            for (_, get, put), was in zip(self.known, self.before, strict=True):
                if not equal_states(get(), was):
                    put(was)


def equal_states(one: Any, other: Any) -> bool:
    """Whether two states of a generator are one."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(equal_states(one[key], other[key]) for key in one)
    return bool((one == other).all()) if hasattr(one, "shape") else one == other


def refuse_drawing(names: list[str]) -> None:
    """Refuse a model whose forward draws numbers outside of the graph: a plan would use the same ones at every call.

    Raises:
        CaptureError: from which generator.
    """
    if names:
        raise CaptureError(f"the model draws from {names[0]} in its forward pass, and a plan would decide the same at every "
                           "call: draw outside of forward and pass the number in, draw tensors with torch, or leave it out "
                           "(layerdrop=0.0)")  # fmt: skip


@contextmanager
def untouched(model: nn.Module, loss: Any) -> Iterator[tuple[list[Held], Randomness]]:
    """The model, what it holds and what its loss function holds, and every generator, are afterwards what they were.

    Yields:
        What is reachable from the model, and the states of the generators.

    Raises:
        CaptureError: tensors of the tracer's are left somewhere.
    """
    found = reach(model)
    roots = [model] if loss is None else [model, loss]
    every = found if loss is None else [*found, *reach(loss)]
    randomness, before, there = Randomness(every), Snapshot(every), set(traced_in(roots))
    tensors = [value for _, was in before.kept for value in (was.values() if isinstance(was, dict) else was)
               if isinstance(value, torch.Tensor) and value.is_leaf]  # fmt: skip
    facts = [(value, value.requires_grad, value.grad) for value in tensors]
    failed = True
    try:
        yield found, randomness
        failed = False
    finally:
        before.restore()
        randomness.restore()
        for value, wants, grad in facts:
            if value.requires_grad != wants:
                value.requires_grad_(wants)
            if value.grad is not grad:
                value.grad = grad
        left = {key: name for key, (name, _) in traced_in(roots).items() if key not in there}
        if left and not failed:
            raise CaptureError(f"tracing left a tensor of its own in {next(iter(left.values()))}, which memplan cannot put "
                               "back: keep it in an attribute, a dict or a list")  # fmt: skip

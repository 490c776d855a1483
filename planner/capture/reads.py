"""What a model's forward reads beside its tensors, noted while it is traced, and watched afterwards.

A plan has made every decision that the model's Python made. Each of them rests on what was read: attributes of modules, of
whatever class, of objects that they hold, such as configurations, what is in their dicts and lists. All of that must be as
it was when the plan is carried out. What nobody read may change.
"""

import collections
import copy
import operator
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ir.errors import PlanMismatch
from .own import own_of
from .reach import LARGE, TABLES, Held, Step, globals_of, is_object, slots_of, take

MODULE = "/torch/nn/modules/module.py"
OWN = (*TABLES, "__dict__")  # looked at elsewhere
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
ABSENT = type("Absent", (), {"__repr__": lambda self: "absent", "__reduce__": lambda self: "ABSENT"})()


class Log:
    """Which attributes of modules and other objects are read, by this thread, and what was first found there.

    Attributes:
        seen: (identity of the object, attribute) -> the value that the first read found.
        whole: identities of objects whose `__dict__` was read.
        logged: classes of other objects whose attributes are noted one by one.
    """

    def __init__(self, found: list[Held]):
        self.seen: dict[tuple[int, str], Any] = {}
        self.whole: set[int] = set()
        kinds = {type(held.thing) for held in found if is_object(held.thing) and not isinstance(held.thing, nn.Module)}
        open_to = {kind for kind in kinds if kind.__flags__ & HEAP and not kind.__flags__ & IMMUTABLE}
        self.logged = {kind for kind in open_to if not issubclass(kind, dict | list)}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While forward runs."""
        undo = []
        try:
            for kind in (nn.Module, *self.logged):
                own = vars(kind).get("__getattribute__", ABSENT)
                kind.__getattribute__ = self.noting(kind.__getattribute__)  # type: ignore[method-assign]
                undo.append((kind, own))
            yield
        finally:
            for kind, own in undo:
                if own is ABSENT:
                    del kind.__getattribute__
                else:
                    kind.__getattribute__ = own

    def noting(self, read: Any) -> Any:
        """A way to read an attribute that notes it."""
        thread, seen, whole = threading.get_ident(), self.seen, self.whole

        def __getattribute__(thing: Any, key: str) -> Any:
            try:
                value = read(thing, key)
            except AttributeError:  # a parameter or a submodule, which `__getattr__` finds
                if threading.get_ident() == thread:
                    seen.setdefault((id(thing), key), ABSENT)
                raise
            if threading.get_ident() == thread:
                if key != "__dict__":
                    seen.setdefault((id(thing), key), value)
                elif not sys._getframe(1).f_code.co_filename.endswith(MODULE):
                    whole.add(id(thing))
            return value

        return __getattribute__


INSTALLED = {"site-packages", "dist-packages"}  # code that lies there keeps no settings in its globals
CALL: Any = operator.call
HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by Python code, whose attributes can be set
IMMUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: but not where a compiler of C extensions forbids it


@dataclass(frozen=True)
class Fact:
    """What one thing held under one key when the model was traced.

    Attributes:
        way: to the thing, from the model; for the elements of a list, set or deque to that itself, with no key.
        key: attribute or key; None for the elements.
        name: what to call it.
        value: a plain value, or a reference; for `elements` all of them in a list, for `keys` the keys.
        kind: `attribute`, `class` (an attribute of its class that it does not have itself), `item`, `elements` or `keys`.
    """

    way: tuple[Step, ...]
    key: Any
    name: str
    value: Any
    kind: str


@dataclass(frozen=True)
class Same:
    """Stands for a thing by its identity, without keeping it alive."""

    known: Any
    number: int
    kind: str

    @staticmethod
    def of(thing: Any) -> "Same":
        """For this thing."""
        try:
            known = weakref.ref(thing) if not isinstance(thing, types.MethodType) else weakref.WeakMethod(thing)
        except TypeError:
            known = None
        return Same(known, id(thing), str(type(thing).__name__))

    def matches(self, thing: Any) -> bool:
        """Whether it is that."""
        if isinstance(thing, types.MethodType):
            return self.known is not None and self.known() == thing
        return (self.known() is thing) if self.known is not None else id(thing) == self.number

    def __repr__(self) -> str:
        return f"another {self.kind}"


def is_plain(value: Any) -> bool:
    """Whether a value is compared by what it is, not by who it is."""
    if isinstance(value, tuple | frozenset):
        return all(is_plain(item) for item in value)
    return isinstance(value, PLAIN)


def is_settings(value: Any, written: AbstractSet[int] = frozenset()) -> bool:
    """Whether a value is plain, or a list, dict or set of such, to which forward does not write."""
    if type(value) in (list, set, dict) and len(value) <= LARGE and id(value) not in written:
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return all(is_settings(item, written) for item in inner)
    return is_plain(value)


def told(value: Any, written: AbstractSet[int] = frozenset()) -> Any:
    """What is kept of a value to compare with: itself, a copy of a container, or who it is."""
    if is_plain(value):
        return value
    return copy.deepcopy(value) if is_settings(value, written) else Same.of(value)


def facts_read(log: Log, found: list[Held], written: set[tuple[int, Any]]) -> list[Fact]:
    """What a traced forward has read of the model, as it was before.

    Args:
        log: what was read.
        found: all that is reachable from the model.
        written: (identity of a thing, key) of what forward itself puts there, which is not watched; key None: all of it.
    """
    facts: list[Fact] = []
    changed = {number for number, _ in written}
    holders = {id(held.thing): held for held in found}
    by_thing = collections.defaultdict(list)
    for number, key in log.seen:
        by_thing[number].append(key)
    queue: list[Any] = []
    run: list[Any] = []
    for held in found:
        thing = held.thing
        if not is_object(thing):
            continue
        own = attributes_of(thing)
        keys = list(own) if id(thing) in log.whole else by_thing.get(id(thing), [])
        keys = [key for key in dict.fromkeys(keys) if key not in OWN and "hooks" not in key and not key.startswith("__")]
        keys = [key for key in keys if held.way or key != "forward"]  # the planned model has a forward of its own
        run += [method for key in keys if (method := own.get(key, getattr(type(thing), key, None))) is not None]
        run += [type(thing).forward] if not held.way and isinstance(thing, nn.Module) else []
        for key in keys:
            if (id(thing), key) in written or (id(thing), None) in written:
                continue
            if key in own:
                facts.append(Fact(held.way, key, held.of(key), told(own[key], changed), "attribute"))
                queue.append(own[key])
            elif key == "forward" or key not in vars(nn.Module):
                value = getattr(type(thing), key, ABSENT)
                plain = is_plain(value) or isinstance(value, list | dict)
                facts.append(Fact(held.way, key, held.of(key), told(value, changed) if plain else ABSENT, "class"))
                queue += [value] if plain else []
        for table in TABLES[:2] if isinstance(thing, nn.Module) else ():
            none = [key for key, value in own[table].items() if value is None and (id(thing), key) in log.seen]
            facts += [Fact((*held.way, Step("vars", table)), key, held.of(key), None, "item") for key in none]
    outside, values = globals_read(run, holders, written)
    inner = contents_read([*queue, *values], holders, log, written)  # first, for they say best what has changed
    return [*inner, *facts, *outside]


def globals_read(run: list[Any], holders: dict[int, Held], written: set[tuple[int, Any]]) -> tuple[list[Fact], list[Any]]:
    """The globals that the model's own code names: those that are plain, and the values of all.

    Args:
        run: what was called, as far as it is known.
        holders: all that is reachable, by identity.
        written: see `facts_read`.
    """
    facts: list[Fact] = []
    values: list[Any] = []
    done: set[int] = set()
    changed = {number for number, _ in written}
    queue = [getattr(each, "__func__", each) for each in run]
    while queue:
        function = queue.pop()
        held = holders.get(id(function))
        own = isinstance(function, types.FunctionType) and not INSTALLED & set(Path(function.__code__.co_filename).parts)
        if held is None or not own or id(function) in done:
            continue
        done.add(id(function))
        way = (*held.way, Step("globals"))
        for key, value in globals_of(function).items():
            if (id(function), key) in written:
                continue
            if is_settings(value, changed):
                facts.append(Fact(way, key, key, told(value, changed), "item"))
            elif isinstance(value, types.FunctionType):
                queue.append(value)
            values.append(value)
    return facts, values


def attributes_of(thing: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots among them."""
    own = own_of(thing) or {}
    slots = slots_of(type(thing))
    return own | {key: getattr(thing, key) for key in slots if hasattr(thing, key)} if slots else own


def contents_read(queue: list[Any], holders: dict[int, Held], log: Log, written: set[tuple[int, Any]]) -> list[Fact]:
    """What is in containers that were read, and in objects whose own reads cannot be told apart."""
    facts: list[Fact] = []
    changed = {number for number, _ in written}
    done: set[int] = set()
    while queue:
        thing = queue.pop()
        held = holders.get(id(thing))
        if held is None or id(thing) in done or (id(thing), None) in written:
            continue
        done.add(id(thing))
        if isinstance(thing, dict) and len(thing) <= LARGE:
            items = [(key, value) for key, value in thing.items() if (id(thing), key) not in written]
            facts += [Fact(held.way, key, held.of(key), told(value, changed), "item") for key, value in items]
            if id(thing) not in changed and not is_settings(thing, changed):
                facts.append(Fact(held.way, None, held.name, list(thing), "keys"))
            queue += [value for _, value in items]
        elif isinstance(thing, list | set | collections.deque | tuple) and len(thing) <= LARGE:
            elements = list(thing)
            if not isinstance(thing, tuple) and not is_settings(thing, changed):
                facts.append(Fact(held.way, None, held.name, [told(value, changed) for value in elements], "elements"))
            queue += elements
        elif is_object(thing) and type(thing) not in log.logged and not isinstance(thing, nn.Module):
            own = {key: value for key, value in attributes_of(thing).items() if (id(thing), key) not in written}
            facts += [Fact(held.way, key, held.of(key), told(value, changed), "attribute") for key, value in own.items()]
            queue += own.values()
    return facts


class Watch:
    """Facts about one model, looked up where they are, so that comparing them at every call takes microseconds.

    Attributes:
        facts: what is watched.
        roots: the model, and whatever stands for it under the same names.
    """

    def __init__(self, facts: Iterable[Fact], roots: list[Any], renewed: bool = False):
        """Find the things that facts speak of.

        Args:
            facts: what is watched.
            roots: the model; further ones, such as a shallow copy of it, have attributes of their own and share all else.
            renewed: references are to what is there now: the roots are a copy.
        """
        self.facts = tuple(facts)
        self.rows: list[tuple[Fact, Any, Any]] = []
        self.lost: Fact | None = None
        for fact in self.facts:
            for root in roots if not fact.way else roots[:1]:
                if root is not roots[0] and fact.key == "training":
                    continue
                try:
                    thing = take(root, fact.way)
                except (LookupError, AttributeError, TypeError, ValueError):
                    self.lost = self.lost or fact
                    continue
                self.rows.append((fact, thing, now_there(fact, thing) if renewed else fact.value))
        self.prepare()

    def prepare(self) -> None:
        """Sort the facts into lists that are compared without running Python for each."""
        plain: dict[int, tuple[Any, list[str], list[Any]]] = {}
        self.referred: list[tuple[Any, str, Any]] = []
        self.rest: list[tuple[Fact, Any, Any]] = []
        objects: dict[int, Any] = {}
        classes: set[tuple[type, str]] = set()
        for fact, thing, value in self.rows:
            own = thing if isinstance(thing, dict) else own_of(thing)
            if fact.kind in ("attribute", "item") and isinstance(own, dict):
                if isinstance(value, Same):
                    now = own.get(fact.key, ABSENT)
                    if value.matches(now) and not isinstance(now, types.MethodType):
                        self.referred.append((own, fact.key, now))
                        continue
                else:
                    _, keys, values = plain.setdefault(id(own), (own, [], []))
                    keys.append(fact.key)
                    values.append(value)
                    continue
            if fact.kind != "class":
                self.rest.append((fact, thing, value))
                continue
            objects[id(thing)] = own  # a new attribute of its own would come before its class's
            if value is not ABSENT and (type(thing), fact.key) not in classes:
                classes.add((type(thing), fact.key))
                self.rest.append((fact, thing, value))
        self.spaces = [own for own, _, _ in plain.values()]
        self.getters = [operator.itemgetter(*keys) for _, keys, _ in plain.values()]
        self.values = [tuple(values) if len(values) > 1 else values[0] for _, _, values in plain.values()]
        self.holders = [own for own, _, _ in self.referred]
        self.names = [key for _, key, _ in self.referred]
        self.things = [thing for _, _, thing in self.referred]
        self.sized = [own for own in objects.values() if isinstance(own, dict)]
        self.sizes = list(map(len, self.sized))

    def unchanged(self) -> bool:
        """Whether all is as it was; False also where that takes a closer look."""
        try:
            return (
                list(map(CALL, self.getters, self.spaces)) == self.values
                and all(map(operator.is_, map(operator.getitem, self.holders, self.names), self.things))
                and list(map(len, self.sized)) == self.sizes
                and all(holds(fact, thing, value) for fact, thing, value in self.rest)
            )
        except (LookupError, RuntimeError, TypeError, ValueError):
            return False

    def whole(self) -> bool:
        """Whether everything is there, and as it was."""
        return self.lost is None and all(holds(*row) for row in self.rows)

    def check(self, when: str = "when the plan was made") -> None:
        """Refuse a model of which something that was read has changed.

        Raises:
            PlanMismatch: what.
        """
        if self.lost is not None:
            raise PlanMismatch(f"{self.lost.name} was there {when} and is not now: plan again")
        if self.unchanged():
            return
        for fact, thing, value in self.rows:
            if not holds(fact, thing, value):
                raise PlanMismatch(f"{fact.name} {difference(fact, thing, value, when)}, and the model's forward reads it: "
                                   "plan again")  # fmt: skip
        self.prepare()


def found_in(fact: Fact, thing: Any) -> Any:
    """What a thing holds now of what a fact speaks of."""
    match fact.kind:
        case "item":
            return thing.get(fact.key, ABSENT)
        case "keys":
            return list(thing)
        case "elements":
            return list(thing)
        case "class":
            own = getattr(thing, "__dict__", {})
            if fact.key in own:
                return own[fact.key]
            value = getattr(type(thing), fact.key, ABSENT)
            return value if is_plain(value) or isinstance(value, list | dict) else ABSENT
    own = own_of(thing) or {}
    return own[fact.key] if fact.key in own else getattr(thing, fact.key, ABSENT)


def now_there(fact: Fact, thing: Any) -> Any:
    """The value of a fact, with references to what is there now."""
    now = found_in(fact, thing)
    if fact.kind == "elements":
        return [told(one) if isinstance(was, Same) else was for one, was in zip(now, fact.value, strict=False)]
    return told(now) if isinstance(fact.value, Same) else fact.value


def holds(fact: Fact, thing: Any, value: Any) -> bool:
    """Whether a fact is still true."""
    now = found_in(fact, thing)
    if fact.kind == "elements":
        return len(now) == len(value) and all(map(agrees, value, now))
    if fact.kind == "keys":
        return now == value
    return agrees(value, now)


def agrees(value: Any, now: Any) -> bool:
    """Whether something is what was noted."""
    if isinstance(value, Same):
        return value.matches(now)
    return value is now or (type(now) is type(value) and is_settings(now) and now == value)


def difference(fact: Fact, thing: Any, value: Any, when: str) -> str:
    """In words, what was and what is."""
    now = found_in(fact, thing)
    if fact.kind in ("elements", "keys"):
        return f"has other elements than {when}"
    if isinstance(value, Same):
        return f"is another {value.kind} than {when}" if now is not ABSENT else f"was there {when} and is not now"
    return f"was {short(value)} {when} and is {short(now)} now"


def short(value: Any) -> str:
    """A value in a few words."""
    return repr(value)[:60] if is_settings(value) or value is ABSENT else f"a {type(value).__name__}"

"""What a model's forward stores: found while it is traced, and stored again after every planned call.

A planned call runs none of the model's Python, so what that would have left in attributes, dicts and lists has to be left by
the plan. Tensors are further outputs of the step. Everything else has to be the same after every call, which a second trace
shows that goes on from what the first has left: what it changes again is a count, and what makes it do something else was
built on first use. Both are refused.
"""

import collections
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..ir.errors import CaptureError
from .nodes import encode
from .reach import FUNCTIONS, TABLES, Held, Step, take
from .reads import is_plain
from .state import MISSING, Change, is_traced

HOOKS = "hooks"


@dataclass(frozen=True)
class Made:
    """Stands for a tensor in what is stored.

    Attributes:
        kind: `output` of the step, `input` of the call, or `named`, a parameter or buffer of the model.
        index: which output, or which of the call's tensors.
        name: of the parameter or buffer.
    """

    kind: str
    index: int = -1
    name: str = ""


@dataclass(frozen=True)
class Write:
    """One thing that is stored.

    Attributes:
        way: from the model to what it is stored in.
        key: attribute or key; None for the elements of a list or deque.
        name: what to call it.
        how: `set`, `delete`, `replace` (all elements) or `extend`.
        leaves: the value's leaves, `Made` for a tensor.
        spec: how they nest.
    """

    way: tuple[Step, ...]
    key: Any
    name: str
    how: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec | None

    def value(self, made: Callable[[Made], Any]) -> Any:
        """What is stored, with tensors in place."""
        assert self.spec is not None
        return pytree.tree_unflatten([made(leaf) if isinstance(leaf, Made) else leaf for leaf in self.leaves], self.spec)

    @property
    def tensors_alone(self) -> bool:
        """Whether it is one tensor."""
        return self.how == "set" and len(self.leaves) == 1 and isinstance(self.leaves[0], Made)


class Collector:
    """Turns what a traced call has changed into writes, and the tensors among them into outputs of the step.

    Attributes:
        outputs: the tensors that the step returns; those that are stored and not among them are added.
        extra: names of what was added, in order.
    """

    def __init__(
        self, model: nn.Module, inputs: list[torch.Tensor], outputs: list[torch.Tensor], flat: list[Any], known: set[int]
    ):
        self.model = model
        self.inputs = {id(value): index for index, value in enumerate(inputs)}
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        self.returned = {id(value): index for index, value in enumerate(tensors)}
        self.named = {id(value): name for name, value in tensors_of(model)}
        self.outputs = outputs
        self.extra: list[str] = []
        self.extra_tensors: list[torch.Tensor] = []
        self.known = known

    def collect(self, changes: list[Change]) -> list[Write]:
        """The writes.

        Raises:
            CaptureError: something is stored that no plan can store again.
        """
        writes = []
        for change in changes:
            thing, after = change.held.thing, change.after
            if is_quiet(self.model, change):
                continue
            if change.key is None:
                how, value = elements(change)
            else:
                how, value = ("delete", None) if after is MISSING else ("set", after)
            if isinstance(thing, set):
                raise CaptureError(f"the model changes {change.name}, a set, in its forward pass, which a plan cannot do: "
                                   "do that outside of forward")  # fmt: skip
            leaves, spec = pytree.tree_flatten(value, is_leaf=self.is_leaf)
            told = tuple(self.leaf(leaf, change.name) for leaf in leaves)
            if isinstance(thing, nn.Module) and told and isinstance(told[0], Made) and told[0].kind == "named":
                raise CaptureError(f"the model stores its {told[0].name} in {change.name} too in its forward pass: do that "
                                   "outside, or read it where it is")  # fmt: skip
            writes.append(Write(change.held.way, change.key, change.name, how, told, spec))
        return writes

    def is_leaf(self, value: Any) -> bool:
        """Whether a value is stored as it is: it was there before, or is plain, as a shape is."""
        return id(value) in self.known or isinstance(value, torch.Size)

    def leaf(self, value: Any, name: str) -> Any:
        """What is noted of one leaf."""
        if isinstance(value, torch.Tensor):
            if id(value) in self.named:
                return Made("named", name=self.named[id(value)])
            if id(value) in self.inputs:
                return Made("input", self.inputs[id(value)])
            if not is_traced(value):
                return value  # one that was there before
            if id(value) not in self.returned:
                self.returned[id(value)] = len(self.outputs) + len(self.extra)
                self.extra.append(name)
                self.extra_tensors.append(value)
            return Made("output", self.returned[id(value)])
        if is_plain(value) or isinstance(value, (type, *FUNCTIONS)) or id(value) in self.known:
            return value
        raise CaptureError(f"the model stores a {type(value).__name__} in {name} in its forward pass, which a plan cannot "
                           "make anew at every call: store tensors, numbers, or lists and dicts of them")  # fmt: skip


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_quiet(model: nn.Module, change: Change) -> bool:
    """Whether a change is of no interest: a value that is equal to the old one, or what torch's modules keep for themselves.

    Raises:
        CaptureError: forward changes parameters, submodules or hooks, or registers buffers.
    """
    held, key, before, after = change.held, change.key, change.before, change.after
    if before is not MISSING and is_plain(before) and type(before) is type(after) and is_plain(after):
        if before == after or repr(before) == repr(after):
            return True
    if isinstance(held.thing, nn.RNNBase) and key in ("_flat_weights", "_flat_weight_refs"):
        return True
    if is_table(held, "_buffers") and isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return False  # bound anew
    if is_table(held, *TABLES):
        kind = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}[str(held.way[-1].key)]
        gone, new = (value is MISSING or value is None for value in (after, before))
        done = "registers a" if new else "removes its" if gone else "replaces its"
        advice = "call the model once before planning, so that it is there" if done == "registers a" else "do that outside"
        raise CaptureError(f"the model {done} {kind} {change.name} in its forward pass: {advice}")
    if isinstance(held.thing, dict) and held.way and HOOKS in str(held.way[-1].key) and before is not MISSING:
        raise CaptureError(f"the model removes hooks ({held.name}) in its forward pass: do that outside")
    return False


def is_table(held: Held, *names: str) -> bool:
    """Whether it is one of a module's own tables."""
    return isinstance(held.thing, dict) and bool(held.way) and held.way[-1].how == "vars" and held.way[-1].key in names


def elements(change: Change) -> tuple[str, list[Any]]:
    """How a list or deque has changed, and to what: new elements at its end, or all of them."""
    before, after = change.before, change.after
    if isinstance(change.held.thing, collections.deque):
        for gone in range(len(before) + 1):
            kept = before[gone:]
            if len(after) >= len(kept) and all(a is b for a, b in zip(kept, after, strict=False)):
                return "extend", after[len(kept) :]
    if before and len(after) >= len(before) and all(a is b for a, b in zip(before, after, strict=False)):
        return "extend", after[len(before) :]
    return "replace", after


def store(write: Write, thing: Any, value: Any) -> None:
    """Store one thing."""
    if write.key is None:
        if write.how == "extend":
            thing.extend(value)
        elif isinstance(thing, collections.deque):
            thing.clear()
            thing.extend(value)
        else:
            thing[:] = value
    elif isinstance(thing, dict):
        thing.pop(write.key, None) if write.how == "delete" else thing.__setitem__(write.key, value)
    elif callable(thing) and hasattr(thing, "__globals__"):
        thing.__globals__[write.key] = value
    elif isinstance(thing, nn.Module):
        vars(thing).pop(write.key, None) if write.how == "delete" else vars(thing).__setitem__(write.key, value)
    elif write.how == "delete":
        delattr(thing, write.key)
    else:
        object.__setattr__(thing, write.key, value) if not isinstance(thing, type) else setattr(thing, write.key, value)


class WriteBack:
    """Writes of one model, with the things that they go to looked up.

    Attributes:
        rows: each write with what it is stored in.
        added: how many hooks are added to a table of them, by its identity.
    """

    def __init__(self, writes: tuple[Write, ...], roots: list[Any]):
        """Find the things.

        Args:
            writes: what is stored.
            roots: the model, and whatever shares all but its own attributes.
        """
        self.rows = [(write, take(root, write.way)) for write in writes for root in (roots if not write.way else roots[:1])]
        tables = [thing for write, thing in self.rows if write.way and str(write.way[-1].key).endswith(HOOKS)]
        self.added = collections.Counter(map(id, tables))

    def let_go(self) -> None:
        """Let go of the tensors that the last call has stored: they would lie beside this one's, which no plan counts."""
        for write, thing in self.rows:
            own = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
            if write.tensors_alone and write.key in own and not (write.way and write.way[-1].key in TABLES):
                store(write, thing, None)

    def store(self, made: Callable[[Made], Any]) -> None:
        """Store everything."""
        values: dict[int, Any] = {}
        for write, thing in self.rows:
            if write.how != "delete" and id(write) not in values:
                values[id(write)] = write.value(made)
            store(write, thing, values.get(id(write)))


def training_set(writes: Iterable[Write]) -> set[str]:
    """Names of the modules whose training mode forward sets itself."""
    return {write.name.rpartition(".")[0] for write in writes if write.key == "training"}


def needs_second(writes: list[Write], changes: list[Change], seen: dict[tuple[int, str], Any]) -> bool:
    """Whether a further trace has to show that the next call does the same: not for a tensor that is written unread."""
    alone = {(write.way, write.key) for write in writes if write.tensors_alone}
    for change in changes:
        if is_table(change.held, "_buffers"):
            continue  # a buffer's old contents are an input of the graph
        if (change.held.way, change.key) not in alone or isinstance(change.held.thing, dict):
            return True
        if seen.get((id(change.held.thing), change.key), MISSING) is change.before:
            return True
    return bool(writes) and not changes


def merged(first: list[Write], second: list[Write]) -> list[Write]:
    """The writes of every call, from those of the first and of the one after it.

    Args:
        first: from the model as it is.
        second: from what the first has left.

    Raises:
        CaptureError: the second call stores something else.
    """
    known = {(write.way, write.key): write for write in second}
    result = []
    for write in first:
        again = known.pop((write.way, write.key), None)
        if again is None:
            if any(isinstance(leaf, Made) for leaf in write.leaves):
                raise CaptureError(built_once(first))
            result.append(write)
        elif again.how == "extend" and write.how in ("replace", "extend") and shape_of(again) == shape_of(write):
            result.append(again)
        elif again.how == write.how and shape_of(again) == shape_of(write):
            result.append(write)
        else:
            raise CaptureError(counted(write, again))
    if known:
        raise CaptureError(built_once(list(known.values())))
    return result


def shape_of(write: Write) -> Any:
    """A write without the numbers of outputs."""
    return write.spec, tuple((leaf.kind, leaf.name) if isinstance(leaf, Made) else leaf for leaf in write.leaves)


def built_once(writes: list[Write]) -> str:
    """The refusal of a model whose second call does something else."""
    names = ", ".join(write.name for write in writes[:3]) + ", ..." * (len(writes) > 3)
    return (f"the model's second call does something else than its first, by what it stores in {names}: call the model once "
            "before planning, so that what it builds on first use is there; what it carries from call to call belongs in "
            "buffers")  # fmt: skip


def counted(write: Write, again: Write) -> str:
    """The refusal of a value that each call changes."""
    one, two = (value_told(each) for each in (write, again))
    return (f"the model changes {write.name} at every call (to {one}, then to {two}), and a planned call runs none of its "
            "Python: count in a buffer (register_buffer), or outside of forward")  # fmt: skip


def value_told(write: Write) -> str:
    """A stored value in a few words."""
    if any(isinstance(leaf, Made) for leaf in write.leaves):
        return f"{len(write.leaves)} values"
    return repr(write.value(lambda made: None))[:40]


class Calls(TorchDispatchMode):
    """Notes which operators are called, on what: two runs that note the same compute the same.

    Attributes:
        made: for each call the operator, its operands' numbers in the order in which they appear, and its other arguments.
        held: the operands by number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, ...]] = []
        self.held: list[torch.Tensor] = []
        self.numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question about a tensor
            return result
        leaves, spec = pytree.tree_flatten((args, kwargs or {}, result))
        self.made.append((str(func), str(spec), *(self.told(leaf) for leaf in leaves)))
        return result

    def told(self, leaf: Any) -> Any:
        """What is noted of one argument."""
        if not isinstance(leaf, torch.Tensor):
            return json.dumps(encode(leaf), default=str)  # a size that varies is no JSON
        if id(leaf) not in self.numbers:
            self.numbers[id(leaf)] = len(self.held)
            self.held.append(leaf)
        return self.numbers[id(leaf)], leaf.dtype, tuple(leaf.shape), tuple(leaf.stride())

    def same_as(self, other: "Calls") -> bool:
        """Whether two runs called the same, on the same operands, and on constants of the same values."""
        if self.made != other.made or len(self.held) != len(other.held):
            return False
        pairs = zip(self.held, other.held, strict=True)
        return all(is_traced(one) == is_traced(twin) and (is_traced(one) or equal_constants(one, twin)) for one, twin in pairs)


def equal_constants(one: Any, other: Any) -> bool:
    """Whether two constants of graphs are one."""
    if one is other:
        return True
    with _disable_current_modes():
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)

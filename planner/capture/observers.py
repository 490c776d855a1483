"""Hooks that look on, as ops of a step: what each call of one is shown, and when.

A planned step runs none of the model's Python, but a hook that only looks has to run at every step, once, on real values: it
prints, counts, takes numbers out, keeps what it sees. So it becomes an op that reads what the hook is given and is never run
again; its place among the others is that in which eager PyTorch calls it. While a step is traced the operator `OBSERVE` stands
for the call in the graph. It does nothing itself: generated code calls the hook (`backends/eager/observers.py`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.node import has_side_effect

from ..ir.errors import CaptureError
from .calls import autocast_state
from .looking import seen_changed
from .reach import FUNCTIONS, reach, take
from .reads import is_plain
from .standins import named_tensors
from .state import is_traced, traced_in
from .structure import everywhere
from .writes import Write

LIBRARY = torch.library.Library("memplan", "DEF")
LIBRARY.define("observe(Tensor[] shown, int number) -> ()")
LIBRARY.impl("observe", lambda shown, number: None, "CompositeExplicitAutograd")
OBSERVE = torch.ops.memplan.observe.default
has_side_effect(OBSERVE)  # else it would be dropped from the graph, for it returns nothing


@dataclass(frozen=True)
class Whose:
    """Which hook, so that it is found again in the model, or in a copy of it.

    Attributes:
        owner: the name of the module in whose table it is; None for one of all modules, or of a tensor.
        table: the attribute of the module that is the table; empty for a hook of a tensor.
        key: its key there; of a tensor's, how many were set before it in the call.
        hook: of a tensor, itself: it is set while forward runs, and so found nowhere.
        told: what to call it.
    """

    owner: str | None
    table: str
    key: int
    hook: Any
    told: str

    @property
    def late(self) -> bool:
        """Whether it is called in the backward pass."""
        return "forward" not in self.table


@dataclass(frozen=True)
class Taken:
    """What one call of a hook has taken, as far as a try has shown.

    Attributes:
        kept: which of the tensors that it is shown it keeps.
        bytes: of what it makes and keeps.
        times: as many times the bytes of what it is shown it makes meanwhile, and frees, to the next whole number.
        rewritten: which of the tensors that it is shown the model changes in place afterwards.
        looked: names of the model's own tensors that it looks at.
    """

    kept: frozenset[int] = frozenset()
    bytes: int = 0
    times: int = 0
    rewritten: frozenset[int] = frozenset()
    looked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Shown:
    """Stands for a tensor in what a hook is given.

    Attributes:
        index: among the tensors of the op.
        attached: whether eager PyTorch would differentiate it.
    """

    index: int
    attached: bool


@dataclass(frozen=True)
class Named:
    """Stands for a module of the model in what a hook is given."""

    name: str


@dataclass(frozen=True)
class Observation:
    """One call of a hook that looks on.

    Attributes:
        whose: the hook.
        leaves: what it is given: `Shown` for a tensor, `Named` for a module of the model, anything else as it is.
        spec: how that nests: a tuple of positional arguments and a dict of others.
        grad: whether gradients are on there.
        autocast: whether autocast is on there, and to which type.
        taken: what it takes.
    """

    whose: Whose
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    grad: bool
    autocast: tuple[bool, torch.dtype]
    taken: Taken = Taken()


def observed(model: nn.Module, whose: Whose, args: tuple, kwargs: dict[str, Any], device: str, number: int) -> Observation:
    """Note a call of a hook in the graph that is being traced.

    Args:
        model: that is traced.
        whose: the hook.
        args: what it is given.
        kwargs: likewise.
        device: the type of device that is traced for.
        number: how many calls of hooks have been noted before it.

    Raises:
        CaptureError: it is given something that holds tensors and is none, or a size that varies.
    """
    names = {id(module): name for name, module in model.named_modules()}
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors: list[torch.Tensor] = []
    leaves: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            known = next((index for index, other in enumerate(tensors) if other is leaf), len(tensors))
            tensors += [leaf] if known == len(tensors) else []
            leaves.append(Shown(known, leaf.requires_grad))
        elif isinstance(leaf, nn.Module):
            leaves.append(Named(names[id(leaf)]) if id(leaf) in names else leaf)
        elif is_plain(leaf) or isinstance(leaf, type | FUNCTIONS) or not (is_size(leaf) or traced_in([leaf], hooks=False)):
            leaves.append(leaf)
        else:
            raise CaptureError(f"{whose.told} is given a {type(leaf).__name__}, whose tensors a planned step does not see: "
                               "remove it before planning, or hook a module that is given tensors")  # fmt: skip
    state = autocast_state(device), torch.is_grad_enabled()
    with torch.no_grad():
        OBSERVE(tensors, number)
    return Observation(whose, tuple(leaves), spec, state[1], state[0])


def is_size(value: Any) -> bool:
    """Whether it is a number that varies with the sizes of a call."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def is_observation(node: fx.Node | None) -> bool:
    """Whether a node of a graph stands for a call of a hook."""
    return node is not None and node.op == "call_function" and node.target is OBSERVE


def row_of(node: fx.Node) -> int:
    """The number of the call that a node stands for."""
    return int(node.args[1])  # type: ignore[arg-type]


def settled(rows: Iterable[Observation], graph: fx.GraphModule, tried: list[tuple[Whose, Taken]]) -> tuple[Observation, ...]:
    """The calls of a traced step, each with what it takes.

    Args:
        rows: noted while the graph was traced.
        graph: the traced graph.
        tried: the calls that eager PyTorch makes in such a step, in order.

    Raises:
        CaptureError: those are others, or come in another order.
    """
    rows = list(rows)
    there = [row_of(node) for node in graph.graph.nodes if is_observation(node)]
    wanted, found = [whose for whose, _ in tried], [rows[number].whose for number in there]
    if there != list(range(len(rows))) or [same(one) for one in wanted] != [same(one) for one in found]:
        odd = next((one for one in [*wanted, *found] if wanted.count(one) != found.count(one)), (wanted or found)[0])
        raise CaptureError(f"{odd.told} would not be called in a planned step as it is in eager PyTorch (as often, in the same "
                           "order): remove it before planning, or hook the model itself")  # fmt: skip
    return tuple(replace(row, taken=taken) for row, (_, taken) in zip(rows, tried, strict=True))


def same(whose: Whose) -> tuple[Any, ...]:
    """What is the same of one hook in two calls of a model."""
    return whose.owner, whose.table, whose.key


def check_unchanged(rows: Iterable[Observation], changed: Collection[str]) -> None:
    """Refuse a hook that looks, in the forward pass, at a tensor of the model's which a planned step changes at its end.

    Raises:
        CaptureError: which hook, and which of the names in `changed`.
    """
    for row in rows:
        for name in sorted(row.taken.looked & set(changed)):
            if not row.whose.late:
                raise CaptureError(seen_changed(row.whose.told, name))


def clash(rows: Iterable[Observation], writes: Iterable[Write], model: nn.Module) -> str | None:
    """Why a hook must not be called where what the model's forward stores is stored after the call: it can look there.

    Returns:
        Which hook, and what it can look at; None where there is no such hook.
    """
    stored: dict[int, str] = {}
    for write in writes:
        stored.setdefault(id(take(model, write.way)), write.name)
    for row in rows if stored else ():
        modules = [named(model, leaf) for leaf in row.leaves if isinstance(leaf, Named)]
        for root in () if row.whose.late else (hook_of(model, row.whose), *modules):
            for held in reach(root, hooks=False):
                if id(held.thing) in stored:
                    return (f"{row.whose.told} can look at {stored[id(held.thing)]}, which the model's forward stores, and a "
                            "planned step stores it after the call: remove the hook before planning, or let it have what it "
                            "wants as an output of its module")  # fmt: skip
    return None


def hook_of(model: nn.Module, whose: Whose) -> Any:
    """The hook itself; None where it has been removed."""
    if whose.hook is not None:
        return whose.hook
    if whose.owner is None:
        return everywhere(whose.table).get(whose.key)
    return vars(model.get_submodule(whose.owner))[whose.table].get(whose.key)


def named(model: nn.Module, leaf: Named) -> nn.Module:
    """The module that it stands for."""
    return model.get_submodule(leaf.name)


def foreign(model: nn.Module, hook: Any) -> str | None:
    """Where a tensor's hook keeps a tensor of the call in which it was set, other than the model's own; None for nowhere."""
    own = {id(value) for _, value in named_tensors(model)}
    return next((name for key, (name, _) in traced_in([hook], hooks=False).items() if key not in own), None)


__all__ = ["OBSERVE", "Named", "Observation", "Shown", "Taken", "Whose", "is_observation", "is_traced", "observed", "settled"]

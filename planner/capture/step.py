"""What is traced of a model: one call with flat inputs and outputs, what it stores, and where its loss is."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..ir.errors import CaptureError
from .callers import noting_callers
from .casts import cached_casts
from .constants import Constants
from .hooks import Hooks
from .reach import Held, reach
from .reads import Log
from .rebinding import Rebinding, check_rebound, shares
from .standins import named_tensors
from .state import MISSING, Change, Snapshot
from .writes import Collector, Write


class Step(nn.Module):
    """Wraps the model so that its inputs and outputs are flat, and only the loss carries a gradient."""

    def __init__(
        self, model: nn.Module, mode: Constants, spec: pytree.TreeSpec, fixed: dict[int, Any], train: bool,
        own_loss: bool | None, hooks: Hooks,
    ):  # fmt: skip
        """Wrap a model.

        Args:
            model: to call.
            mode: of the fake tensors.
            spec: how a call's leaves nest.
            fixed: those that are no tensors, by their index.
            train: whether there is a backward pass.
            own_loss: whether the caller computes the loss; None to do so where the model has none.
            hooks: of the model.
        """
        super().__init__()
        self.model = model
        self.mode = mode
        self.hooks = hooks
        hooks.around.append(self)
        self.call = (spec, fixed, train, own_loss)
        self.caches = train and torch.is_autocast_cache_enabled()
        self.outputs: tuple[Any, ...] = ()
        self.output_spec: pytree.TreeSpec | None = None
        self.loss_leaf: int | None = None
        self.plain: frozenset[int] = frozenset()
        self.found: list[Held] = []
        self.log = Log([])
        self.changes: list[Change] = []
        self.writes: list[Write] = []
        self.stored: dict[int, str] = {}
        self.assigned: list[str] = []  # names of parameters and buffers whose `.data` was assigned to
        self.attached: frozenset[int] = frozenset()  # what of the stored has to carry a gradient to the loss
        self.outside = own_loss is True  # the caller computes the loss
        self.reentrant = False  # a Function calls `backward()` in its backward pass

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec, fixed, train, own_loss = self.call
        rest = iter(tensors)
        leaves = [fixed[index] if index in fixed else next(rest) for index in range(spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        before = Snapshot(self.found)
        try:
            output = self.call_model(args, kwargs)
            self.changes = before.changes()
        finally:
            before.restore()
        flat, self.output_spec = pytree.tree_flatten(output)
        found: list[torch.Tensor] = []
        kept, plain = [], set()
        loss = loss_of(output, own_loss is None) if train and not own_loss else None
        self.outside = loss is None
        self.loss_leaf = None  # AOTAutograd calls this more than once
        for index, leaf in enumerate(flat):
            if leaf is loss and loss is not None and self.loss_leaf is None:
                self.loss_leaf = index
            elif isinstance(leaf, torch.Tensor) and loss is not None:
                leaf = leaf.detach()
            if isinstance(leaf, torch.Tensor):
                if not flat[index].requires_grad:
                    plain.add(len(found))
                kept.append(Leaf(len(found)))
                found.append(leaf)
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                kept.append(leaf)
            else:
                advice = "return tensors in tuples, lists, dicts or a registered pytree node"
                if hasattr(getattr(self.model, "config", None), "use_cache"):
                    advice = "set model.config.use_cache = False"
                kind = type(leaf).__name__
                raise CaptureError(f"the model returns a {kind}, of which memplan cannot see the tensors; {advice}")
        self.collect(list(tensors), found, flat, plain)
        self.outputs, self.plain = tuple(kept), frozenset(plain)
        return tuple(found)

    def call_model(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the model returns."""
        buffers = dict(self.model.named_buffers())
        given = Snapshot(reach(arguments_of(self.model, args, kwargs)))
        rebinding = Rebinding(self.model)
        self.assigned = rebinding.assigned
        noted = noting_callers(self.model), self.log.reading(), self.hooks.calling()
        with noted[0], cached_casts(self.mode, self.caches), noted[1], rebinding, noted[2]:
            output = self.model.forward(*args, **kwargs)  # not its hooks: they run around the planned forward
        check_rebound(self.model, buffers)
        for change in given.changes():
            if change.held.way and change.after is not MISSING and not isinstance(change.held.thing, nn.Module):
                raise CaptureError(f"the model stores {change.name} in its argument, which a planned call does not do for the "
                                   "caller: return it instead")  # fmt: skip
        return output

    def collect(self, inputs: list[torch.Tensor], found: list[torch.Tensor], flat: list[Any], plain: set[int]) -> None:
        """What the model has stored; tensors that it does not return are added to what is found."""
        collector = Collector(self.model, inputs, found, flat, {id(held.thing) for held in self.found})
        self.writes = collector.collect(self.changes)
        self.stored = {}
        for name, value in zip(collector.extra, collector.extra_tensors, strict=True):
            self.stored[len(found)] = name
            if not value.requires_grad:
                plain.add(len(found))
            value = value if len(found) in self.attached else value.detach()
            others = [*found, *inputs, *(tensor for _, tensor in named_tensors(self.model))]
            alone = value._base is None and not any(shares(value, other) for other in others)
            found.append(value if alone else value.clone())


def arguments_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> SimpleNamespace:
    """A call's containers by the names of the parameters that they are given for."""
    names = [name for name in inspect.signature(type(model).forward).parameters][1:]
    names += [f"args{index}" for index in range(len(names), len(args))]
    held = (*zip(names, args, strict=False), *kwargs.items())
    return SimpleNamespace(**{name: value for name, value in held if isinstance(value, dict | list)})


@dataclass(frozen=True)
class Leaf:
    """A tensor leaf of the model's output: the index of the traced output that is its value."""

    index: int


def loss_of(output: Any, may_lack: bool) -> torch.Tensor | None:
    """The scalar in a model's output; None where there is none and there may be none."""
    try:
        return find_loss(output)
    except CaptureError:
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if may_lack and any(leaf.requires_grad for leaf in leaves):
            return None
        raise


def find_loss(output: Any) -> torch.Tensor:
    """The scalar in a model's output: the output itself, its `.loss`, or its `["loss"]`.

    Raises:
        CaptureError: there is none, or it is not a scalar, or it carries no gradient.
    """
    loss = output
    if not isinstance(output, torch.Tensor):
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"the model returns a {type(output).__name__} without a loss: pass loss=, "
                           "a function from the output to a scalar, or labels that make the model return one")  # fmt: skip
    if loss.numel() != 1 or loss.dim() != 0:
        raise CaptureError(f"the loss has shape {list(loss.shape)}, not a scalar's: pass loss=, such as lambda out: out.mean()")
    if not loss.requires_grad:
        raise CaptureError("the loss does not depend on anything that requires a gradient: unfreeze a parameter, or plan "
                           "with train=False")  # fmt: skip
    return loss

"""The step of a model at every size of its batch, its sequence or its depth: computed from one trace where that can be."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ir.errors import CaptureError, MemplanError
from ..ir.machine import Machine
from ..ir.program import Program
from ..pipeline.planner import Planner
from .session import Session
from .sizes import SizedPlans

if TYPE_CHECKING:
    from torch import nn

Loaded = tuple["nn.Module", tuple[Any, ...], dict[str, Any]]
Make = Callable[[int], Loaded]
LEAST = 2  # a trace with symbols serves no size below
KEPT = 4  # sizes whose planner is kept, with the linear programs that it has made


class Step(NamedTuple):
    """The step at one size.

    Attributes:
        planner: of its program.
        session: its trace, or the one that it was computed from.
    """

    planner: Planner
    session: Session


class Steps:
    """A step at every size.

    Attributes:
        make: the model at a size.
        plans: the trace with a symbol for the size; None where each size wants its own.
        first: the size to begin with, where each is traced.
        sessions: traces of single sizes.
        traces: how many there were.
        capture_seconds: of all of them.
    """

    def __init__(self, make: Make, base: int, over: str, options: Mapping[str, Any]):
        """Trace the model once, if its inputs alone change with the size.

        Args:
            make: from a size to the model, its arguments and its keyword arguments.
            base: the size to begin with.
            over: what the size is called.
            options: of `Session`.

        Raises:
            CaptureError: the model cannot be traced.
            MemplanError: nothing changes with the size; or what `make` raises.
        """
        self.make, self.over, self.options = make, over, options
        self.steps: dict[int, Step] = {}
        self.sessions: dict[int, Session] = {}
        self.plans: SizedPlans | None = None
        self.traces, self.capture_seconds = 0, 0.0
        self.first = base
        low = max(base, LEAST)
        one = make(low)
        try:
            other = make(low + 1)
        except MemplanError:  # there are no more positions, say: the one before is there to compare with
            low -= 1
            one, other = make(low), one
        self.model = one  # held as long as its traces
        dims = varying_dims(one, other, low)
        if dims == {}:
            raise MemplanError(f"the model has no {over}: neither its parameters nor its inputs change with it")
        if dims is not None and low >= LEAST:
            dynamic = {leaf: dict.fromkeys(axes, over) for leaf, axes in dims.items()}
            try:
                self.plans = SizedPlans(self.trace(one, dynamic=dynamic))
            except CaptureError:  # it does something else at each size
                self.plans = None

    @property
    def machine(self) -> Machine:
        """What the steps are for."""
        if self.plans is not None:
            return self.plans.machine
        if not self.sessions:
            self.program(self.first)
        return next(iter(self.sessions.values())).machine

    def trace(self, loaded: Loaded, **more: Any) -> Session:
        """A session of a model."""
        model, args, kwargs = loaded
        session = Session(model, args, kwargs, **self.options, **more, runs=False)
        self.traces, self.capture_seconds = self.traces + 1, self.capture_seconds + session.capture_seconds
        return session

    def program(self, size: int) -> Program:
        """The program at a size, with costs.

        Raises:
            MemplanError: there is no model of this size.
        """
        if self.plans is not None and self.plans.holds((size,)):
            return self.plans.at((size,))
        if size not in self.sessions:
            self.sessions[size] = self.trace(self.make(size))
        return self.sessions[size].program

    def at(self, size: int) -> Step:
        """The step at a size.

        Raises:
            MemplanError: there is no model of this size.
        """
        if size not in self.steps:
            program = self.program(size)
            session = self.sessions[size] if size in self.sessions or self.plans is None else self.plans.session
            self.steps[size] = Step(dataclasses.replace(session.planner_of(program), hurried=True), session)
            for old in list(self.steps)[:-KEPT]:
                del self.steps[old]
        return self.steps[size]

    def is_cheap(self, size: int) -> bool:
        """Whether the step at a size takes no trace of its own."""
        return size in self.sessions or (self.plans is not None and self.plans.holds((size,)))

    def learn(self, size: int) -> None:
        """Measure the ops at a size, where the device is at hand, so that costs there and nearby rest on it."""
        if self.plans is not None and self.plans.session.table is not None:
            self.plans.learn((size,))
            self.steps.clear()


def varying_dims(one: Loaded, other: Loaded, size: int) -> dict[int, tuple[int, ...]] | None:
    """The dimensions of the call's leaves that are `size` in one and one more in the other.

    Returns:
        Nothing where both are alike; None where the models differ, or inputs do so otherwise: then no trace serves both.
    """
    import torch

    leaves = [leaves_of(loaded) for loaded in (one, other)]
    shapes = [{name: tuple(value.shape) for name, value in loaded[0].state_dict().items()} for loaded in (one, other)]
    if shapes[0] != shapes[1] or len(leaves[0]) != len(leaves[1]):
        return None
    found = {}
    for leaf, (before, after) in enumerate(zip(*leaves, strict=True)):
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
            if type(before) is not type(after) or isinstance(before, torch.Tensor):
                return None
            continue
        axes = tuple(dim for dim in range(before.dim()) if before.shape[dim] != after.shape[dim])
        if any((before.shape[dim], after.shape[dim]) != (size, size + 1) for dim in axes):
            return None
        if axes:
            found[leaf] = axes
    return found


def leaves_of(loaded: Loaded) -> list[Any]:
    """The flattened call."""
    from ..capture.calls import flatten_call

    model, args, kwargs = loaded
    return flatten_call(model, tuple(args), kwargs)[0]


def resized(model: "nn.Module", args: tuple, kwargs: Mapping[str, Any], over: str) -> tuple[int, Make]:
    """The size of a model's inputs, and the same model with inputs of other sizes, whose rows come again in turn.

    Args:
        model: it stays as it is.
        args: tensors among them.
        kwargs: likewise.
        over: `batch`, the first dimension of all inputs that have the first one's; or `seq`, the second one of token ids and
            masks, shape (batch, seq), and of embeddings, shape (batch, seq, width).

    Raises:
        MemplanError: the inputs have no such dimension.
    """
    import torch
    import torch.utils._pytree as pytree

    from ..models.byname import check_positions

    dim = ("batch", "seq").index(over)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))

    def has(value: Any) -> bool:
        """Whether a leaf has the dimension at all."""
        if not isinstance(value, torch.Tensor):
            return False
        return value.dim() > 0 if dim == 0 else value.dim() == 2 + value.is_floating_point()

    sized = [leaf.shape[dim] for leaf in leaves if has(leaf)]
    if not sized:
        shape = "(batch, ...)" if dim == 0 else "(batch, seq)"
        raise MemplanError(f"over={over!r}: no input has the shape {shape}: give a function from a size to (model, args)")
    base = int(sized[0])
    if base < 1:
        raise MemplanError(f"over={over!r}: the example's is {base}: give one of 1 or more")
    config = getattr(model, "config", None)

    def made(size: int) -> Loaded:
        """With another size."""
        if dim and hasattr(config, "get_text_config"):
            check_positions(config, size)
        rows = torch.arange(size) % base
        new = [leaf.detach().index_select(dim, rows.to(leaf.device)).requires_grad_(leaf.requires_grad)
               if has(leaf) and leaf.shape[dim] == base else leaf for leaf in leaves]  # fmt: skip
        args, kwargs = pytree.tree_unflatten(new, spec)
        return model, args, kwargs

    return base, made


def takes_sizes(make: Any) -> bool:
    """Whether something is a function of one size."""
    try:
        inspect.signature(make).bind(1)
    except (TypeError, ValueError):
        return False
    return True

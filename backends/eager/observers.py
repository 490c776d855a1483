"""Hooks that look on, called by a planned step: each at its place among the ops, on the values that are there.

Generated code calls `observe`, and this finds the hook in the module that runs, so that one that has been removed since is not
called. A hook could do what it did not do when the model was planned: return a value, change one, set hooks of its own, let a
gradient through what it has kept, look at what a planned step has not done yet. Each of these is an error.
"""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ...planner.capture.calls import autocast_state
from ...planner.capture.capture import Captured
from ...planner.capture.looking import Looking, seen_changed, seen_gradient
from ...planner.capture.observers import Named, Observation, Shown, hook_of
from ...planner.ir.errors import MemplanError


class Now(threading.local):
    """What runs in this thread.

    Attributes:
        looking: whose step.
        keys: what torch's dispatcher had included and left out before the step's code began.
    """

    looking: "Observers | None" = None
    keys: Any = None


NOW = Now()


def observe(number: int, shown: list[torch.Tensor]) -> None:
    """Call a hook of the step that runs; generated code does.

    Args:
        number: of the call, in `Captured.observed`.
        shown: the tensors that it is given.
    """
    assert NOW.looking is not None
    NOW.looking.show(NOW.looking.rows[number], shown)


class Observers:
    """The hooks of one module that a planned step of it calls.

    Attributes:
        module: whose step it is.
        rows: the calls.
        changed: names of the parameters and buffers that the step changes at the end of its forward pass.
    """

    def __init__(self, module: nn.Module, captured: Captured):
        self.module, self.rows, self.device = module, captured.observed, captured.program.device
        self.changed = sorted({source.name for source, _ in captured.traced.mutations.values() if source.kind != "input"})

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Observers":
        """The same of a copied module.

        Raises:
            MemplanError: forward sets a hook on a tensor, which may hold what is the first module's.
        """
        for row in self.rows:
            if row.whose.hook is not None:
                raise MemplanError(f"a planned module cannot be copied with {row.whose.told}, which is the first one's: copy "
                                   "the model, and plan the copy")  # fmt: skip
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, module=copy.deepcopy(self.module, memo))
        return made

    def running(self) -> AbstractContextManager[None]:
        """The step's code runs; entered before autograd and autocast are set aside for it."""
        return self.begun() if self.rows else nullcontext()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The same where there is anything to do."""
        before = NOW.looking, NOW.keys
        NOW.looking = self
        NOW.keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        try:
            yield
        finally:
            NOW.looking, NOW.keys = before

    def show(self, row: Observation, shown: list[torch.Tensor]) -> None:
        """Call a hook as eager PyTorch would.

        Raises:
            MemplanError: it does what the plan does not allow for.
        """
        hook = hook_of(self.module, row.whose)
        if hook is None:
            return
        versions, holders = [version(value) for value in shown], self.holders(row, shown)
        with ExitStack() as stack:
            stack.enter_context(torch._C._ForceDispatchKeyGuard(*NOW.keys))  # type: ignore[attr-defined]
            if not row.whose.late and autocast_state(self.device) != row.autocast:
                enabled, dtype = row.autocast
                stack.enter_context(torch.autocast(self.device, dtype=dtype, enabled=enabled))
            stack.enter_context(torch.set_grad_enabled(row.grad))
            self.call(row, hook, shown)
        told = row.whose.told
        if [version(value) for value in shown] != versions:
            raise MemplanError(f"{told} has changed a tensor in place, as it did not when the model was planned, and what is "
                               "computed from it may be computed again: have it return a new one")  # fmt: skip
        if any(now > was for now, was in zip(self.holders(row, shown), holders, strict=True)):
            raise MemplanError(f"{told} keeps a tensor that the model changes in place afterwards, and a planned step does "
                               "not: have it keep a clone() of it")  # fmt: skip

    def call(self, row: Observation, hook: Any, shown: list[torch.Tensor]) -> None:
        """The same, where autograd and autocast are as for the model's own code."""
        told, late = row.whose.told, row.whose.late
        given: dict[Shown, torch.Tensor] = {}
        for leaf in row.leaves:
            if isinstance(leaf, Shown) and leaf not in given:
                given[leaf] = shown[leaf.index] if late else self.given(shown[leaf.index], leaf.attached, told)
        args, kwargs = pytree.tree_unflatten([self.filled(leaf, given) for leaf in row.leaves], row.spec)
        with self.looked(told, late, given.values()):
            result = hook(*args, **kwargs)
        known = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        if any(leaf is not None and id(leaf) not in known for leaf in pytree.tree_leaves(result)):
            raise MemplanError(f"{told} has returned a value, as it did not when the model was planned, and a planned step "
                               "does not use it: have it return nothing, or always a value")  # fmt: skip
        if not late and any(value._backward_hooks or value.retains_grad for value in given.values()):
            raise MemplanError(f"{told} has set a hook on a tensor, as it did not when the model was planned, and a planned "
                               "step would not call it: set it at every call")  # fmt: skip

    def given(self, value: torch.Tensor, attached: bool, told: str) -> torch.Tensor:
        """A tensor as a hook is given it."""
        if not attached:
            return value.detach()
        with torch.enable_grad():
            return Kept.apply(value.detach(), torch.empty(0, requires_grad=True), told)  # type: ignore[return-value]

    def filled(self, leaf: Any, given: dict[Shown, torch.Tensor]) -> Any:
        """One thing that a hook is given."""
        if isinstance(leaf, Shown):
            return given[leaf]
        return self.module.get_submodule(leaf.name) if isinstance(leaf, Named) else leaf

    def looked(self, told: str, late: bool, shown: Iterable[torch.Tensor]) -> Looking:
        """Refuses what a hook may not look at, for a planned step does it later: gradients, and buffers that change."""

        def refuse(name: str, gradient: bool) -> None:
            if late and gradient:
                raise MemplanError(seen_gradient(told, name))
            if not late:
                raise MemplanError(seen_changed(told, name))

        if late:
            return Looking({id(value): name for name, value in self.module.named_parameters()}, shown, refuse)
        places = [(name, *name.rpartition(".")[::2]) for name in self.changed]
        held = {id(getattr(self.module.get_submodule(owner), key)): name for name, owner, key in places}
        return Looking(held, shown, refuse)

    def holders(self, row: Observation, shown: list[torch.Tensor]) -> list[int]:
        """How many hold the memory of each tensor that the model changes in place afterwards."""
        return [torch._C._storage_Use_Count(shown[index].untyped_storage()._cdata)  # type: ignore[attr-defined]
                for index in sorted(row.taken.rewritten)]  # fmt: skip

    def versions(self, values: Iterable[torch.Tensor]) -> list[int]:
        """What shows, once the forward pass is over, that a hook has changed what the step reads."""
        return [version(value) for value in values] if self.rows else []


class Kept(torch.autograd.Function):
    """A tensor that a hook was shown, as one that can be differentiated: a gradient that reaches it has nowhere to go."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor, told: str) -> torch.Tensor:  # type: ignore[override]
        ctx.told = told
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # type: ignore[override]
        raise MemplanError(f"a gradient reaches what {ctx.told} has kept, and stops there in a planned step: have a hook that "
                           "does nothing else store it (store['h'] = output), and plan with a loss= that reads it")  # fmt: skip


def version(value: torch.Tensor) -> int:
    """How often a tensor has been changed in place; 0 for one that does not count."""
    return 0 if value.is_inference() else value._version


__all__ = ["Observers", "observe"]

"""Hooks on a model's modules and tensors: what they change is traced, and those that only look on are refused.

A planned step is the graph's code, and calls no hooks but those of the model itself, which run around it, and those on
parameters, which autograd runs. A hook that returns a new value is an operator of the graph like others. One that returns
nothing, or what it was given, would see tensors while the model is traced, and then never again.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..ir.errors import CaptureError
from .constants import Refusal
from .plain_calls import caller_line, is_traced, replaced
from .reach import Held
from .state import Snapshot
from .structure import HOOKS

KINDS = {
    "_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook", "_backward_pre_hooks": "backward pre-hook",
}  # fmt: skip
# Hooks that return nothing and still are part of what is traced: they compute a weight from others, hand what they see to
# the forward pass that is going on, or checkpoint.
TRACED = ("torch.nn.utils.", "transformers.utils.output_capturing", "torch.distributed._composable.checkpoint_activation")

PLAIN = {"requires_grad_", "to", "dtype", "device"}  # names that a function can use without keeping anything


def is_traced_hook(hook: Any) -> bool:
    """Whether a hook that returns nothing may stay: see `TRACED`, or its code can do no more than `PLAIN`."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__code__", None)
    if code is not None and code.co_names and PLAIN.issuperset(code.co_names):
        held = [cell.cell_contents for cell in hook.__closure__ or ()]
        return all(isinstance(value, torch.dtype | torch.device) for value in held)
    return str(getattr(hook, "__module__", "")).startswith(TRACED)


def hook_tables(model: nn.Module) -> Iterator[tuple[str, str, dict[int, Any]]]:
    """The tables of hooks that a planned step passes by: whose, of what kind, and the table."""
    for name, module in model.named_modules():
        for attribute in HOOKS if name else ():
            if vars(module).get(attribute) is not None:
                yield f"module {name}", KINDS[attribute], vars(module)[attribute]
    for attribute in HOOKS:
        yield "every module", KINDS[attribute], vars(sys.modules[nn.Module.__module__]).get(f"_global{attribute}", {})


@contextmanager
def no_observers(model: nn.Module, found: list[Held]) -> Iterator[None]:
    """While the model is called, refuse a hook that changes nothing: no value, and in forward none of what is found.

    What a forward hook stores where the plan sees it is stored after every planned call, like what forward itself stores.

    Raises:
        CaptureError: the module and the hook.
    """
    undo = []
    try:
        for owner, kind, table in hook_tables(model):
            for key, hook in [(key, hook) for key, hook in table.items() if not is_traced_hook(hook)]:
                undo.append((table, key, hook))
                table[key] = changing(hook, owner, kind, found)
        yield
    finally:
        for table, key, hook in undo:
            if key in table:
                table[key] = hook


def changing(hook: Any, owner: str, kind: str, found: list[Held]) -> Any:
    """A hook that has to return what it was not given."""

    @functools.wraps(hook, updated=())
    def called(*args: Any, **kwargs: Any) -> Any:
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        before = Snapshot(found)
        result = hook(*args, **kwargs)
        stores = kind.startswith("forward") and before.changes()
        if not stores and all(leaf is None or id(leaf) in given for leaf in pytree.tree_leaves(result)):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise CaptureError(f"{owner} has a {kind} ({name}) that changes nothing, and a planned step would not call it: "
                               "remove it before planning, or hook the model itself")  # fmt: skip
        return result

    return called


@contextmanager
def no_watched_tensors() -> Iterator[None]:
    """While a model is called, refuse what looks at the gradients of tensors made there.

    Raises:
        Refusal: from a backward pass, naming the line.
    """
    register = torch.Tensor.register_hook

    def watched(tensor: torch.Tensor, hook: Any) -> Any:
        line = caller_line(sys._getframe(1)) if is_traced() else ""

        def called(gradient: torch.Tensor) -> Any:
            result = hook(gradient)
            if result is None:
                raise CaptureError(f"a hook set in forward at {line} looks at a gradient and returns nothing, and a "
                                   "planned step would not call it: leave it out, or return the gradient")  # fmt: skip
            return result

        return register(tensor, called if line else hook)

    def refused(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def called(tensor: torch.Tensor, *args: Any) -> Any:
            if is_traced() and not (name == "retain_grad" and tensor.is_leaf):
                raise Refusal(f"the model calls {name} in forward, and a planned step keeps no gradient but those of "
                              "parameters and inputs: leave it out")  # fmt: skip
            return original(tensor, *args)

        return called

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.Tensor, "register_hook", watched))
        for name in ("retain_grad", "register_post_accumulate_grad_hook"):
            stack.enter_context(replaced(torch.Tensor, name, refused(name)))
        yield

"""Tensors of the model that its forward exchanges for others.

`k.data = k.data * m` gives a parameter other memory: to a tracer that is no operation. It becomes a copy into the parameter,
which AOTAutograd then sees as a change of an input. Other names of the old contents would keep those in eager mode; so where
any are in use, that is refused. `self.n = self.n + 1` binds a buffer anew, and so does the planned call (`writes.py`),
if what it is bound to can be its buffer at the next call.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from ..ir.errors import CaptureError
from .constants import Refusal
from .inputs import TensorFacts

alias: Any = getattr(torch._C, "_is_alias_of")  # noqa: B009
DATA, GRAD = torch.Tensor.data, torch.Tensor.grad
MOVED = {torch.Tensor.set_: "set_", torch.Tensor.resize_: "resize_", torch.Tensor.requires_grad_: "requires_grad_"}


class Rebinding(TorchFunctionMode):
    """While a model is called: assignments to `.data` become copies; what else exchanges a tensor's insides is refused.

    Attributes:
        named: the model's tensors, by identity, with their names.
        assigned: names of those whose `.data` was assigned to.
        others: other names of their memory, made in this call.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {name: value for name, value in tensors}
        self.named = {id(value): name for name, value in reversed(tensors)}
        self.assigned: list[str] = []
        self.others: dict[str, list[weakref.ref[torch.Tensor]]] = {}

    def name_of(self, value: Any) -> str | None:
        """Which of the model's tensors a tensor is."""
        return self.named.get(id(value)) if isinstance(value, torch.Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        name = self.name_of(first)
        descriptor = getattr(func, "__self__", None)
        if descriptor is DATA and func.__name__ == "__set__":
            return self.assign(first, args[1], name)
        if name is None:
            return func(*args, **kwargs)
        if descriptor is GRAD:
            raise Refusal(f"the model looks at the gradient of {name} in its forward pass, or sets it: do that outside")
        if func in MOVED and not (func is torch.Tensor.requires_grad_ and first.requires_grad == (args[1:] or (True,))[0]):
            raise Refusal(f"the model calls {MOVED[func]} on {name} in its forward pass: do that outside")
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result is not first and shares(result, first):
            self.others.setdefault(name, []).append(weakref.ref(result))
        return result

    def assign(self, target: torch.Tensor, value: torch.Tensor, name: str | None) -> None:
        """`target.data = value`, as a copy into the target."""
        if name is None and not isinstance(target, FunctionalTensor):
            raise Refusal("the model changes a tensor that is no buffer: use register_buffer")
        told = f"{name}.data" if name else "a tensor's .data"
        if shares(value, target):
            return
        was, now = TensorFacts.of(target.detach()), TensorFacts.of(value.detach())
        if was != now:
            raise Refusal(f"the model assigns to {told}, which is {was}, a tensor of {now}: keep its shape and type")
        kept = name is None or any(one() is not None for one in self.others.get(name, ()))
        if kept or any(shares(value, other) for other in self.tensors.values()):
            raise Refusal(f"the model assigns to {told} and uses its old contents, or those of another of its tensors, under "
                          "two names: use .copy_(), or clone")  # fmt: skip
        self.assigned.append(str(name))
        with torch.no_grad():
            target.copy_(value)


def shares(one: Any, other: Any) -> bool:
    """Whether two traced tensors lie in the same memory."""
    one, other = (value.elem if isinstance(value, FunctionalTensor) else value for value in (one, other))
    return one is other or bool(alias(one, other))


def check_rebound(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Refuse a forward that binds a buffer to what it cannot be bound to after every call.

    Args:
        model: the model, just called.
        before: its buffers before that.

    Raises:
        CaptureError: a new buffer is not of the old one's shape, carries a gradient, or is another tensor of the model's.
    """
    now = dict(model.named_buffers(remove_duplicate=False))
    known = [*model.parameters(), *before.values()]
    found: dict[int, str] = {}
    for name, old in before.items():
        new = now.get(name)
        if new is old or new is None:
            continue
        if new.requires_grad:
            raise CaptureError(f"the model keeps a gradient in the buffer {name}, through which its next call would "
                               "differentiate: store a detached tensor")  # fmt: skip
        was, facts = TensorFacts.of(old.detach()), TensorFacts.of(new)
        if was != facts:
            raise CaptureError(f"the model replaces the buffer {name}, which is {was}, by {facts} in its forward pass: keep "
                               "its shape and type, or call the model once before planning")  # fmt: skip
        if any(shares(new, other) for other in known) or found.setdefault(id(new), name) != name:
            raise CaptureError(f"the model binds the buffer {name} to another of its tensors in its forward pass: "
                               "use .copy_(), or clone it")  # fmt: skip

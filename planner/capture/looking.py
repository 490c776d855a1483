"""What of a model's own tensors a hook looks at while it is called.

A planned step does some things later than eager PyTorch: it changes buffers at the end of its forward pass, and adds gradients
of parameters at the end of its backward pass. A hook that looks there in the meantime would see what was there before.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode


class Looking(TorchFunctionMode):
    """Tells of every look at some tensors. A hook that is shown a tensor gets its `.data` as an alias that counts changes."""

    def __init__(self, names: Mapping[int, str], shown: Iterable[torch.Tensor], tell: Callable[[str, bool], None]):
        """Begin to look.

        Args:
            names: of the tensors, by their identity.
            shown: what the hook is shown.
            tell: called with the name of a tensor that is used, and whether its gradient is asked for.
        """
        super().__init__()
        self.names, self.shown, self.tell = names, {id(value) for value in shown}, tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = getattr(func, "__self__", None)
        if asked is torch.Tensor.data and id(args[0]) in self.shown:
            return args[0].detach()
        for leaf in pytree.tree_leaves((args, kwargs)) if self.names else ():
            if id(leaf) in self.names:
                self.tell(self.names[id(leaf)], asked is torch.Tensor.grad)
        return func(*args, **(kwargs or {}))


def seen_gradient(told: str, name: str) -> str:
    """The refusal of a hook that looks at the gradient of a parameter."""
    return (f"{told} looks at the gradient of {name}, which a planned step adds when its backward pass is over: look there, or "
            "in a hook of the parameter")  # fmt: skip


def seen_changed(told: str, name: str) -> str:
    """The refusal of a hook that looks at a buffer which the step changes."""
    return f"{told} looks at {name}, which a planned step changes at the end of its forward pass: look when the call is over"


__all__ = ["Looking", "seen_changed", "seen_gradient"]

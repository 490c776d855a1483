"""Whether a backward pass would compute something else under autocast than outside, where planned steps run theirs."""

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ...planner.capture.graph import Traced
from ...planner.ir.errors import MemplanError
from ...planner.ir.program import Phase


class _Called(TorchDispatchMode):
    """Notes the operators that are called below autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # questions about a fake tensor's device
            self.found.append(func)
        return func(*args, **(kwargs or {}))


class Backward:
    """A step's backward pass, asked about autocast when it first runs under it."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.answers: dict[torch.dtype, str | None] = {}

    def refuse(self) -> None:
        """Refuse to run under autocast what would be something else there: eager's gradients would have other bits.

        Raises:
            MemplanError: autocast is on and casts an operand of the backward pass.
        """
        device = self.traced.program.device
        if not torch.is_autocast_enabled(device):
            return
        dtype = torch.get_autocast_dtype(device)
        if dtype not in self.answers:
            self.answers[dtype] = self.recast(device, dtype)
        if self.answers[dtype] is not None:
            raise MemplanError(f"backward() was called under torch.autocast, which casts operands of {self.answers[dtype]}: a "
                               "planned step's backward pass is that of a call outside, as PyTorch advises; end the region "
                               "before it")  # fmt: skip

    def recast(self, device: str, dtype: torch.dtype) -> str | None:
        """The first operator of the backward pass that autocast casts an operand of."""
        for op, node in zip(self.traced.program.ops, self.traced.nodes, strict=True):
            if op.phase is Phase.BACKWARD and node is not None and called_under(node, device, dtype) != [node.target]:
                return str(node.target).removesuffix(".default")
        return None


def called_under(node: fx.Node, device: str, dtype: torch.dtype) -> list[Any]:
    """The operators that a node's call comes to under autocast, with its fake operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda needed: needed.meta["val"])
    target: Any = node.target
    value = next((arg.meta["val"] for arg in node.all_input_nodes), None)
    if value is None:
        return [target]
    called = _Called()
    with value.fake_mode, called, torch.no_grad(), torch.autocast(device, dtype, cache_enabled=False):
        target(*args, **kwargs)
    return called.found


__all__ = ["Backward"]

"""What is promised of inputs and parameters, and inputs as text, for a plan's file."""

import json
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.utils._pytree as pytree

from .errors import PlanMismatch

if TYPE_CHECKING:
    from .capture import Captured


class TensorFacts(msgspec.Struct, frozen=True):
    """What is promised of an input tensor or a parameter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorFacts":
        """The facts of a tensor."""
        return TensorFacts(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)[6:], tensor.requires_grad)

    def __str__(self) -> str:
        dense, strides = 1, []
        for size in reversed(self.shape):
            strides.insert(0, dense)
            dense *= max(size, 1)
        known = all(size == 1 or step == usual for size, step, usual in zip(self.shape, self.stride, strides, strict=True))
        told = "" if known else f" with strides {list(self.stride)}"
        return f"{self.dtype}{list(self.shape)}{told}" + (" requiring grad" if self.requires_grad else "")


def facts(leaf: Any) -> Any:
    """What a call promises of one leaf: a tensor's facts, or the value itself."""
    return TensorFacts.of(leaf) if isinstance(leaf, torch.Tensor) else leaf


def describe_inputs(captured: "Captured") -> str:
    """The example inputs as JSON, for a plan file; empty where they hold something that JSON cannot."""
    try:
        leaves = [{"tensor": msgspec.to_builtins(leaf)} if isinstance(leaf, TensorFacts) else {"value": leaf}
                  for leaf in captured.signature.inputs]  # fmt: skip
        return json.dumps({"leaves": leaves, "spec": pytree.treespec_dumps(captured.signature.spec)})
    except (TypeError, NotImplementedError):
        return ""


def rebuild_inputs(text: str) -> tuple[tuple, dict]:
    """Inputs on meta as `describe_inputs` wrote them down.

    Raises:
        PlanMismatch: the description is missing or broken.
    """
    if not text:
        raise PlanMismatch("the plan file does not say what its inputs were: plan again in this process")
    try:
        data = json.loads(text)
        leaves = []
        for leaf in data["leaves"]:
            if "tensor" in leaf:
                known = msgspec.convert(leaf["tensor"], TensorFacts)
                if min(known.stride, default=0) < 0:
                    raise ValueError(f"strides {known.stride}")
                made = torch.empty_strided(known.shape, known.stride, dtype=getattr(torch, known.dtype), device="meta")
                leaves.append(made.requires_grad_(known.requires_grad))
            else:
                leaves.append(leaf["value"])
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(data["spec"]))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise PlanMismatch(f"the plan file's description of its inputs is broken: {error}") from None
    return args, kwargs

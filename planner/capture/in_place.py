"""Where a call can write its result over an operand, and how."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .nodes import span

# CPU kernels that reduce each row of the last dimension before they write any of it: as safe in place as pointwise ones.
# Tested bit for bit against the ordinary call in tests/planner/capture/test_in_place.py; CUDA's kernels are not on the list,
# for nobody has tested them.
ROWWISE = {"_softmax": 1, "_log_softmax": 1, "_softmax_backward_data": 2, "_log_softmax_backward_data": 2}
# Its in-place form rounds the number to the tensor's 16 bits first, which the ordinary call does not: this one writes the same
# as that. Of all operators that have a form to write in place with, it is the only one (test_in_place.py).
WRITTEN = {torch.ops.aten.mul.Scalar: torch.ops.aten.mul.out}


@dataclass(frozen=True)
class InPlace:
    """How an op writes over an operand: the overload to call, and the operand's name if it is an `out=` overload."""

    target: Any
    operand: fx.Node
    out: str | None


def in_place_form(node: fx.Node, operand: fx.Node, tensors: list[fx.Node], owner: dict[fx.Node, int]) -> InPlace | None:
    """How the call can write its result over an operand, or None where it cannot.

    Pointwise kernels read and write each element at the same index, so result and operand may be the same memory if
    they have the same layout and fill their storages, and no other operand sees that storage through another layout.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    new, old = node.meta["val"], operand.meta["val"]
    if torch.Tag.pointwise not in target.tags and not is_rowwise(node):
        return None
    if not isinstance(new, torch.Tensor) or layout(new) != layout(old) or old.storage_offset():
        return None
    if not span(new) == new.untyped_storage().nbytes() == old.untyped_storage().nbytes():
        return None
    if any(owner[other] == owner[operand] and layout(other.meta["val"]) != layout(old) for other in tensors):
        return None
    key = "CUDA" if new.device.type == "cuda" else "CPU"
    out = WRITTEN.get(target) or out_overload(target)
    if out is not None and torch._C._dispatch_has_kernel_for_dispatch_key(out.name(), key):
        return InPlace(out, operand, out._schema.arguments[-1].name)
    packet = getattr(torch.ops.aten, target._opname + "_", None) if target.namespace == "aten" else None
    overload = getattr(packet, target._overloadname, None)
    if overload is not None and node.args and node.args[0] is operand:
        wanted = [(arg.name, str(arg.type)) for arg in target._schema.arguments]
        if [(arg.name, str(arg.type)) for arg in overload._schema.arguments] == wanted:
            return InPlace(overload, operand, None)
    return None


def is_rowwise(node: fx.Node) -> bool:
    """Whether the call is one of `ROWWISE` along the last dimension of contiguous CPU tensors."""
    position = ROWWISE.get(node.target._opname)  # type: ignore[union-attr]
    value = node.meta["val"]
    if position is None or not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.dim() == 0:
        return False
    return node.args[position] in (-1, value.dim() - 1) and value.is_contiguous()


def layout(value: torch.Tensor) -> tuple:
    """Shape, strides, offset, type, and whether what is stored is the conjugate or the negative."""
    return tuple(value.shape), tuple(value.stride()), value.storage_offset(), value.dtype, value.is_conj(), value.is_neg()


def out_overload(target: torch._ops.OpOverload) -> Any:
    """The overload of the same call that takes where to write, or None."""
    wanted = [(arg.name, str(arg.type)) for arg in target._schema.arguments]
    for name in target._overloadpacket.overloads():
        candidate = getattr(target._overloadpacket, name)
        arguments = candidate._schema.arguments
        writes = [arg for arg in arguments if arg.alias_info is not None and arg.alias_info.is_write]
        if len(writes) == 1 and arguments[-1] is not None and arguments[-1].name == writes[0].name and arguments[-1].kwarg_only:
            if [(arg.name, str(arg.type)) for arg in arguments[:-1]] == wanted:
                return candidate
    return None

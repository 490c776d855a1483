"""Layouts, a type and a size that torch's fake kernels get wrong.

What tracing sees has to be what the device's kernel makes, for views follow it. Layouts were found by running torch's pointwise
operators and their gradients on operands of different layouts, real and fake; the real ones lay their result out as their
operands lie, in the order of the schema.
"""

from functools import cache
from typing import Any

import torch
from torch._prims_common import compute_elementwise_output_strides

FOLLOWING = {
    getattr(torch.ops.aten, name).default
    for name in ("elu_backward", "hardsigmoid_backward", "hardswish_backward", "hardtanh_backward", "logit_backward",
                 "softplus_backward", "native_dropout_backward", "special_xlog1py")
} | {torch.ops.aten.copysign.Tensor, torch.ops.aten.xlogy.Tensor}  # fmt: skip
# They keep their operand's strides and offset, and so the bytes before it, which torch's cache of fake results forgets.
UNCACHED = {
    torch.ops.aten.slice_scatter.default, torch.ops.aten.select_scatter.default, torch.ops.aten.diagonal_scatter.default,
    torch.ops.aten.as_strided_scatter.default, torch.ops.aten.copy.default,
}  # fmt: skip

# Its gradients are in 32 bits, whatever its operands are in: torch 2.11 takes them for 16 under autocast.
IN_32_BITS = {torch.ops.aten.mkldnn_rnn_layer_backward.default}
RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default


def real_stride(func: Any, args: tuple[Any, ...], found: Any) -> tuple[int, ...] | None:
    """How the kernel of an operator lays its result out, where torch's fake kernel has found otherwise; else None."""
    if func not in FOLLOWING:
        return None
    operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.shape == found.shape]
    stride = tuple(compute_elementwise_output_strides(*operands))
    return None if stride == found.stride() else stride


@cache
def recurrent_scratch(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, rest: tuple[Any, ...]) -> int:
    """Bytes that the CPU's recurrent layer keeps for its backward kernel, several times its output.

    Only oneDNN knows them, in pages and by the processor: the layer is run, once for all like it, on zeros.

    Args:
        shapes: of its seven tensors.
        dtype: of its tensors.
        rest: its other arguments; a list as a tuple.
    """
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    settings = [list(value) if isinstance(value, tuple) else value for value in rest]
    with torch.enable_grad():
        return torch.ops.aten.mkldnn_rnn_layer.default(*tensors, *settings)[3].numel()

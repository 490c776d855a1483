"""Layouts, a type and a size that torch's fake kernels get wrong.

What tracing sees has to be what the device's kernel makes, for views follow it. Layouts were found by running torch's
operators and their gradients on operands of different layouts, real and fake (`test_layouts.py` does so for these), and read in
the kernels' sources: where the processor's kernel and a GPU's differ, the rule is the processor's alone.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch._prims_common import compute_elementwise_output_strides, make_contiguous_strides_for, suggest_memory_format


def overloads(*names: str) -> list[Any]:
    """Operators by name; a torch that lacks one has nothing to be corrected."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(torch.ops.aten, packet, None), overload or "default", None))
    return [func for func in found if func is not None]


# They lay their result out as their operands lie, in the order of the schema.
FOLLOWING = frozenset(overloads(
    "elu_backward", "hardsigmoid_backward", "hardswish_backward", "hardtanh_backward", "logit_backward", "softplus_backward",
    "native_dropout_backward", "special_xlog1py", "copysign.Tensor", "xlogy.Tensor", "div.Tensor_mode", "floor_divide",
    "heaviside", "ldexp.Tensor", "logaddexp", "logaddexp2", "logical_and", "logical_or", "logical_xor",
))  # fmt: skip
# Whatever their operands' layout, their results have none.
CONTIGUOUS = frozenset(overloads(
    "_log_softmax_backward_data", "_softmax_backward_data", "huber_loss_backward", "mse_loss_backward",
    "smooth_l1_loss_backward", "native_layer_norm_backward", "pow.Scalar", "normal.Tensor_Tensor",
))  # fmt: skip
CONTIGUOUS_ON_CPU = frozenset(overloads("log_sigmoid_forward"))
# As one operand lies, given by its position.
ALIKE = dict.fromkeys(overloads("binary_cross_entropy_backward"), 1)
# Their first result, of one operand's shape or not, has the memory format that this operand's strides suggest.
SUGGESTED_ON_CPU = {
    **dict.fromkeys(overloads(
        "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit.no_stats",
        "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_with_update_functional",
        "channel_shuffle", "native_channel_shuffle", "max_unpool2d", "reflection_pad3d", "replication_pad3d",
    ), 0),
    **dict.fromkeys(overloads(
        "native_batch_norm_backward", "batch_norm_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
        "replication_pad2d_backward", "replication_pad3d_backward",
    ), 1),
}  # fmt: skip
CORRECTED = FOLLOWING | CONTIGUOUS | CONTIGUOUS_ON_CPU | ALIKE.keys() | SUGGESTED_ON_CPU.keys()
# They keep their operand's strides and offset, and so the bytes before it, which torch's cache of fake results forgets.
UNCACHED = {
    torch.ops.aten.slice_scatter.default, torch.ops.aten.select_scatter.default, torch.ops.aten.diagonal_scatter.default,
    torch.ops.aten.as_strided_scatter.default, torch.ops.aten.copy.default,
}  # fmt: skip

# Its gradients are in 32 bits, whatever its operands are in: torch 2.11 takes them for 16 under autocast.
IN_32_BITS = {torch.ops.aten.mkldnn_rnn_layer_backward.default}
RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default


def real_strides(func: Any, args: tuple[Any, ...], results: Iterable[Any]) -> list[tuple[int, ...] | None]:
    """How the kernel of an operator lays its results out, where torch's fake kernel has found otherwise; else None for each."""
    found: list[tuple[int, ...] | None] = []
    for index, result in enumerate(results):
        stride = result_stride(func, args, index, result) if isinstance(result, torch.Tensor) else None
        found.append(None if stride is None or stride == result.stride() else stride)
    return found


def result_stride(func: Any, args: tuple[Any, ...], index: int, result: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of one result by the rule of its operator; None where there is none."""
    cpu = result.device.type == "cpu"
    if func in FOLLOWING:
        operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() > 0]
        return tuple(compute_elementwise_output_strides(*(operand.expand(result.shape) for operand in operands)))
    if func in CONTIGUOUS or (cpu and func in CONTIGUOUS_ON_CPU):
        return tuple(make_contiguous_strides_for(result.shape))
    if index > 0:
        return None
    if func in ALIKE and args[ALIKE[func]].shape == result.shape:
        return tuple(compute_elementwise_output_strides(args[ALIKE[func]]))
    if cpu and func in SUGGESTED_ON_CPU:
        form = suggest_memory_format(args[SUGGESTED_ON_CPU[func]])
        return torch.empty(result.shape, device="meta").contiguous(memory_format=form).stride()
    return None


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

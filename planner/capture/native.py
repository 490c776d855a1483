"""Kernels that tracing would take apart though eager PyTorch has them in one piece.

Under the tracer's dispatcher, resizing, recurrent layers and some losses run as torch's Python decompositions whatever table
of decompositions is asked for: a bilinear resize becomes some twenty ops, of other bits and several times the memory, and an
LSTM's loses its dropout between layers. While a model is traced the decompositions are set aside, so that the graph has the
kernel that eager calls, or what that is made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
FAMILIES = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa",
    "lstm", "gru", "rnn_tanh", "rnn_relu",
    "hardshrink", "softshrink", "multi_margin_loss", "multilabel_margin_loss_forward",
)  # fmt: skip
# Python kernels that stay. Dropout and batch norm become the functional forms that `planner/capture/restore.py` and
# `planner/capture/graph.py` know; the others do what eager's do, of views and of ops of their own.
LEFT = (
    "dropout", "native_batch_norm", "cudnn_batch_norm",
    "broadcast_tensors", "empty", "istft", "matmul", "one_hot", "pad_sequence", "stft", "tensor_split", "unsafe_chunk",
)  # fmt: skip


@contextmanager
def native_kernels() -> Iterator[None]:
    """Trace the families as the ops that eager calls."""
    taken = []
    for family in FAMILIES:
        packet = getattr(torch.ops.aten, family, None)  # lanczos came with torch 2.13
        for op in [] if packet is None else [getattr(packet, name) for name in packet.overloads()]:
            for key in KEYS:
                if key in op.py_kernels:
                    taken.append((op, key, op.py_kernels.pop(key)))
                    op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, key, kernel in taken:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()

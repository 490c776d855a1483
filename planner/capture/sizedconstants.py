"""Fake tensors with symbolic sizes, laid out as kernels lay out tensors of the sizes themselves."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from .constants import Constants
from .questions import SYMBOLIC
from .symbols import Symbols

EXPAND = torch.ops.aten.expand.default


class SizedConstants(Constants):
    """Fake tensors with symbolic sizes.

    Attributes:
        symbols: the sizes.
    """

    def __init__(self, symbols: Symbols) -> None:
        super().__init__(symbols)
        self.symbols = symbols

    def run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        out = super().run(func, types, args, kwargs)
        return self.expanded(types, args[0], out) if func is EXPAND else out

    def expanded(self, types: Any, value: Any, out: Any) -> Any:
        """A tensor expanded as the kernel lays it out: torch's rule for symbolic sizes is another for size 1."""
        stride: list[Any] = [0] * out.dim() if value.dim() == 0 else list(out.stride())
        new = out.dim() - value.dim()
        for dim in reversed(range(out.dim() if value.dim() else 0)):
            if isinstance(out.shape[dim], int) and out.shape[dim] == 1:
                stride[dim] = value.stride(dim - new) if dim >= new else out.shape[dim + 1] * stride[dim + 1]
        if [str(step) for step in stride] == [str(step) for step in out.stride()]:
            return out
        return self.plain(
            torch.ops.aten.as_strided.default, types, (value, list(out.shape), stride, value.storage_offset()), {}
        )

    def evaluate(self, func: Any, args: Any, kwargs: Any, out: FakeTensor) -> None:
        if not any(isinstance(leaf, SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs))):
            super().evaluate(func, args, kwargs, out)

    def view_of_constant(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(leaf, SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs))):
            return self.plain(func, types, args, kwargs)
        return super().view_of_constant(func, types, args, kwargs)

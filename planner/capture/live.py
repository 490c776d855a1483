"""The bytes that eager PyTorch holds at its peak, from a step that runs on fake tensors as autograd runs it.

The unplanned schedule frees each value after its last reader, and makes what autograd would save. Eager mode frees a value when
nobody refers to it any more: a loop's variable outlives its use, `torch.utils.checkpoint` drops what is inside it. No graph
knows that; the run does (`planner.capture.eagerly`).
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .nodes import describe_call, is_view

Moments = dict[str, tuple[int, int]]  # an op's key -> the most bytes that live when it returns, and how many it has written


class Live(TorchDispatchMode):
    """Counts the storages that live while ops run. Enter it after the mode of the fake tensors.

    Attributes:
        moments: for each kind of op, when the most lived.
    """

    def __init__(self, given: Iterable[torch.Tensor]):
        super().__init__()
        self.moments: Moments = {}
        self.sizes: dict[int, int] = {}
        self.now = 0
        for tensor in given:
            self.meet(tensor)

    def meet(self, tensor: torch.Tensor) -> int:
        """Count a tensor's storage until it is freed. Returns its bytes if it is new. Sparse ones are refused elsewhere."""
        if tensor.layout is not torch.strided:
            return 0
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return 0
        self.sizes[key] = size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self.forget, key).atexit = False
        return size

    def forget(self, key: int) -> None:
        """A storage has been freed."""
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = sum(self.meet(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if not is_view(func):
            key = describe_call(func, args, kwargs or {})
            self.moments[key] = max(self.moments.get(key, (0, 0)), (self.now, made))
        return result

"""What stands in for a model's tensors while it is traced, and the model put back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .constants import Constants


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def fake_parameters(model: nn.Module, mode: Constants, device: str) -> Iterator[dict[str, str]]:
    """Put fake tensors in place of the model's parameters and buffers, and the real ones back at the end.

    Yields:
        For a parameter with several names, each later name and the first one.
    """
    first: dict[int, tuple[str, torch.Tensor]] = {}
    alias: dict[str, str] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for prefix, module in model.named_modules(remove_duplicate=False):
            tables: Any = (module._parameters, module._buffers)
            for table in tables:
                for key, value in list(table.items()):
                    name = f"{prefix}.{key}" if prefix else key
                    if isinstance(value, FakeTensor) and id(value) in first:
                        alias[name] = first[id(value)][0]  # a module met twice holds the stand-in already
                    if value is None or isinstance(value, FakeTensor):
                        continue
                    if id(value) in first:
                        alias[name] = first[id(value)][0]
                    else:
                        copy = fake(mode, value.detach(), device)
                        if isinstance(value, nn.Parameter):
                            copy = nn.Parameter(copy, requires_grad=value.requires_grad)
                        first[id(value)] = (name, copy)
                        first[id(copy)] = (name, copy)
                    undo.append((table, key, value))
                    table[key] = first[id(value)][1]
        yield alias
    finally:
        for table, key, value in reversed(undo):
            table[key] = value


def fake(mode: Constants, tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A fake tensor of the same facts, on the device traced for where the tensor is on meta or fake itself.

    Tensors that lie in one storage have stand-ins that do.
    """
    if tensor.device.type != "meta" and tensor.device.type == device and not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor, static_shapes=True)
    storage = tensor.untyped_storage()
    with mode, torch.no_grad():
        known = mode.stores.get(storage._cdata)
        if known is None:
            known = storage, torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
            mode.stores[storage._cdata] = known
        made = torch.empty(0, dtype=tensor.dtype, device=device)
        made.set_(known[1], tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[arg-type]
    return made.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() or tensor.is_complex() else made

"""The calls that op keys describe, on fresh tensors of random contents."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ...planner.cost.local import memory_available

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 16  # random elements that fill a tensor over and over


class Unmeasurable(Exception):
    """A key that names no operator, or carries an argument that cannot be built."""


class NoRoom(Unmeasurable):
    """There is no memory for the arguments now, which says nothing of later."""


@dataclass(frozen=True)
class Call:
    """An operator and its arguments; calling it runs it."""

    op: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.op(*self.args, **self.kwargs)

    @property
    def given(self) -> dict[int, int]:
        """Address and bytes of each storage that it is given."""
        return {storage.data_ptr(): storage.nbytes() for storage in storages([self.args, list(self.kwargs.values())])}

    @property
    def bytes(self) -> int:
        """Of the storages that it is given, each once."""
        return sum(self.given.values())

    @property
    def inputs(self) -> set[int]:
        """The addresses of the storages that it is given."""
        return set(self.given)


def build(key: str, device: str) -> Call:
    """The call that a key describes, on fresh tensors of random contents.

    Indices are random within what they index, other integers zero, so that no kernel leaves its tensors.

    Raises:
        NoRoom: there is no memory for it now.
        Unmeasurable: the key does not describe a call that can be made here.
    """
    try:
        spec = json.loads(key)
        name, args, kwargs = spec["op"], spec["args"], spec["kwargs"]
    except (ValueError, TypeError, KeyError):
        raise Unmeasurable("not a description of a call") from None
    op = resolve(name)
    named = {**dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)), **kwargs}
    bounds = index_bounds(name.split(".")[1], named)
    built = {name: decode(value, device, bounds.get(name, ())) for name, value in named.items()}
    return Call(op, list(built.values())[: len(args)], {name: built[name] for name in kwargs})


def resolve(name: str) -> Any:
    """The operator of that name."""
    import torch

    parts = name.split(".")
    if len(parts) != 3:
        raise Unmeasurable(f"{name} is not an operator")
    try:
        return getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        raise Unmeasurable(f"{name} is not an operator") from None


def index_bounds(op: str, named: dict[str, Any]) -> dict[str, Sequence[int]]:
    """For an argument that holds indices, by its name in the operator's schema: what each must stay below."""

    def shape(name: str) -> list[int]:
        value = named.get(name)
        return value["s"] if isinstance(value, dict) and "s" in value else []

    if op in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        return {"indices": shape("weight")[:1]}
    if op == "embedding_dense_backward":
        return {"indices": [named.get("num_weights", 1)]}
    if op.startswith(("nll_loss", "cross_entropy")):
        classes = shape("self")
        return {"target": classes[1:2] or classes}
    if op in ("index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put"):
        return {"indices": shape("self")}
    if op.startswith("max_pool2d_with_indices_backward"):
        return {"indices": [prod(shape("self")[-2:])]}
    if isinstance(named.get("dim"), int) and "index" in named and shape("self"):
        return {"index": [shape("self")[named["dim"]]]}
    return {}


def decode(value: Any, device: str, bounds: Sequence[int] = ()) -> Any:
    """An argument of a call from its JSON form."""
    import torch

    if isinstance(value, list):
        padded = [*bounds, *[0] * len(value)]
        return [decode(item, device, padded[index : index + 1]) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "t" in value:
        return tensor(value, device, bounds[0] if bounds else 0)
    if "f" in value:
        return float(value["f"])
    if "device" in value:
        return torch.device(device)
    for form, kind in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        found = getattr(torch, str(value.get(form)), None)
        if isinstance(found, kind):
            return found
    raise Unmeasurable(f"an argument {value} cannot be built")


def tensor(spec: dict[str, Any], device: str, bound: int) -> "torch.Tensor":
    """A tensor of the given type, shape, strides and offset over a storage that just holds it."""
    import torch

    dtype = getattr(torch, spec["t"], None)
    if not isinstance(dtype, torch.dtype):
        raise Unmeasurable(f"unknown element type {spec['t']}")
    shape, strides, offset = spec["s"], spec["st"], spec.get("o", 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    room = (offset + extent) * dtype.itemsize
    if room > free_bytes(device) / 3:
        raise NoRoom(f"a tensor of {room} bytes does not fit now")
    return contents(offset + extent, dtype, device, bound).as_strided(shape, strides, offset)


def contents(count: int, dtype: "torch.dtype", device: str, bound: int) -> "torch.Tensor":
    """`count` elements: floats within [0.1, 0.9), which are fit for logarithms, variances and probabilities alike."""
    import torch

    if dtype is torch.bool:
        block = torch.rand(BLOCK, device=device) < 0.5
    elif dtype.is_floating_point or dtype.is_complex:
        block = (torch.rand(BLOCK, device=device) * 0.8 + 0.1).to(dtype)
    elif bound > 0:
        largest = torch.iinfo(dtype).max
        block = torch.randint(min(bound, largest), (BLOCK,), device=device).to(dtype)
    else:
        return torch.zeros(count, dtype=dtype, device=device)
    filled = torch.empty(count, dtype=dtype, device=device)
    whole = count // BLOCK * BLOCK
    filled[:whole].view(-1, BLOCK).copy_(block.expand(whole // BLOCK, BLOCK))
    filled[whole:].copy_(block[: count - whole])
    return filled


def free_bytes(device: str) -> float:
    """Bytes that can still be allocated; infinity where the system does not say."""
    if device != "cuda":
        return memory_available()
    import torch

    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # which the allocator hands out again
    return torch.cuda.mem_get_info()[0] + cached


def storages(value: Any) -> Iterator["torch.UntypedStorage"]:
    """The storages of every tensor in nested lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from storages(item)

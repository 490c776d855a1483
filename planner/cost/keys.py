"""What an op's key says: the operator, and the types, shapes and strides of its tensors."""

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import msgspec

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Tensor(msgspec.Struct, frozen=True):
    """A tensor as an op's key describes it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of a compact copy."""
        return self.count * ITEMSIZE.get(self.dtype, 1)

    @property
    def floating(self) -> bool:
        """Whether arithmetic on it counts as floating-point operations."""
        return self.dtype.startswith(("float", "bfloat", "complex"))


class Call(msgspec.Struct, frozen=True):
    """The part of a key that the models look at: the operator without its overload, its tensors in order."""

    op: str
    tensors: tuple[Tensor, ...]
    opaque: bool


@lru_cache(maxsize=1 << 14)
def read_key(key: str) -> Call | None:
    """A key taken apart; None where it is not the description of a call."""
    try:
        spec = msgspec.json.decode(key)
        name = spec["op"].split(".")
        leaves = list(leaves_of([spec["args"], list(spec["kwargs"].values())]))
        tensors = tuple(Tensor(leaf["t"], tuple(leaf["s"]), tuple(leaf["st"])) for leaf in leaves if "t" in leaf)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return None
    opaque = len(name) != 3 or name[0] == "memplan" or any("x" in leaf for leaf in leaves)  # memplan's own call hooks
    return Call(name[1] if len(name) == 3 else spec["op"], tensors, opaque)


def leaves_of(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in nested lists."""
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from leaves_of(item)


def measurable(key: str) -> bool:
    """Whether the key describes a call of an operator that can be built again from it."""
    call = read_key(key)
    return call is not None and not call.opaque

"""`dynamic_shapes=` as `torch.export` has it: which sizes of a call's tensors vary, and between which bounds."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..ir.errors import MemplanError
from ..ir.plan import Varying
from ..ir.units import shorten

FORM = 'write {"input_ids": {0: Dim("batch", max=8), 1: Dim("length", max=512)}}'


def varying(shapes: Any, names: list[str]) -> tuple[Varying, ...]:
    """The sizes that vary.

    Args:
        shapes: for each argument by name, or in their order, its dimensions: {dimension: Dim} or one for each dimension, where
            None or a number stands for one that does not vary; None for an argument of which none does. A name (a string) may
            stand for a `Dim` without bounds; `Dim.AUTO` and `Dim.DYNAMIC` are sizes of their own.
        names: of the call's arguments, in their order.

    Raises:
        MemplanError: what cannot be read, and how to write it.
    """
    if isinstance(shapes, Mapping):
        given = dict(shapes)
    elif isinstance(shapes, tuple | list) and len(shapes) <= len(names):
        given = dict(zip(names, shapes, strict=False))
    else:
        raise MemplanError(f"dynamic_shapes={shorten(shapes)}: {FORM}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise MemplanError(f"dynamic_shapes names {unknown[0]!r}, and the call has {', '.join(names)}")
    found = [
        made
        for name, dims in given.items()
        for dim, size in of_argument(name, dims)
        if (made := of_size(name, dim, size)) is not None
    ]
    if not found:
        raise MemplanError(f"dynamic_shapes={shorten(shapes)} lets no size vary: {FORM}, or leave it out")
    return tuple(found)


def of_argument(name: str, dims: Any) -> Iterable[tuple[int, Any]]:
    """The dimensions of one argument, and what is said of each."""
    if dims is None:
        return ()
    if isinstance(dims, Mapping) and all(isinstance(dim, int) for dim in dims):
        return dims.items()
    if isinstance(dims, tuple | list) and not any(isinstance(size, Mapping | tuple | list) for size in dims):
        return enumerate(dims)
    raise MemplanError(f"dynamic_shapes says {shorten(dims)} of {name}, which has to be a tensor: {FORM}")


def of_size(name: str, dim: int, size: Any) -> Varying | None:
    """What is said of one size; None for one that does not vary."""
    if isinstance(size, str):
        return Varying(name, dim, size)
    kind = getattr(getattr(size, "type", None), "name", "")
    if size is None or isinstance(size, int) or kind == "STATIC":
        return None
    least, most = (bound if isinstance(bound, int) else None for bound in (getattr(size, "min", 0), getattr(size, "max", None)))
    if kind in ("AUTO", "DYNAMIC"):
        return Varying(name, dim, f"{name}.{dim}", least or 0, most)
    if not hasattr(size, "root") and hasattr(size, "__name__") and hasattr(size, "max"):
        return Varying(name, dim, size.__name__, least or 0, most)
    raise MemplanError(f"dynamic_shapes says {shorten(size)} of dimension {dim} of {name}: {FORM}; what is computed from "
                       "another size is found out by itself")  # fmt: skip


__all__ = ["varying"]

"""What is promised of inputs and parameters, and whether a call keeps the promise."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import torch
import torch.utils._pytree as pytree

from ..ir.errors import CaptureError
from .own import own_of

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
FIXED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
DEEP = 6  # levels of an object's contents that are compared


class TensorFacts(msgspec.Struct, frozen=True):
    """What is promised of an input tensor or a parameter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorFacts":
        """The facts of a tensor."""
        return TensorFacts(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)[6:], tensor.requires_grad)

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if not all(self.shape):
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (1 + last) * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        dense, strides = 1, []
        for size in reversed(self.shape):
            strides.insert(0, dense)
            dense *= max(size, 1)
        known = all(size == 1 or step == usual for size, step, usual in zip(self.shape, self.stride, strides, strict=True))
        told = "" if known else f" with strides {list(self.stride)}"
        return f"{self.dtype}{list(self.shape)}{told}" + (" requiring grad" if self.requires_grad else "")


class Place(msgspec.Struct, frozen=True):
    """Where an input tensor lies.

    Attributes:
        storage: whose storage it lies in: the index of the first input that does, or the name of a parameter or buffer.
        offset: bytes from the storage's beginning.
        bytes: of the storage.
    """

    storage: int | str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Held:
    """What is promised of an input that is neither a tensor nor a plain value: its class and what it holds."""

    kind: type
    contents: Any

    def __str__(self) -> str:
        return f"a {self.kind.__name__}"


@dataclass(frozen=True, eq=False)
class _Itself:
    """Something that cannot be looked into: equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    __hash__ = object.__hash__


def facts(leaf: Any) -> Any:
    """What a call promises of one leaf: a tensor's facts, a plain value itself, or what an object holds."""
    if isinstance(leaf, torch.Tensor):
        return TensorFacts.of(leaf)
    return leaf if is_plain(leaf) else Held(type(leaf), contents(leaf, DEEP))


def is_plain(value: Any) -> bool:
    """Whether a value cannot change."""
    return type(value) in PLAIN or isinstance(value, Enum | torch.Size | slice | range)


def contents(value: Any, depth: int) -> Any:
    """What an object holds, as nested tuples of plain values that can be compared."""
    if isinstance(value, float | complex):
        return type(value), repr(value)
    if is_plain(value):
        return type(value), value
    if isinstance(value, FIXED) or depth == 0:
        return _Itself(value)
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array, or a number of its kind
        return type(value), str(value.dtype), value.shape, value.tobytes()
    parts = parts_of(value)
    return _Itself(value) if parts is None else (type(value), tuple((key, contents(item, depth - 1)) for key, item in parts))


def parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    """What an object holds, by key or attribute; None where that cannot be seen."""
    parts: list[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, Sequence):
        parts = list(enumerate(value))
    elif isinstance(value, AbstractSet):
        parts = [("elements", _Itself(each)) if not is_plain(each) else ("elements", each) for each in sorted(value, key=repr)]
    own = own_of(value)
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if hasattr(value, name)]
    if own or slots or (own is not None and parts is None):
        parts = [*(parts or []), *(own or {}).items(), *((name, getattr(value, name)) for name in slots)]
    return parts


def check_leaf(leaf: Any, name: str) -> None:
    """Refuse an input that holds tensors where tracing does not see them: a plan would read these ever after.

    Raises:
        CaptureError: which.
    """
    if not isinstance(leaf, torch.Tensor) and holds_tensors(leaf, DEEP):
        kind = type(leaf).__name__
        advice = f"pass its items as arguments (**{name})" if isinstance(leaf, Mapping) else "pass its tensors as arguments"
        raise CaptureError(f"{name} is a {kind}, which holds tensors that memplan cannot see: {advice}, or register the class "
                           "with torch.utils._pytree.register_pytree_node or torch.export.register_dataclass")  # fmt: skip


def holds_tensors(value: Any, depth: int) -> bool:
    """Whether a tensor is found in an object."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or is_plain(value) or isinstance(value, FIXED):
        return False
    return any(holds_tensors(item, depth - 1) for _, item in parts_of(value) or ())


def same(now: Any, known: Any) -> bool:
    """Whether one leaf keeps what was promised of another; a number that is not one is like itself, and 0.0 unlike -0.0."""
    if type(now) is not type(known):
        return False
    return repr(now) == repr(known) if isinstance(now, float | complex) else now == known


def storage_key(tensor: torch.Tensor) -> int:
    """What two tensors have in common that lie in one storage."""
    return tensor.untyped_storage()._cdata


def places_of(leaves: Iterable[Any], named: Iterable[tuple[str, torch.Tensor]]) -> tuple[Place | None, ...]:
    """Where each leaf lies; None for what is no tensor with strides.

    Args:
        leaves: of a call.
        named: the model's parameters and buffers.
    """
    owner: dict[int, int | str] = {}
    for name, value in named:
        if value.layout is torch.strided:
            owner.setdefault(storage_key(value), name)
    places: list[Place | None] = []
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            places.append(None)
            continue
        storage = owner.setdefault(storage_key(leaf), index)
        places.append(Place(storage, int(leaf.storage_offset()) * leaf.element_size(), leaf.untyped_storage().nbytes()))
    return tuple(places)


def bytes_needed(inputs: Sequence[Any], places: Sequence[Place | None]) -> int:
    """Bytes that inputs take up beside the model's: of each storage those within one of its tensors.

    What else a storage holds, such as the rest of a data set of which a batch is a view, is nobody's need.
    """
    pieces: dict[int, list[tuple[int, int]]] = {}
    for known, place in zip(inputs, places, strict=True):
        if place is not None and isinstance(place.storage, int):
            pieces.setdefault(place.storage, []).append((place.offset, place.offset + known.extent))
    total = 0
    for spans in pieces.values():
        end = 0
        for low, high in sorted(spans):
            total += max(0, high - max(low, end))
            end = max(end, high)
    return total


def bytes_counted(places: Iterable[Place | None]) -> int:
    """Bytes that a plan has counted for inputs: their storages, each once."""
    return sum({place.storage: place.bytes for place in places if place and isinstance(place.storage, int)}.values())


def distance(one: Place | None, other: Place | None) -> int | None:
    """Bytes from where one tensor begins to where another does; None where they lie in two storages."""
    return other.offset - one.offset if one is not None and other is not None and one.storage == other.storage else None


def children_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The parts of a nesting, which torch has under two names."""
    return list(spec.children()) if hasattr(spec, "children") else list(spec.children_specs)


def check_places(
    inputs: Sequence[Any], known: Sequence[Place | None], now: Sequence[Place | None], names: Callable[[], Sequence[str]],
    changed: set[Any],
) -> str:  # fmt: skip
    """What is wrong with where a call's inputs lie; empty where nothing is.

    Inputs that lie together may lie apart as far as the bytes do that were counted, and the other way round; but not where
    the step changes what they lie in, for its order of reads and writes is that of the plan.

    Args:
        inputs: the facts of each leaf.
        known: where each lay when the plan was made.
        now: where each lies.
        names: says what to call each.
        changed: leaves by their index, and parameters and buffers by name, that the step changes or moves.
    """
    for index, (was, place) in enumerate(zip(known, now, strict=True)):
        if was is None or place is None or (was.storage, was.offset) == (place.storage, place.offset):
            continue
        if isinstance(was.storage, str):
            return f"{names()[index]} lay in the parameter or buffer {was.storage} when the plan was made and does not now"
        if isinstance(place.storage, str) and place.storage in changed:
            return f"{names()[index]} lies in {place.storage}, which the step changes, and did not when the plan was made"
    for index in (index for index in changed if isinstance(index, int)):
        for other in range(len(known)):
            if distance(known[index], known[other]) != distance(now[index], now[other]):
                return (f"{names()[other]} lies otherwise to {names()[index]}, which the step changes, than when the plan was "
                        "made: in its memory, or outside it")  # fmt: skip
    counted, needed = bytes_counted(known), bytes_needed(inputs, now)
    if needed > counted:
        apart = [names()[index] for index, (was, place) in enumerate(zip(known, now, strict=True))
                 if was and place and was.storage != index and place.storage == index]  # fmt: skip
        return (f"{' and '.join(apart) or 'an input'} lay in the memory of another input when the plan was made and does not "
                f"now, so that the inputs take {needed} bytes where {counted} were counted")  # fmt: skip
    return ""

"""The example inputs of a plan as text, for its file, and back.

A file names classes and makes none: what it names has to be imported by whoever applies the plan, as their model is.
"""

import base64
import json
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.utils._pytree as pytree
from torch import nn

from ..ir.errors import PlanMismatch
from ..ir.plan import Recipe
from .inputs import Held, Place, TensorFacts, children_of
from .standins import named_tensors

if TYPE_CHECKING:
    from .capture import Captured

TORCH = (torch.dtype, torch.layout, torch.memory_format)
BROKEN = (ValueError, zlib.error, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, RecursionError,
          OverflowError, StopIteration)  # fmt: skip


class Untold(Exception):
    """What a file cannot hold."""


def describe_inputs(captured: "Captured") -> str:
    """The example inputs as JSON, for a plan file; where they hold something that a file cannot, JSON that says what."""
    from .calls import leaf_names

    signature, model = captured.signature, captured.model()
    names = [] if model is None else leaf_names(model, signature.spec)
    leaves: list[dict[str, Any]] = []
    tensors = [index for index, leaf in enumerate(signature.inputs) if isinstance(leaf, TensorFacts)]
    values = {tensors[index]: value for index, value in captured.values.items()}
    for index, leaf in enumerate(signature.inputs):
        try:
            leaves.append(tell_leaf(leaf, index, signature.places))
            if index in values:
                leaves[-1]["values"] = tell_elements(values[index])
        except Untold as error:
            return json.dumps({"missing": f"{names[index] if names else f'input {index}'} is {error}"})
    try:
        return json.dumps({"leaves": leaves, "nest": tell_nest(signature.spec)})
    except Untold as error:
        return json.dumps({"missing": f"the inputs are nested in {error}"})


def tell_leaf(leaf: Any, index: int, places: Sequence[Place | None]) -> dict[str, Any]:
    """One leaf; a tensor's place where it is not simply the beginning of a storage of its own that just holds it."""
    if not isinstance(leaf, TensorFacts):
        return tell_value(leaf)
    told: dict[str, Any] = {"tensor": msgspec.to_builtins(leaf)}
    place = places[index] if places else None
    if place is not None and place != Place(index, 0, leaf.extent):
        told["place"] = msgspec.to_builtins(place)
    return told


def tell_elements(value: torch.Tensor) -> str:
    """What is in a tensor of integers or bools, for the model asks about it."""
    return base64.b64encode(zlib.compress(value.contiguous().view(torch.uint8).numpy().tobytes())).decode()


def read_elements(text: str, known: TensorFacts) -> torch.Tensor:
    """What `tell_elements` wrote down."""
    data = bytearray(zlib.decompress(base64.b64decode(text, validate=True)))
    return torch.frombuffer(data, dtype=getattr(torch, known.dtype)).view(known.shape)


def tell_value(value: Any) -> dict[str, Any]:
    """A plain value, exactly."""
    if value is None or type(value) in (bool, int, str):
        return {"value": value}
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, TORCH):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, slice | range):
        return {type(value).__name__: [tell_value(each) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, Enum):
        return {"enum": class_name(type(value)), "member": value.name}
    raise Untold(str(value) if isinstance(value, Held) else f"a {type(value).__name__}")


def read_value(told: dict[str, Any]) -> Any:
    """What `tell_value` wrote down."""
    ((kind, value), *rest) = told.items()
    match kind:
        case "value":
            return value
        case "float":
            return float.fromhex(value)
        case "complex":
            return complex(*map(float.fromhex, value))
        case "bytes":
            return base64.b64decode(value, validate=True)
        case "torch":
            found = getattr(torch, value)
            if not isinstance(found, TORCH):
                raise ValueError(f"torch.{value}")
            return found
        case "device":
            return torch.device(value)
        case "size":
            return torch.Size(value)
        case "slice" | "range":
            return {"slice": slice, "range": range}[kind](*map(read_value, value))
        case "enum":
            return class_named(value)[dict(rest)["member"]]
    raise ValueError(f"a value of kind {kind!r}")


def tell_nest(spec: pytree.TreeSpec) -> Any:
    """How leaves nest: null for a leaf, else what holds them, its parts, and what its class says of them."""
    if spec.is_leaf():
        return None
    parts, kind = [tell_nest(part) for part in children_of(spec)], spec.type
    if kind in (tuple, list):
        return {kind.__name__: parts}
    if kind is dict:
        return {"dict": parts, "keys": tell_context(spec.context)}
    name = "namedtuple" if not isinstance(kind, type) else class_name(kind)
    return {"node": name, "parts": parts, "context": tell_context(spec.context)}


def read_nest(told: Any, leaves: list[Any]) -> Any:
    """Leaves, taken from the front of a list, nested again."""
    if told is None:
        return leaves.pop(0)
    kind = next(iter(told))
    if kind in ("tuple", "list"):
        parts = [read_nest(part, leaves) for part in told[kind]]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "dict":
        keys = read_context(told["keys"])
        return dict(zip(keys, [read_nest(part, leaves) for part in told["dict"]], strict=True))
    parts, context = [read_nest(part, leaves) for part in told["parts"]], read_context(told["context"])
    if told["node"] == "namedtuple":
        return context(*parts)
    known = class_named(told["node"])
    if known not in pytree.SUPPORTED_NODES:
        raise PlanMismatch(f"the plan's inputs are nested in a {told['node']}, which is no registered pytree node in this "
                           "process: register it as where the plan was made")  # fmt: skip
    return torch.Size(parts) if known is torch.Size else pytree.SUPPORTED_NODES[known].unflatten_fn(parts, context)


def tell_context(context: Any) -> Any:
    """What a class says of its parts: plain values, classes, and lists, tuples and dicts of them."""
    if type(context) in (list, tuple):
        return {type(context).__name__: [tell_context(each) for each in context]}
    if type(context) in (dict, OrderedDict):
        return {type(context).__name__: [[tell_context(key), tell_context(item)] for key, item in context.items()]}
    return {"class": class_name(context)} if isinstance(context, type) else tell_value(context)


def read_context(told: Any) -> Any:
    """What `tell_context` wrote down."""
    ((kind, value), *_) = told.items()
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](map(read_context, value))
    if kind in ("dict", "OrderedDict"):
        made = {"dict": dict, "OrderedDict": OrderedDict}[kind]
        return made((read_context(key), read_context(item)) for key, item in value)
    return class_named(value) if kind == "class" else read_value(told)


def class_name(kind: type) -> str:
    """A class as module:name, by which it is found again."""
    if "<" in kind.__qualname__:
        raise Untold(f"a {kind.__name__}, a class made in a function")
    return f"{kind.__module__}:{kind.__qualname__}"


def class_named(name: str) -> Any:
    """A class by its name, if its module has been imported.

    Raises:
        PlanMismatch: it has not.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    if found is None:
        raise PlanMismatch(
            f"the plan's inputs have a {path} of the module {module!r} among them: import it, then apply the plan"
        )
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise PlanMismatch(f"the plan's inputs have a {path} among them, which {module!r} does not have in this process: "
                               "keep the class in a module that both processes import")  # fmt: skip
    if not isinstance(found, type):
        raise ValueError(f"{name} is no class")
    return found


def rebuild_inputs(recipe: Recipe, model: nn.Module) -> tuple[tuple, dict]:
    """Inputs on meta as `describe_inputs` wrote them down; those that lie in a parameter or buffer, as views of the model's.

    Args:
        recipe: with the description.
        model: whose parameters and buffers these are.

    Raises:
        PlanMismatch: the description is missing or broken, or speaks of a parameter that the model has not.
    """
    text = recipe.inputs
    if recipe.missing:
        raise PlanMismatch(f"the plan's file cannot say what its inputs were, for {recipe.missing}: pass tensors, numbers, "
                           "words, tuples, lists, dicts and registered pytree nodes of an importable module, or plan in the "
                           "process that applies the plan")  # fmt: skip
    if not text:
        raise PlanMismatch("the plan file does not say what its inputs were: plan again in this process")
    try:
        data = json.loads(text)
        leaves = read_leaves(data["leaves"], model)
        if "spec" in data:  # as memplan wrote it before classes could be told
            args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(data["spec"]))
        else:
            args, kwargs = read_nest(data["nest"], rest := list(leaves))
            if rest:
                raise ValueError(f"{len(rest)} leaves too many")
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("no arguments")
    except BROKEN as error:
        raise PlanMismatch(f"the plan file's description of its inputs is broken: {error}") from None
    return args, kwargs


def read_leaves(told: Sequence[dict[str, Any]], model: nn.Module) -> list[Any]:
    """The leaves, tensors that lay in one storage in one storage."""
    stores: dict[int | str, torch.UntypedStorage] = {}
    leaves = []
    real = {leaf.get("place", {}).get("storage", index) for index, leaf in enumerate(told) if "values" in leaf}
    for index, leaf in enumerate(told):
        if "tensor" not in leaf:
            leaves.append(read_value(leaf))
            continue
        known = msgspec.convert(leaf["tensor"], TensorFacts)
        dtype = getattr(torch, known.dtype)
        if not isinstance(dtype, torch.dtype) or min((*known.stride, *known.shape), default=0) < 0:
            raise ValueError(f"{known.dtype} of strides {known.stride}")
        if "place" not in leaf:
            made = torch.empty_strided(known.shape, known.stride, dtype=dtype, device="cpu" if index in real else "meta")
            stores[index] = made.untyped_storage()
        else:
            place = msgspec.convert(leaf["place"], Place)
            if place.storage == index:
                device = "cpu" if index in real else "meta"
                stores[index] = torch.empty(place.bytes, dtype=torch.uint8, device=device).untyped_storage()
            made = laid(known, dtype, place, stores, model)
        if "values" in leaf:
            made.copy_(read_elements(leaf["values"], known))
        leaves.append(made.requires_grad_(known.requires_grad))
    return leaves


def laid(
    known: TensorFacts, dtype: torch.dtype, place: Place, stores: dict[int | str, torch.UntypedStorage], model: nn.Module
) -> torch.Tensor:
    """A tensor in the storage that it lay in."""
    if isinstance(place.storage, str) and place.storage not in stores:
        owner = dict(named_tensors(model)).get(place.storage)
        if owner is None:
            raise PlanMismatch(f"an input of the plan lies in {place.storage}, which this model has not: plan again")
        stores[place.storage] = owner.untyped_storage()
    store = stores[place.storage]
    first, rest = divmod(place.offset, dtype.itemsize)
    if rest or place.offset < 0 or place.bytes != store.nbytes() or place.offset + known.extent > store.nbytes():
        raise ValueError(f"a tensor at {place.offset} of {store.nbytes()} bytes")
    return torch.empty(0, dtype=dtype, device=store.device).set_(store, first, known.shape, known.stride)  # type: ignore[arg-type]

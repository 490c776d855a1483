"""What a call of a model looks like: its leaves in one order, their names, and what a plan holds of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from .inputs import Place, children_of

PLAIN = bool | int | float | str | None


@dataclass(frozen=True)
class Signature:
    """What a call must look like for the captured program to answer it.

    Attributes:
        inputs: the facts of the flattened example inputs: a `TensorFacts` for a tensor, a plain value itself.
        spec: how the inputs nest.
        training: each module's name and whether it was in training mode.
        autocast: the autocast state of the device, as (enabled, type).
        places: where each input lies, for those that share memory with one another or with the model.
    """

    inputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    training: tuple[tuple[str, bool], ...]
    autocast: tuple[bool, torch.dtype]
    places: tuple[Place | None, ...]


@lru_cache(maxsize=64)
def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """What a forward takes; kept, for it is asked at every call."""
    return inspect.signature(forward)


def flatten_call(model: nn.Module, args: tuple, kwargs: dict | None) -> tuple[list[Any], pytree.TreeSpec]:
    """A call's leaves in one order, however the caller split positional from keyword arguments.

    Raises:
        TypeError: the arguments do not fit the model's forward.
    """
    bound = signature_of(type(model).forward).bind(model, *args, **(kwargs or {}))
    for name, known in bound.signature.parameters.items():  # f(x) and f(x, mask=None) are one call: the first
        given = bound.arguments.get(name)
        if isinstance(known.default, PLAIN) and type(given) is type(known.default) and given == known.default:
            bound.arguments.pop(name, None)
    return pytree.tree_flatten((bound.args[1:], bound.kwargs))


def leaf_names(model: nn.Module, spec: pytree.TreeSpec) -> list[str]:
    """What to call the leaves of a call: the parameter's name, and the place in it where it holds several."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = [name for name, each in signature_of(type(model).forward).parameters.items() if each.kind in kinds][1:]
    args, kwargs = children_of(spec)
    named = [(known[min(place, len(known) - 1)], part) for place, part in enumerate(children_of(args))]
    named += zip(kwargs.context, children_of(kwargs), strict=True)
    return [name + path for name, part in named for path in leaf_paths(part)]


def leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """The place of each leaf in an argument, as `['key'][0]`; its number where a class does not tell."""
    try:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]
        found = [pytree.keystr(path) for path, _ in paths]
    except Exception:  # whatever a user's class says of numbers in the place of tensors
        found = []
    return found if len(found) == spec.num_leaves else [f" (leaf {index})" for index in range(spec.num_leaves)]


def autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for the device type, and to which type."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

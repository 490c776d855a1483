"""Which tensor an input of a traced piece is: known by the tensor itself, never by a name.

Dynamo says of every input where it came from, as an expression such as `L['self']._modules['head']._parameters['weight']`,
whose form depends on how the class looks its attributes up: it is good for display and for nothing else. AOTAutograd says of
every input of the graphs it makes which of the call's arguments it stands for. The arguments themselves are before us when a
piece is first called. So: descriptor -> argument -> tensor -> a name that no other tensor of the call has.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...planner.ir.errors import CaptureError

NAME = re.compile(r"(?:_modules|_parameters|_buffers)(?:'\])?\['([^']+)'\]")
INSIDE = "piece."  # what the module that is traced calls the piece that it calls
SEVERAL = ("SyntheticBaseAOTInput", "ViewBaseAOTInput")  # one input in place of several views


@dataclass(frozen=True)
class Argument:
    """What an input of a graph is to the user: `parameter`, `buffer` or `input`, and a name that is its own."""

    kind: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The tensors of one call of a piece.

    Attributes:
        lifted: what the piece's own module holds, by name.
        given: what it is called with, in order.
    """

    lifted: Mapping[str, Argument]
    given: Sequence[Argument]

    @staticmethod
    def of(lifted: Mapping[str, Any], sources: Sequence[str], given: Sequence[Any]) -> "Arguments":
        """Name the tensors of a call.

        Args:
            lifted: the piece's own parameters and buffers.
            sources: for each argument the expression that it comes from.
            given: the arguments.
        """
        expressions = [*lifted, *(sources if len(sources) == len(given) else [""] * len(given))]
        found = named(zip(expressions, [*lifted.values(), *given], strict=True))
        return Arguments(dict(zip(lifted, found, strict=False)), found[len(lifted) :])

    def find(self, desc: Any) -> Argument | None:
        """What a descriptor of AOTAutograd's stands for; None where that is no single argument.

        Raises:
            CaptureError: a part of a tensor subclass.
        """
        kind = type(desc).__name__
        if kind == "PlainAOTInput":
            return self.given[desc.idx]
        if kind in ("ParamAOTInput", "BufferAOTInput"):
            return self.lifted[desc.target.removeprefix(INSIDE)]
        if kind in SEVERAL:
            return None
        raise CaptureError(f"the model takes an input that memplan cannot wire ({kind}): call it with plain tensors")


def named(pairs: Iterable[tuple[str, Any]]) -> list[Argument]:
    """Kind and name of each value, after where it comes from; no two values have one name, and one value has one."""
    known: dict[int, Argument] = {}
    taken: set[str] = set()
    found = []
    for position, (source, value) in enumerate(pairs):
        if id(value) not in known:
            name = shown(source) or f"argument {position}"
            name = name if name not in taken else f"{name} ({source})"
            name = name if name not in taken else f"{name}, argument {position}"
            taken.add(name)
            known[id(value)] = Argument(kind_of(value, source), name)
        found.append(known[id(value)])
    return found


def kind_of(value: Any, source: str) -> str:
    """What a value is to the user. A leaf that wants a gradient counts as a parameter wherever it is kept."""
    if isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf):
        return "parameter"
    return "buffer" if "_buffers" in source else "input"


def shown(source: str) -> str:
    """The name in the model that an expression spells; the expression where it spells none."""
    return ".".join(NAME.findall(source)) or source


def tensor_source(node: fx.Node) -> str:
    """The expression that an input of Dynamo's graph comes from."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def likeness(values: Sequence[Any]) -> tuple[Any, ...]:
    """What a plan depends on in a call's arguments: the facts of each, and which of them are one tensor or share memory.

    Dynamo looks after the first of these; it guards no sharing between tensors that are different.
    """
    first: dict[int, int] = {}
    found = []
    for position, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            found.append(value)
            continue
        place = first.setdefault(value.untyped_storage()._cdata, position)
        offset = None if place == position else (place, value.storage_offset() - values[place].storage_offset())
        twin = offset is not None and any(other is value for other in values[:position])
        found.append((value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_leaf, offset, twin))
    return tuple(found)


__all__ = ["INSIDE", "Argument", "Arguments", "likeness", "named", "tensor_source"]

"""What a capture with symbolic sizes knows: which sizes it serves, and its program, its call and its code at each of them."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
import torch.utils._pytree as pytree
from torch import fx

from ..ir.errors import CaptureError
from ..ir.family import Family, Figures, Row
from ..ir.program import Op, Phase, Program
from .calls import Signature
from .concrete import SIZED, SizeFloat, SizeInt, concretise
from .constants import Constants
from .expressions import Numbers
from .graph import Traced
from .guards import Holds
from .in_place import ROWWISE
from .inputs import Place, TensorFacts
from .nodes import graph_costs, operations, results, span, structure_of, unpicked
from .observers import is_observation
from .questions import SYMBOLIC
from .symbols import Symbols
from .whole_slices import drop_whole_slices
from .writes import Write

MARK = "\x00"  # begins the place of a number in the text of a key
KNOWN = 256  # sizes whose signature is kept


@dataclass(frozen=True)
class Sized:
    """The sizes that a capture serves.

    Attributes:
        symbols: the sizes, and where a call has them.
        holds: whether the trace serves given sizes.
        family: its program at any.
        loss: the caller's own loss, if there is one.
    """

    symbols: Symbols
    holds: Holds
    family: Family
    loss: fx.GraphModule | None = None
    known: dict[tuple[int, ...], Signature] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sizes."""
        return self.symbols.names

    def of(self, leaves: Sequence[Any]) -> tuple[int, ...] | None:
        """The sizes of a call; None where it has not the tensors, or one size is two numbers."""
        found = []
        for places in self.symbols.places.values():
            sizes = {size_at(leaves, leaf, dim) for leaf, dim in places}
            if len(sizes) != 1 or None in sizes:
                return None
            found.append(sizes.pop())
        return tuple(found)  # type: ignore[arg-type]

    def signature(self, base: Signature, sizes: tuple[int, ...]) -> Signature:
        """What a call with these sizes must look like."""
        if sizes not in self.known:
            if len(self.known) >= KNOWN:
                self.known.pop(next(iter(self.known)))
            self.known[sizes] = self.resized(base, sizes)
        return self.known[sizes]

    def resized(self, base: Signature, sizes: tuple[int, ...]) -> Signature:
        """The same, made anew."""
        number = dict(zip(self.names, sizes, strict=True))
        inputs, places = list(base.inputs), list(base.places)
        for leaf, known in enumerate(base.inputs):
            named = self.symbols.of_leaf(leaf)
            if not named:
                continue
            shape = tuple(number[named[dim]] if dim in named else size for dim, size in enumerate(known.shape))
            inputs[leaf] = msgspec.structs.replace(known, shape=shape, stride=dense_strides(known, shape))
            place = base.places[leaf]
            if place is not None:
                size = math.prod(shape) * getattr(torch, known.dtype).itemsize
                places[leaf] = Place(place.storage, 0, size)
        return Signature(tuple(inputs), base.spec, base.training, base.autocast, tuple(places))


def sized_capture(
    mode: Constants, symbols: Symbols, traced: Traced, loss: fx.GraphModule | None, writes: Iterable[Write]
) -> Sized:
    """What a capture knows of sizes, once everything has been asked of them.

    Raises:
        CaptureError: the model stores a size, or holds a tensor that depends on one.
    """
    for write in writes:
        if any(isinstance(leaf, SYMBOLIC) for leaf in write.leaves):
            raise CaptureError(f"the model stores a size in {write.name}, which varies with dynamic=: store it outside of "
                               "forward, or plan for one shape")  # fmt: skip
    for node, source in traced.sources.items():
        if source.kind == "constant" and node.meta[SIZED] is not None and has_symbols(node.meta[SIZED]):
            raise CaptureError(f"the model holds {source.name}, whose size varies with dynamic=: make it in forward")
    family = family_of(traced, symbols, loss)
    symbols.let_go()
    return Sized(symbols, Holds(symbols, mode.questions.different), family, loss)


def with_numbers(graph: fx.GraphModule, symbols: Symbols) -> None:
    """A symbolic graph as one with the numbers of the example, and what eager PyTorch would have left out left out."""
    drop_whole_slices(graph)
    concretise(graph, symbols)


def has_symbols(value: torch.Tensor) -> bool:
    """Whether a fake tensor's size varies."""
    return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))


def size_at(leaves: Sequence[Any], leaf: int, dim: int) -> int | None:
    """One size of a call."""
    value = leaves[leaf] if leaf < len(leaves) else None
    return int(value.shape[dim]) if isinstance(value, torch.Tensor) and dim < value.dim() else None


def dense_strides(known: TensorFacts, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor of another shape whose dimensions lie in memory in the same order."""
    made, step, dense = [0] * len(shape), 1, 1
    for dim in sorted(range(len(shape)), key=lambda dim: (known.stride[dim], -dim)):
        made[dim] = step if known.stride[dim] == dense else known.stride[dim]
        step, dense = step * shape[dim], dense * known.shape[dim]
    return tuple(made)


def family_of(traced: Traced, symbols: Symbols, loss: fx.GraphModule | None) -> Family:
    """The program of a concretised graph at any sizes.

    Args:
        traced: its program at the sizes of the example.
        symbols: the sizes.
        loss: the caller's own loss, likewise.

    Raises:
        CaptureError: at the sizes of the example it is not the program.
    """
    return _Gathering(traced, symbols).family(loss)


class _Gathering:
    """Expressions of a program's figures, gathered op by op."""

    def __init__(self, traced: Traced, symbols: Symbols):
        self.traced, self.symbols = traced, symbols
        self.numbers = Numbers(symbols)
        self.slots: dict[str, int] = {}
        self.keys: dict[str, int] = {}
        self.rows: dict[Row, int] = {}

    def slot(self, value: Any) -> int:
        """The index of a number."""
        return self.slots.setdefault(self.numbers.name(value), len(self.slots))

    def family(self, loss: fx.GraphModule | None) -> Family:
        """The whole."""
        program = self.traced.program
        buffers = tuple(self.slot(self.bytes_of(index)) for index in range(len(program.buffers)))
        row_of, pairs = [], {}
        for index, (op, node) in enumerate(zip(program.ops, self.traced.nodes, strict=True)):
            row_of.append(self.rows.setdefault(self.row(index, op, node, loss), len(self.rows)))
            if node is not None and op.reuse:
                pairs[index] = tuple((pair, self.slot_of(self.condition(index, node, pair))) for pair in op.reuse)
        listed = f"[{', '.join(self.slots)}], [{', '.join(self.keys)}]"
        function = self.numbers.function(listed)
        base = tuple(self.symbols.hints[name] for name in self.symbols.names)
        made = Family(program, base, self.symbols.names, lambda *sizes: Figures(*function(*sizes)), buffers, tuple(self.rows),
                      tuple(row_of), pairs)  # fmt: skip
        check_base(made)
        return made

    def slot_of(self, condition: str) -> int:
        """The index of a condition."""
        return self.slots.setdefault(condition, len(self.slots))

    def bytes_of(self, buffer: int) -> Any:
        """Of a buffer."""
        node = self.traced.base.get(buffer)
        value = None if node is None else node.meta.get(SIZED, node.meta.get("val"))
        return (
            value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else self.traced.program.buffers[buffer].bytes
        )

    def row(self, index: int, op: Op, node: fx.Node | None, loss: fx.GraphModule | None) -> Row:
        """The figures of an op."""
        if index in self.traced.mutations:
            source, made = self.traced.mutations[index]
            target = next(place for place, known in self.traced.sources.items() if known == source)
            text = self.key(structure_of("aten.copy_.default", (target, made), {}, SIZED), (", ", ": "))
            return Row(text, self.slot(0), self.slot(2 * span(target.meta[SIZED])), self.slot(0))
        if op.phase is Phase.LOSS and (loss is not None or op.workspace):
            return self.loss_row(loss)
        if node is None:
            key = self.keys.setdefault(repr(op.key), len(self.keys))
            return Row(key, self.slot(op.flops), self.slot(op.traffic), self.slot(op.workspace))
        parts = results(node)
        tensors = [arg for arg in node.all_input_nodes if arg in self.traced.owner]
        traffic = sum(span(arg.meta[SIZED]) for arg in tensors) + sum(span(part.meta[SIZED]) for part, _ in parts)
        given = pytree.tree_map(symbolic, (tuple(node.args), dict(node.kwargs)))
        key = self.key(structure_of(node.target, given[0], given[1], SIZED), (",", ":"))
        if is_observation(node):
            times = op.workspace // op.traffic if op.traffic else 0
            return Row(key, self.slot(0), self.slot(traffic), self.slot(times * traffic))
        return Row(key, self.slot(operations(node, SIZED)), self.slot(traffic), self.slot(unpicked(node, parts, SIZED)))

    def loss_row(self, loss: fx.GraphModule | None) -> Row:
        """The figures of the caller's loss; None for one of which nothing is known (`_Lowering.add_loss`)."""
        if loss is None:
            size = sum(span(node.meta[SIZED]) for node, source in self.traced.sources.items() if source.kind == "tangent")
            flops, traffic, peaks = size, 4 * size, [size]
        else:
            flops, traffic, peaks = graph_costs(loss, SIZED)
        exprs = {self.numbers.name(peak): None for peak in peaks} or {"0": None}
        peak = f"max({', '.join(exprs)})" if len(exprs) > 1 else next(iter(exprs))
        whole, moved = self.numbers.name(flops), self.numbers.name(traffic)
        head, tail = json.dumps({"op": "loss", "args": ["A", "B"], "kwargs": {}}).split('"A", "B"')
        text = f"{head!r} + repr(float({whole})) + ', ' + repr({moved}) + {tail!r}"
        return Row(self.keys.setdefault(text, len(self.keys)), self.slot(flops), self.slot(traffic), self.slot_of(peak))

    def key(self, structure: dict[str, Any], separators: tuple[str, str]) -> int:
        """The index of a key: Python that makes its text."""
        names: list[str] = []

        def place(value: Any) -> str:
            names.append(self.numbers.name(value))
            return MARK

        text = json.dumps(structure, separators=separators, default=place)
        mark = json.dumps(MARK)
        made = repr(text)
        if names:
            made = f"{text.replace('%', '%%').replace(mark, '%r')!r} % ({', '.join(names)},)"
        return self.keys.setdefault(made, len(self.keys))

    def condition(self, index: int, node: fx.Node, pair: tuple[int, int]) -> str:
        """When an op may write in place, as Python: the layouts agree and fill their storages."""
        form = self.traced.in_place[index, pair[1]]
        new, old = node.meta[SIZED], form.operand.meta[SIZED]
        owner = self.traced.owner
        same = [arg.meta[SIZED] for arg in node.all_input_nodes if owner.get(arg) == owner[form.operand]]
        equal: list[tuple[Any, Any]] = [(old.storage_offset(), 0), (span(new), new.untyped_storage().nbytes())]
        equal += [(span(new), old.untyped_storage().nbytes())]
        if getattr(node.target, "_opname", "") in ROWWISE:
            equal += zip(new.stride(), contiguous_strides(new.shape), strict=True)
        for other in (new, *same):
            equal += zip(numbers_of(other), numbers_of(old), strict=True)
        pairs = {(self.numbers.name(one), self.numbers.name(other)): None for one, other in equal}
        text = " and ".join(
            f"{one} == {other}" for one, other in pairs if one != other and not (one.isdigit() and other.isdigit())
        )
        return f"({text})" if text else "True"


def numbers_of(value: torch.Tensor) -> list[Any]:
    """What has to agree for two tensors to be laid out alike."""
    return [*value.shape, *value.stride(), value.storage_offset()]


def contiguous_strides(shape: Sequence[Any]) -> list[Any]:
    """Strides of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def symbolic(leaf: Any) -> Any:
    """A number by its symbols."""
    return leaf.symbolic if isinstance(leaf, SizeInt | SizeFloat) else leaf


def check_base(family: Family) -> None:
    """Refuse a family that is not its own program at the sizes of the example.

    Raises:
        CaptureError: which op differs.
    """
    wrong = difference(family.program, family.at(family.base))
    if wrong:
        raise CaptureError(f"sizes cannot vary in this model: {wrong}; plan without dynamic=")


def difference(one: Program, other: Program) -> str:
    """The first thing in which two programs of one model differ; empty where they are the same."""
    if len(one.ops) != len(other.ops) or len(one.buffers) != len(other.buffers):
        return f"{len(one.ops)} ops over {len(one.buffers)} buffers, and {len(other.ops)} over {len(other.buffers)}"
    for first, second in zip(one.ops, other.ops, strict=True):
        for name in ("target", "phase", "reads", "writes", "mutates", "repeatable", "random", "key", "flops", "traffic",
                     "workspace", "reuse"):  # fmt: skip
            found, known = getattr(first, name), getattr(second, name)
            if found != known:
                return f"{name} of {first.name} is {found!s:.300} and {known!s:.300}"
    for first, second in zip(one.buffers, other.buffers, strict=True):
        if (first.bytes, first.kind) != (second.bytes, second.kind):
            return f"{first.name} has {first.bytes} bytes and {second.bytes}"
    return "" if (one.outputs, one.device) == (other.outputs, other.device) else "the outputs differ"


__all__ = ["Sized", "difference", "family_of"]

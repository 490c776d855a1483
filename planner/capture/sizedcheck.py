"""Whether a trace with symbolic sizes is, at other sizes, what an independent trace for these finds."""

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.errors import CaptureError
from ..ir.family import Family
from ..ir.program import Op, Program
from .concrete import SIZED
from .expressions import expr_of
from .graph import Traced
from .inputs import TensorFacts
from .sized import Sized, difference
from .symbols import Symbols

if TYPE_CHECKING:
    from .capture import Captured


def check_against(captured: "Captured", other: "Captured") -> tuple[int, ...]:
    """Compare a capture with symbolic sizes with one for a single shape, op for op and literal for literal.

    Args:
        captured: with `dynamic`.
        other: of the same model in the same state, with inputs of other sizes, without `dynamic`.

    Returns:
        The sizes of the other.

    Raises:
        CaptureError: what differs: the trace with symbolic sizes is not to be used.
    """
    sized = captured.sized
    assert sized is not None
    sizes = sizes_of(sized, other)
    if sizes is None:
        wrong = "the calls are not alike"
    elif not sized.holds(sizes):
        wrong = "its conditions do not hold"
    else:
        wrong = program_differs(sized.family, sizes, other.program) or wired(captured, other, sizes)
    if wrong or sizes is None:
        raise CaptureError(f"a trace with sizes that vary is another one at {sizes}: {wrong}; plan for each shape")
    return sizes


def sizes_of(sized: Sized, other: "Captured") -> tuple[int, ...] | None:
    """The sizes that another capture is for."""
    found = []
    for places in sized.symbols.places.values():
        facts = [(other.signature.inputs[leaf], dim) for leaf, dim in places if leaf < len(other.signature.inputs)]
        known = {known.shape[dim] for known, dim in facts if isinstance(known, TensorFacts) and dim < len(known.shape)}
        if len(facts) != len(places) or len(known) != 1:
            return None
        found.append(known.pop())
    return tuple(found)


def program_differs(family: Family, sizes: tuple[int, ...], other: Program) -> str:
    """What differs between a family's program at some sizes and one that was traced at these; empty where nothing does."""
    return difference(without_extra(family.at(sizes), other), other)


def without_extra(program: Program, other: Program) -> Program:
    """The other program's pairs of what may be written in place, where they are these and more.

    Where layouts agree by chance, at some sizes, an op may write in place there though it may not elsewhere.
    """
    import msgspec

    def widened(op: Op, twin: Op) -> Op:
        return msgspec.structs.replace(op, reuse=twin.reuse) if set(op.reuse) <= set(twin.reuse) else op

    if len(program.ops) != len(other.ops):
        return program
    ops = tuple(widened(op, twin) for op, twin in zip(program.ops, other.ops, strict=True))
    return msgspec.structs.replace(program, ops=ops)


def wired(captured: "Captured", other: "Captured", sizes: tuple[int, ...]) -> str:
    """What differs in how the ends of two steps are wired to the model; empty where nothing does."""
    for name in ("outputs", "output_spec", "loss_leaf", "plain", "train", "stored", "writes"):
        if getattr(captured, name) != getattr(other, name):
            return f"its {name} are others"
    assert captured.sized is not None
    return ends_differ(captured.traced, other.traced, captured.sized.symbols, sizes)


def ends_differ(one: Traced, two: Traced, symbols: Symbols, sizes: tuple[int, ...]) -> str:
    """What differs in the ends of two graphs, of which the first has symbols for its sizes; empty where nothing does."""
    if [told(one, place) for place, _ in one.gradients] != [told(two, place) for place, _ in two.gradients]:
        return "its gradients are others"
    if {index: source.name for index, (source, _) in one.mutations.items()} != {
        index: source.name for index, (source, _) in two.mutations.items()
    }:
        return "it changes others of the model's buffers"
    kept = [[source.value for source in each.sources.values() if source.kind == "constant"] for each in (one, two)]
    if len(kept[0]) != len(kept[1]) or not all(map(alike, *kept)):
        return "it holds other constants"
    given = {symbols.symbols[name]: size for name, size in zip(symbols.names, sizes, strict=True)}
    ends = [*zip(one.outputs, two.outputs, strict=True), *zip(
        (node for _, node in one.gradients), (node for _, node in two.gradients), strict=True)]  # fmt: skip
    for node, twin in ends:
        if isinstance(node, fx.Node) and isinstance(twin, fx.Node) and layout_at(node, given) != facts_of(twin.meta["val"]):
            return f"{node} is laid out otherwise"
    return ""


def told(traced: Any, place: fx.Node) -> tuple[str, str, int]:
    """Whose a gradient is."""
    source = traced.sources[place]
    return source.kind, source.name, source.index


def alike(one: Any, other: Any) -> bool:
    """Whether two constants are equal."""
    return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)


def layout_at(node: fx.Node, given: dict[Any, int]) -> list[int]:
    """Shape, strides and offset of a value with given sizes."""
    numbers = [expr_of(number) for number in facts_of(node.meta[SIZED])]
    return [number if isinstance(number, int) else int(number.xreplace(given)) for number in numbers]


def facts_of(value: torch.Tensor) -> list[Any]:
    """Shape, strides and offset of a value."""
    return [*value.shape, *value.stride(), value.storage_offset()]

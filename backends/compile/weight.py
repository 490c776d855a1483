"""What a run of a piece weighs on the others' share of a budget."""

from collections.abc import Iterable
from typing import NamedTuple

from ...passes.liveness import between_bytes
from ...planner.ir.plan import Side
from ...planner.ir.program import Phase, Program


class Weight(NamedTuple):
    """Bytes of one run.

    Attributes:
        piece: whose run it is.
        saved: what it holds between its passes or, if that is more, what it leaves behind beside gradients of parameters.
        left: all that it leaves behind.
        own: its peak, parameters and inputs left out.
        again: what lies beside that where the graph is kept for another backward pass: a copy of what was saved, and what a
            loss outside of the piece has.
    """

    piece: int
    saved: int
    left: int
    own: int
    again: int


def weigh(piece: int, side: Side, gradients: int) -> Weight:
    """The weight of a schedule, of whose gradients so many bytes are of parameters."""
    program, left = side.program, left_bytes(side.program)
    between = between_bytes(program, side.schedule)
    return Weight(
        piece, max(between, left - gradients), left, side.peak - program.resident_bytes, between + loss_bytes(program)
    )


def together(weights: Iterable[Weight]) -> int:
    """Bytes that some runs hold at most, whichever of their backward passes have run.

    The gradients of a piece are there once, however many of its runs have made some.
    """
    total, beyond = 0, dict[int, int]()
    for weight in weights:
        total += weight.saved
        beyond[weight.piece] = max(beyond.get(weight.piece, 0), weight.left - weight.saved)
    return total + sum(beyond.values())


def left_bytes(program: Program) -> int:
    """Bytes of its own that are live when a step ends: outputs, tangents and gradients."""
    return sum(program.buffers[buffer].bytes for buffer in program.outputs)


def loss_bytes(program: Program) -> int:
    """Bytes that a loss outside of the piece needs."""
    return sum(op.workspace for op in program.ops if op.phase is Phase.LOSS)


__all__ = ["Weight", "left_bytes", "loss_bytes", "together", "weigh"]

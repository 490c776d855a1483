"""Bytes that a step takes in eager mode: what lives, with the workspaces of kernels and what the optimizer keeps."""

from collections.abc import Mapping

from ..ir.program import Kind, Phase, Program
from .table import Table
from .workspaces import modelled_workspace


def eager_peak(moments: Mapping[str, tuple[int, int]], program: Program, table: Table | None) -> int:
    """Bytes at the peak of a step in eager mode, optimizer state and the workspaces of kernels counted.

    Args:
        moments: of its forward and backward pass, as `capture.live` counts them: an op's key -> bytes that live
            when it returns, and how many it has written.
        program: of the same step, with its costs: its optimizer's figures.
        table: measurements of the device, or None.
    """
    state = sum(buffer.bytes for buffer in program.buffers if buffer.kind is Kind.STATE)
    peak = 0
    for key, (live, made) in moments.items():
        figures = table.get(key) if table is not None else None
        peak = max(peak, live + (modelled_workspace(key, made, program.device) if figures is None else figures.workspace))
    gradients = sum(buffer.bytes for buffer in program.buffers if buffer.kind is Kind.GRADIENT)
    updates = [op.workspace for op in program.ops if op.phase is Phase.UPDATE]
    return state + peak if not updates else max(state + peak, program.resident_bytes + gradients + max(updates))

"""`backward(retain_graph=True)`: what a planned step has saved, kept for another backward pass.

A step's backward pass frees what it saved as it reads it, and writes over some of it. Where the graph is to be retained it
works on copies, which lie beside the budget for as long as it runs.
"""

import torch

from ...planner.capture.graph import Traced
from ...planner.ir.errors import MemplanError
from .codegen import Generated
from .updates import Updates


def copied(traced: Traced, code: Generated, saved: list) -> list:
    """What a backward pass may use up, when what was saved is to be kept.

    Args:
        traced: the step.
        code: that runs it.
        saved: as its forward pass returned it.

    Raises:
        MemplanError: the step's memory is not its own to keep.
    """
    alone = (("arena=True", code.arena), ('"offload"', code.tiers or code.homes),
             ("optimizer_in_backward=True", isinstance(code.updates, Updates)))  # fmt: skip
    for name, given in alone:
        if given:
            raise MemplanError(f"backward(retain_graph=True) of a step that was planned with {name}, whose memory is used "
                               "again: leave it out, or plan without")  # fmt: skip
    program = traced.program
    own = {buffer for buffer, op in enumerate(program.producer) if op >= 0} - set(program.outputs)
    return [again(value) if traced.owner[node] in own else value for node, value in zip(code.saved, saved, strict=False)] + [
        *saved[len(code.saved) :]
    ]


def again(value: torch.Tensor) -> torch.Tensor:
    """The same tensor in memory of its own, laid out alike."""
    made = torch.empty(0, dtype=value.dtype, device=value.device)
    return made.set_(value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride())  # type: ignore[arg-type]

"""What an optimizer keeps, and what its step needs: counted into the program as resident state and one update op."""

import json
from typing import Any

import torch

from .errors import CaptureError
from .program import Buffer, Kind, Op, Phase

# name -> (state tensors per parameter, temporaries per parameter of the for-loop step, of the multi-tensor step)
# Read in torch/optim: Adam's step makes `exp_avg_sq.sqrt()` and the denominator derived from it.
KNOWN = {"sgd": (0, 0, 0), "adam": (2, 2, 1), "adamw": (2, 2, 1)}


def update_op(
    optimizer: Any, parameters: dict[int, torch.Tensor], gradients: list[int], first: int, device: str
) -> tuple[list[Buffer], Op]:
    """State buffers and the update op.

    Args:
        optimizer: `sgd`, `adam`, `adamw`, or a torch optimizer of one of these classes.
        parameters: buffer -> fake tensor of each parameter that is updated.
        gradients: buffers of gradients.
        first: index of the first new buffer.
        device: cuda takes the multi-tensor step by default, cpu the for-loop one.

    Raises:
        CaptureError: an optimizer that memplan does not know.
    """
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    name = name.lower()
    if name not in KNOWN:
        raise CaptureError(f"unknown optimizer {name!r}: memplan counts the state of {', '.join(KNOWN)}")
    states, each, multi = KNOWN[name]
    if name == "sgd" and not isinstance(optimizer, str):
        states = int(any(group.get("momentum", 0) for group in optimizer.param_groups))
    sizes = [tensor.untyped_storage().nbytes() for tensor in parameters.values()]
    buffers = [
        Buffer(name=f"state {number} of parameter {index}", bytes=size, kind=Kind.STATE)
        for number in range(states)
        for index, size in enumerate(sizes)
    ]
    fused = not isinstance(optimizer, str) and any(group.get("fused") for group in optimizer.param_groups)
    workspace = 0 if fused else (multi * sum(sizes) if device == "cuda" else each * max(sizes, default=0))
    traffic = sum(sizes) * (3 + 2 * states)
    op = Op(
        name=f"{name} step",
        target=f"optimizer.{name}",
        key=json.dumps({"op": f"optimizer.{name}", "args": [traffic], "kwargs": {}}),
        phase=Phase.UPDATE,
        reads=tuple(sorted(gradients)),
        writes=(),
        mutates=tuple(sorted([*parameters, *range(first, first + len(buffers))])),
        repeatable=False,
        flops=4.0 * traffic / 4,
        traffic=traffic,
        workspace=workspace,
    )
    return buffers, op

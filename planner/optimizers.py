"""What an optimizer keeps, and what its step needs: counted into the program as resident state and update ops.

By default one op updates everything, after the backward pass; the caller runs it. *In backward* there is one op for each
parameter, which the plan runs as soon as the gradient is complete and nobody reads the old value any more, so that gradients
never pile up. Small parameters share ops: what a call of an optimizer costs beside its arithmetic would be most of the time.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import CaptureError
from .plan import Counted, Kept
from .program import Buffer, Kind, Op, Phase

SMALL = 1 << 16  # bytes of a parameter that is updated together with others
ROW = 32  # of them at a time, at most
PART = 64  # and no more than this part of the bytes of all parameters: their gradients wait for one another
# name -> (state tensors per parameter, temporaries per parameter of the for-loop step, of the multi-tensor step, times
# that the for-loop step reads or writes a tensor of the parameter's size). Read in torch/optim: Adam's step makes
# `exp_avg_sq.sqrt()` and the denominator derived from it. What options add is in `temporaries_of`.
KNOWN = {"sgd": (0, 0, 0, 3), "adam": (2, 2, 1, 18), "adamw": (2, 2, 1, 20)}


def kept_by(optimizer: Any, device: str) -> Kept:
    """The figures of an optimizer.

    Args:
        optimizer: `sgd`, `adam`, `adamw`, a torch optimizer of one of these classes, or what was `Counted` of one. A name
            alone stands, on cuda, for one made with `fused=True`: the multi-tensor step, the default there, makes temporaries
            of all parameters' size.
        device: cuda takes the multi-tensor step by default, cpu the for-loop one.

    Raises:
        CaptureError: an optimizer that memplan does not know.
    """
    if isinstance(optimizer, Counted):
        return optimizer.kept
    name = (optimizer if isinstance(optimizer, str) else type(optimizer).__name__).lower()
    if name not in KNOWN:
        raise CaptureError(f"unknown optimizer {name!r}: memplan counts the state of {', '.join(KNOWN)}")
    states, each, multi, passes = KNOWN[name]
    groups = [] if isinstance(optimizer, str) else optimizer.param_groups
    if name == "sgd" and any(group.get("momentum", 0) for group in groups):
        states, passes = 1, 6
    states += any(group.get("amsgrad") for group in groups)
    if any(group.get("fused") for group in groups) or (isinstance(optimizer, str) and device == "cuda"):
        return Kept(name, states, 0, False, 3 + 2 * states)
    together = any(device == "cuda" if group.get("foreach") is None else group["foreach"] for group in groups)
    most = [temporaries_of(name, multi if together else each, group, together) for group in groups or [{}]]
    return Kept(name, states, max(one for one, _ in most), together, passes, max(left for _, left in most))


def temporaries_of(name: str, plain: int, group: Mapping[str, Any], together: bool) -> tuple[int, int]:
    """Temporaries of a parameter's size with a group's options: while one is updated, and those left until the next.

    Read in torch/optim and measured in tests/planner/test_optimizers.py. The loop's step negates and decays a gradient into new
    tensors and drops the old; the multi-tensor one does each into the same, and Nesterov's step in the gradients themselves.

    Args:
        name: a key of `KNOWN`.
        plain: temporaries without options.
        group: a parameter group.
        together: whether the step is the multi-tensor one.
    """
    maximize = bool(group.get("maximize"))
    decay = bool(group.get("weight_decay")) and name != "adamw" and not group.get("decoupled_weight_decay")
    if together:
        return max(plain, int(maximize or decay)), 0
    later = plain + bool(group.get("nesterov"))
    left = name != "sgd" or (maximize and not decay and not group.get("momentum"))
    return max(maximize + decay, (maximize or decay) + later), int(left)


def state_buffers(states: int, sizes: Mapping[int, int]) -> list[Buffer]:
    """Resident buffers: the first state of every parameter, then the second of every parameter."""
    return [
        Buffer(name=f"state {number} of parameter {index}", bytes=size, kind=Kind.STATE)
        for number in range(states)
        for index, size in enumerate(sizes.values())
    ]


def update_op(
    optimizer: Any, parameters: dict[int, torch.Tensor], gradients: list[int], first: int, device: str
) -> tuple[list[Buffer], Op]:
    """State buffers and the one op that updates everything.

    Args:
        optimizer: as for `kept_by`.
        parameters: buffer -> fake tensor of each parameter that is updated.
        gradients: buffers of gradients.
        first: index of the first new buffer.
        device: as for `kept_by`.

    Raises:
        CaptureError: an optimizer that memplan does not know.
    """
    known = kept_by(optimizer, device)
    sizes = {buffer: tensor.untyped_storage().nbytes() for buffer, tensor in parameters.items()}
    buffers = state_buffers(known.states, sizes)
    total, workspace = sum(sizes.values()), known.workspace(sizes.values())
    mutates = [*parameters, *range(first, first + len(buffers))]
    return buffers, make_op(f"{known.name} step", known, Phase.UPDATE, gradients, mutates, total, workspace)


def rows_of(sizes: Mapping[int, int], when: Mapping[int, int]) -> list[list[int]]:
    """Which parameters are updated together: each by itself, but for small ones.

    Args:
        sizes: parameter's buffer -> bytes.
        when: likewise, when its gradient is complete.
    """
    most = sum(sizes.values()) // PART
    rows = [[buffer] for buffer, size in sizes.items() if size >= SMALL]
    row: list[int] = []
    for buffer in sorted((buffer for buffer, size in sizes.items() if size < SMALL), key=when.__getitem__):
        if not row or len(row) == ROW or sum(map(sizes.__getitem__, row)) + sizes[buffer] > most:
            row = []
            rows.append(row)
        row.append(buffer)
    return rows


def update_ops(
    optimizer: Any, parameters: Mapping[int, int], gradients: Mapping[int, list[int]], names: Mapping[int, str],
    rows: Sequence[Sequence[int]], first: int, device: str,
) -> tuple[list[Buffer], list[Op]]:  # fmt: skip
    """State buffers, and for each row of parameters the op that updates them in backward.

    Args:
        optimizer: as for `kept_by`.
        parameters: buffer -> bytes of each parameter that is updated.
        gradients: for each of them the buffers of its gradients.
        names: of the parameters.
        rows: the parameters' buffers, as `rows_of` has them.
        first: index of the first new buffer.
        device: as for `kept_by`.
    """
    known = kept_by(optimizer, device)
    buffers = state_buffers(known.states, parameters)
    place = {buffer: index for index, buffer in enumerate(parameters)}
    ops = []
    for row in rows:
        states = [first + number * len(parameters) + place[buffer] for number in range(known.states) for buffer in row]
        own, sizes = [*row, *states], [parameters[buffer] for buffer in row]
        reads = sorted({*own, *(gradient for buffer in row for gradient in gradients[buffer])})
        name = f"{known.name} of {names[row[0]]}" + (f" and {len(row) - 1} more" if len(row) > 1 else "")
        ops.append(make_op(name, known, Phase.BACKWARD, reads, own, sum(sizes), known.workspace(sizes)))
    return buffers, ops


def make_op(
    name: str, known: Kept, phase: Phase, reads: list[int], mutates: list[int], size: int, workspace: int
) -> Op:  # fmt: skip
    """An update of parameters of `size` bytes."""
    traffic = size * known.passes
    return Op(
        name=name,
        target=f"optimizer.{known.name}",
        key=json.dumps({"op": f"optimizer.{known.name}", "args": [traffic], "kwargs": {}}),
        phase=phase,
        reads=tuple(sorted(reads)),
        writes=(),
        mutates=tuple(sorted(mutates)),
        repeatable=False,
        flops=float(traffic),
        traffic=traffic,
        workspace=workspace,
    )

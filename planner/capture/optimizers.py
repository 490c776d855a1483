"""What an optimizer keeps, and what its step needs: counted into the program as resident state and update ops.

By default one op updates everything, after the backward pass; the caller runs it. *In backward* there is one op for each
parameter, which the plan runs as soon as the gradient is complete and nobody reads the old value any more, so that gradients
never pile up. Small parameters share ops: what a call of an optimizer costs beside its arithmetic would be most of the time.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ir.errors import CaptureError
from ..ir.names import OPTIMIZERS
from ..ir.plan import Counted, Kept, Made
from ..ir.program import Buffer, Kind, Op, Phase
from ..ir.units import shorten
from .optimizertrial import group_of, steps_alone, try_step

SMALL = 1 << 16  # bytes of a parameter that is updated together with others
ROW = 32  # of them at a time, at most
PART = 64  # and no more than this part of the bytes of all parameters: their gradients wait for one another
# name -> (state tensors per parameter, temporaries per parameter of the for-loop step, of the multi-tensor step, times
# that the for-loop step reads or writes a tensor of the parameter's size). Read in torch/optim: Adam's step makes
# `exp_avg_sq.sqrt()` and the denominator derived from it. What options add is in `temporaries_of`.
NEEDS = {"lbfgs": "needs all parameters at once and calls the model itself", "sparseadam": "takes sparse gradients alone"}
KNOWN = {"sgd": (0, 0, 0, 3), "adam": (2, 2, 1, 18), "adamw": (2, 2, 1, 20)}


class State(NamedTuple):
    """Whose an optimizer's state is: the parameter's buffer, and which of the tensors of its shape; None for other state."""

    parameter: int
    number: int | None


def kept_by(optimizer: Any, device: str, parameters: Mapping[str, torch.Tensor] | None = None) -> Kept:
    """The figures of an optimizer.

    Args:
        optimizer: the name of one of torch's, any torch optimizer, or what was `Counted` of one. A name alone stands for one
            made with torch's defaults; on cuda for one made with `fused=True` where there is that: the multi-tensor step, the
            default there, makes temporaries of all parameters' size.
        device: cuda takes the multi-tensor step by default, cpu the for-loop one.
        parameters: that it updates, by name; not needed for the classes of `KNOWN`.

    Raises:
        CaptureError: an optimizer that memplan does not know, or whose step cannot be tried out.
    """
    if isinstance(optimizer, Counted):
        return optimizer.kept
    name = optimizer_name(optimizer)
    if name not in KNOWN or not (isinstance(optimizer, str) or type(optimizer) is getattr(torch.optim, OPTIMIZERS[name])):
        return tried(optimizer, name, device, parameters or {})
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


def optimizer_name(optimizer: Any) -> str:
    """What to call an optimizer.

    Raises:
        CaptureError: it is none, or holds another that is, or has a name that no optimizer of torch's has.
    """
    if isinstance(optimizer, str):
        name = optimizer.lower()
        if name not in NEEDS and not (name in OPTIMIZERS and hasattr(torch.optim, OPTIMIZERS[name])):
            close = get_close_matches(name, OPTIMIZERS, 1)
            meant = f"do you mean {close[0]!r}? " if close else ""
            raise CaptureError(f"unknown optimizer {shorten(optimizer)}: {meant}The names are {', '.join(OPTIMIZERS)}; or pass "
                               "a torch optimizer itself")  # fmt: skip
        return name
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CaptureError(f"optimizer={shorten(optimizer)}: give the name of one of torch's, or a torch.optim.Optimizer")
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        raise CaptureError(f"{type(optimizer).__name__} wraps another optimizer: pass that one")
    return type(optimizer).__name__.lower()


def tried(optimizer: Any, name: str, device: str, parameters: Mapping[str, torch.Tensor]) -> Kept:
    """The figures of an optimizer by steps of it, one for each shape, type and group of settings that its parameters have.

    Raises:
        CaptureError: it cannot step one parameter by itself.
    """
    if name in NEEDS:
        raise CaptureError(f"{name} {NEEDS[name]}: plan without optimizer=, and leave room for its state")
    if isinstance(optimizer, str):
        held = {key: nn.Parameter(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"))
                for key, value in parameters.items()}  # fmt: skip
        try:
            optimizer = getattr(torch.optim, OPTIMIZERS[name])(list(held.values())) if held else None
        except ValueError as error:
            raise CaptureError(f"optimizer={name!r} does not take this model's parameters: {error}; pass an optimizer that "
                               "holds those that it takes") from None  # fmt: skip
    else:
        held = parameters
    groups = optimizer.param_groups if optimizer is not None else []
    together = any(device == "cuda" if group.get("foreach", False) is None else group.get("foreach", False) for group in groups)
    known: dict[Any, int] = {}
    made: list[Made] = []
    which: dict[str, int] = {}
    for key, value in held.items():
        own = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        index = group_of(optimizer, own)
        kind = value.shape, value.stride(), value.dtype, index
        if kind not in known:
            known[kind] = len(made)
            made.append(try_step(optimizer, own, together))
        which[key] = known[kind]
    states = max((len(each.states) for each in made), default=0)
    return Kept(name, states, 0, together, 0, made=tuple(made), which=which)


def check_alone(optimizer: Any, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse an optimizer that has to see several parameters at once, whose updates can therefore not run in backward.

    Raises:
        CaptureError: it gives a parameter other bits when it steps it by itself.
    """
    if isinstance(optimizer, str | Counted) or optimizer_name(optimizer) in KNOWN:
        return
    held = {name: value for name, value in parameters.items() if isinstance(value, nn.Parameter)}
    kind = type(optimizer).__name__
    try:
        alone = steps_alone(optimizer, held)
    except Exception as error:  # whatever a user's optimizer does to what it does not expect
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CaptureError(f"cannot try out whether {kind} can step a parameter by itself: {reason}; plan without "
                           "optimizer_in_backward") from error  # fmt: skip
    if not alone:
        raise CaptureError(f"{kind} steps a parameter otherwise by itself than beside others, as where it looks at a norm of "
                           "all gradients: plan without optimizer_in_backward")  # fmt: skip


def temporaries_of(name: str, plain: int, group: Mapping[str, Any], together: bool) -> tuple[int, int]:
    """Temporaries of a parameter's size with a group's options: while one is updated, and those left until the next.

    Read in torch/optim and measured in test_optimizers.py. The loop's step negates and decays a gradient into new
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


def state_buffers(known: Kept, names: Mapping[int, str], sizes: Mapping[int, int]) -> tuple[list[Buffer], list[State]]:
    """Resident buffers, and whose each is: the first state of every parameter, then the second, and what has other shapes.

    Args:
        known: the optimizer's figures.
        names: of the parameters, by their buffers.
        sizes: likewise, their bytes.
    """
    buffers: list[Buffer] = []
    whose: list[State] = []
    figures = {buffer: known.made[known.which[name]] for buffer, name in names.items()} if known.made else {}
    for number in range(max([known.states, *(len(each.states) for each in figures.values())])):
        for index, (buffer, size) in enumerate(sizes.items()):
            found = figures[buffer].states[number : number + 1] if figures else (size,)
            buffers += [Buffer(name=f"state {number} of parameter {index}", bytes=each, kind=Kind.STATE) for each in found]
            whose += [State(buffer, number)] * len(found)
    for index, buffer in enumerate(sizes if figures else ()):
        if figures[buffer].others:
            buffers.append(Buffer(name=f"other state of parameter {index}", bytes=figures[buffer].others, kind=Kind.STATE))
            whose.append(State(buffer, None))
    return buffers, whose


def update_op(
    optimizer: Any, parameters: Mapping[int, int], names: Mapping[int, str], gradients: list[int], first: int, device: str
) -> tuple[list[Buffer], Op]:
    """State buffers and the one op that updates everything.

    Args:
        optimizer: as for `kept_by`; an object as what was `Counted` of it.
        parameters: buffer -> bytes of each parameter that is updated.
        names: of the parameters.
        gradients: buffers of gradients.
        first: index of the first new buffer.
        device: as for `kept_by`.

    Raises:
        CaptureError: an optimizer that memplan does not know.
    """
    known = kept_by(optimizer, device)
    buffers, _ = state_buffers(known, names, parameters)
    mutates = [*parameters, *range(first, first + len(buffers))]
    sizes = {names[buffer]: size for buffer, size in parameters.items()}
    return buffers, make_op(f"{known.name} step", known, Phase.UPDATE, gradients, mutates, sizes)


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
) -> tuple[list[Buffer], list[State], list[Op]]:  # fmt: skip
    """State buffers, whose each is, and for each row of parameters the op that updates them in backward.

    Args:
        optimizer: as for `kept_by`; an object as what was `Counted` of it.
        parameters: buffer -> bytes of each parameter that is updated.
        gradients: for each of them the buffers of its gradients.
        names: of the parameters.
        rows: the parameters' buffers, as `rows_of` has them.
        first: index of the first new buffer.
        device: as for `kept_by`.
    """
    known = kept_by(optimizer, device)
    buffers, whose = state_buffers(known, names, parameters)
    states: dict[int, list[int]] = {buffer: [] for buffer in parameters}
    for index, state in enumerate(whose):
        states[state.parameter].append(first + index)
    ops = []
    for row in rows:
        own = [*row, *(state for buffer in row for state in states[buffer])]
        reads = sorted({*own, *(gradient for buffer in row for gradient in gradients[buffer])})
        name = f"{known.name} of {names[row[0]]}" + (f" and {len(row) - 1} more" if len(row) > 1 else "")
        ops.append(make_op(name, known, Phase.BACKWARD, reads, own, {names[buffer]: parameters[buffer] for buffer in row}))
    return buffers, whose, ops


def make_op(name: str, known: Kept, phase: Phase, reads: list[int], mutates: list[int], sizes: Mapping[str, int]) -> Op:
    """An update of parameters, given their names and bytes."""
    traffic = known.traffic_of(sizes)
    return Op(
        name=name,
        target=f"optimizer.{known.name}",
        key=json.dumps({"op": f"optimizer.{known.name}", "args": [traffic], "kwargs": {}}),
        phase=phase,
        reads=tuple(sorted(reads)),
        writes=(),
        mutates=tuple(sorted(mutates)),
        repeatable=False,
        flops=float(traffic) + known.flops_of(sizes),
        traffic=traffic,
        workspace=known.workspace_of(sizes),
    )

"""What an optimizer keeps and allocates, found out by a step of it on tensors without values.

A stand-in of the optimizer, with its class and its settings, steps parameters on `meta`; a dispatch mode counts the storages
that come and go. The optimizer itself, its state and its parameters are not touched.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..ir.errors import CaptureError
from ..ir.plan import Made

STEPS = 3  # of a trial: the first makes the state, and what is made in the second and third only comes to light there
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks")
APART = {"param_groups", "state", *HOOKS}
SMALL = 8  # elements along each dimension, where the values of steps are compared
COMPARED = 6  # steps
REAL = {"capturable": False, "fused": None}  # settings that tensors on meta and on the CPU do without
SCALAR = torch.ops.aten._local_scalar_dense.default


class Watched(TorchDispatchMode):
    """Counts the bytes of storages that calls make, and those that they read and write; a tensor's value is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SCALAR and args[0].device.type == "meta":
            return 1.0 if args[0].dtype.is_floating_point else 1
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tensors_in(found) if tensor.untyped_storage()._cdata not in given]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive or self.alive[storage._cdata][0].expired():
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if not any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns):
            self.traffic += sum(tensor.nbytes for tensor in (*tensors_in((args, kwargs)), *tensors_in(found)))
        self.peak = max(self.peak, self.live())
        return found

    def live(self) -> int:
        """Bytes of what has been made and is still there."""
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments."""
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def stand_in(optimizer: Any, pairs: list[tuple[nn.Parameter, nn.Parameter]], foreach: bool | None) -> Any:
    """An optimizer of the same class and settings that holds others in place of some of its parameters.

    State that there is already, as where the constructor makes it, has stand-ins of zeros; else the first step makes it.

    Args:
        optimizer: any torch optimizer.
        pairs: parameters of its own, and what stands for each.
        foreach: whether the step is the multi-tensor one, where the optimizer leaves that open; None for what it chooses.
    """
    every = [own for group in optimizer.param_groups for own in group["params"]]
    memo: dict[int, Any] = {id(own): torch.empty_like(own, device="meta") for own in every}
    memo |= {id(own): other for own, other in pairs}
    alone = memo[id(optimizer)] = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():
        if key not in APART:
            alone.__dict__[key] = copy.deepcopy(value, memo)
    alone.__dict__ |= {hooks: OrderedDict() for hooks in HOOKS} | {"state": defaultdict(dict)}
    alone.param_groups = []
    for group in optimizer.param_groups:
        mine = [other for own, other in pairs if any(own is value for value in group["params"])]
        settings = {key: copy.deepcopy(value, memo) for key, value in group.items() if key != "params"}
        settings |= {key: value for key, value in REAL.items() if key in settings}
        if settings.get("foreach", 0) is None and foreach is not None:
            settings["foreach"] = foreach
        for own, other in pairs:
            if optimizer.state.get(own):
                alone.state[other] = {key: state_like(value, own, other, memo) for key, value in optimizer.state[own].items()}
        if mine:
            alone.param_groups.append(settings | {"params": mine})
    return alone


def state_like(value: Any, own: torch.Tensor, other: torch.Tensor, memo: dict[int, Any]) -> Any:
    """What stands for an entry of a parameter's state; a tensor is of the other's shape where it was of its own."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return copy.deepcopy(value, memo)
    shape = other.shape if value.shape == own.shape else value.shape
    return torch.zeros(shape, dtype=value.dtype, device=other.device)


def try_step(optimizer: Any, own: nn.Parameter, foreach: bool | None) -> Made:
    """The figures of one of an optimizer's parameters.

    Raises:
        CaptureError: the optimizer cannot step it alone.
    """
    kind = type(optimizer).__name__
    try:
        one = step_of(optimizer, [own], foreach)
        two = step_of(optimizer, [own, own], foreach)
    except Exception as error:  # whatever a user's optimizer does to what it does not expect
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CaptureError(f"cannot try out a step of {kind} on a parameter of shape {list(own.shape)}: {reason}; plan without "
                           "optimizer=, and leave room for its state") from error  # fmt: skip
    alike, others, peak, traffic, flops = one
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return Made(alike, others, 0 if fused else peak, 0 if fused else max(0, two[2] - peak), traffic, flops)


def step_of(
    optimizer: Any, own: list[nn.Parameter], foreach: bool | None
) -> tuple[tuple[int, ...], int, int, int, float]:  # fmt: skip
    """Steps of some parameters on meta: state of their shape and of others, most temporaries, bytes moved and FLOPs of one."""
    with torch.no_grad():
        others = [nn.Parameter(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"))
                  for value in own]  # fmt: skip
    alone = stand_in(optimizer, [*zip(own, others, strict=True)][:1], foreach)
    group = alone.param_groups[0]
    group["params"] = others
    for other in others[1:]:  # where the constructor makes state, as Adagrad's does before torch 2.12
        known = optimizer.state.get(own[0], {})
        alone.state[other] |= {key: state_like(value, own[0], other, {}) for key, value in known.items()}
    peak = traffic = state = 0
    counter = FlopCounterMode(display=False)
    with Watched() as watched, counter:
        for _ in range(STEPS):
            for other in others:
                other.grad = torch.empty_like(other)
                watched.alive.pop(other.grad.untyped_storage()._cdata, None)
            watched.peak, watched.traffic = watched.live(), 0
            counter.flop_counts.clear()
            type(alone).step(alone)
            state = watched.live()
            peak, traffic = max(peak, watched.peak - state), watched.traffic
            for other in others:
                other.grad = None
    held = list(tensors_in(list(alone.state.values())))
    mine = [value for value in tensors_in(list(alone.state[others[0]].values())) if value.dim()]
    alike = tuple(value.nbytes for value in mine if value.shape == others[0].shape)
    hidden = max(0, state - sum(value.nbytes for value in held)) // len(own)  # what lies in none of the state's tensors
    rest = sum(value.nbytes for value in mine) - sum(alike) + hidden
    return alike, rest, peak, traffic, float(counter.get_total_flops())


def steps_alone(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a step of one parameter by itself gives the bits that a step of several gives, on small tensors."""
    chosen = list({(value.dim(), group_of(optimizer, value)): value for value in parameters.values()}.values())[:6]
    chosen = chosen if len(chosen) > 1 else list(parameters.values())[:2]
    together, apart = (small_steps(optimizer, chosen, rows) for rows in ([chosen], [[value] for value in chosen]))
    return all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


def small_steps(optimizer: Any, own: list[nn.Parameter], rows: list[list[nn.Parameter]]) -> list[torch.Tensor]:
    """What becomes of small stand-ins of parameters that are stepped in rows."""
    random = torch.Generator().manual_seed(0)
    shapes = {id(value): [min(size, SMALL) for size in value.shape] for value in own}
    others = {key: nn.Parameter(torch.randn(shape, generator=random)) for key, shape in shapes.items()}
    steppers = [stand_in(optimizer, [(value, others[id(value)]) for value in row], None) for row in rows]
    with torch.random.fork_rng(devices=[]):  # the user's generator is not to notice
        for _ in range(COMPARED):
            for key, other in others.items():
                size = 10.0 ** float(torch.randn((), generator=random) * 2)  # norms that differ widely, and from step to step
                other.grad = torch.randn(shapes[key], generator=random) * size
            for stepper in steppers:
                type(stepper).step(stepper)
    return [other.detach() for other in others.values()]


def group_of(optimizer: Any, value: torch.Tensor) -> int:
    """The index of a parameter's group."""
    return next(index for index, group in enumerate(optimizer.param_groups) if any(value is own for own in group["params"]))

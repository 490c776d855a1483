"""The arguments of `plan` and its kin, checked before anything is traced."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import msgspec

from ..ir.errors import CaptureError, MemplanError
from ..ir.machine import Machine
from ..ir.schedule import LEVERS
from ..ir.units import parse_bytes, shorten

if TYPE_CHECKING:
    from ..capture.observers import Observation

SEEDS = 2**31  # random generators take no larger ones, and some count on from the seed
SOME = 2**40  # bytes that a percentage is of while the peak is not known
Progress = Callable[[str, float], None]


def levers_of(allow: Iterable[str] | None, strategy: str | None) -> Iterable[str] | None:
    """The levers that may be used: all that there are for a strategy, where nothing is said."""
    return LEVERS if strategy is not None and allow is None else allow


def check_asked(
    budget: int | str | None, host_budget: int | str | None, arena: bool, lend_gradients: bool, strategy: str | None
) -> None:
    """Refuse, before anything is traced, budgets that cannot be read and arguments that contradict each other.

    Raises:
        BudgetError: a budget is no size.
        MemplanError: which arguments.
    """
    if budget is not None:
        parse_bytes(budget, of=SOME)
    if host_budget is not None:
        host_bytes(host_budget, SOME)
    if strategy not in (None, "memo"):
        raise MemplanError(f"strategy={strategy!r}: it is 'memo' or None")
    if strategy and arena:
        raise MemplanError("strategy='memo' has no addresses: plan without arena")
    if lend_gradients and not arena:
        raise MemplanError("lend_gradients=True lends gradients that lie in an arena: plan with arena=True")


def check_calls(calls: Any, accumulate: bool, train: bool, arena: bool, strategy: str | None, in_backward: bool) -> None:
    """Refuse what does not go with several calls, or with gradients that are there.

    Raises:
        MemplanError: which.
    """
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise MemplanError(f"calls={shorten(calls)}: give how many calls come before one backward pass, 1 or more")
    if not accumulate and calls == 1:
        return
    asked = f"calls={calls}" if calls > 1 else "accumulate=True"
    if not train:
        raise MemplanError(f"{asked} is of training: an inference makes no gradients")
    if in_backward:
        raise MemplanError(f"{asked} does not go with optimizer_in_backward=True, for gradients that are there live until the "
                           "update all the same: plan without it, and call optimizer.step()")  # fmt: skip
    for name, given in (("arena=True", arena), ("strategy='memo'", strategy)):
        if given:
            raise MemplanError(f"{asked} does not go with {name}: plan without it")


def check_hooks(observed: Iterable["Observation"], arena: bool, in_backward: bool, away: bool) -> None:
    """Refuse a step in which hooks that look on would see, or keep, what is not theirs to see.

    Args:
        observed: their calls.
        arena: whether tensors have addresses, which others have after them.
        in_backward: whether parameters are updated in the backward pass.
        away: whether parameters may lie in another tier between their uses.

    Raises:
        MemplanError: which hook, and what to leave out.
    """
    for row in observed:
        if arena:
            raise MemplanError(f"{row.whose.told} may keep what it is shown, over which an arena writes other values: plan "
                               "without arena, or remove the hook")  # fmt: skip
        if away:
            raise MemplanError(f"{row.whose.told} may look at a parameter that offload has moved away: plan without offload, "
                               "or remove the hook")  # fmt: skip
        if in_backward and row.whose.late:
            raise MemplanError(f"{row.whose.told} may look at a parameter, which optimizer_in_backward=True has updated "
                               "already: plan without, or remove the hook")  # fmt: skip


def check_dynamic(levers: Iterable[str], lend_gradients: bool, optimizer_in_backward: bool) -> None:
    """Refuse, where sizes vary, what holds for one shape alone.

    Raises:
        MemplanError: which argument.
    """
    given = {"allow='offload'": "offload" in levers, "lend_gradients": lend_gradients,
             "optimizer_in_backward": optimizer_in_backward}  # fmt: skip
    for name, asked in given.items():
        if asked:
            raise MemplanError(f"{name} holds for one shape alone, and dynamic= is for many: leave one of them out")


def check_sizes(arena: bool, strategy: str | None, accumulate: bool, calls: int, reserved: int) -> None:
    """Refuse what does not go with sizes that vary.

    Raises:
        MemplanError: which.
    """
    for name, given in (("arena=True", arena), (f"strategy={strategy!r}", strategy), ("accumulate=True", accumulate),
                        (f"calls={calls}", calls > 1), ("reserved=", reserved)):  # fmt: skip
        if given:
            raise MemplanError(f"dynamic_shapes does not go with {name}: leave one out, or use memplan.within")


def arguments_of(model: Any, args: tuple, kwargs: Mapping[str, Any] | None) -> list[str]:
    """The names of a call's arguments, in their order: those given by position, then by name."""
    names = [name for name in inspect.signature(type(model).forward).parameters][1:]
    return [*names[: len(args)], *(kwargs or {})]


def check_numbers(time_limit: Any, seed: Any) -> None:
    """Refuse a time limit or a seed that is none.

    Raises:
        MemplanError: which, and what it is to be.
    """
    if not isinstance(time_limit, Real) or isinstance(time_limit, bool) or not float(time_limit) >= 0:
        raise MemplanError(f"time_limit={time_limit!r}: give seconds, 0 or more")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < SEEDS:
        raise MemplanError(f"seed={shorten(seed)}: give a whole number from 0 to 2^31 - 1")


def check_model(model: Any, kwargs: Any) -> None:
    """Refuse what is no model, or cannot be its keyword arguments.

    Raises:
        CaptureError: what it is instead.
        MemplanError: likewise.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise CaptureError(f"plan needs an nn.Module, not a {type(model).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise MemplanError(f"kwargs={shorten(kwargs)}: give a dict of the model's keyword arguments")


def host_bytes(budget: int | str, capacity: int) -> int:
    """Bytes that may be used in a tier behind the device."""
    return parse_bytes(budget, of=capacity, what="host budget", whole="tier")


def limit_tiers(machine: Machine, budget: int | str | None) -> Machine:
    """The machine with no more than a number of bytes in each tier behind the first."""
    if budget is None:
        return machine
    rest = [msgspec.structs.replace(tier, capacity=min(tier.capacity, host_bytes(budget, tier.capacity)))
            for tier in machine.tiers[1:]]  # fmt: skip
    return msgspec.structs.replace(machine, tiers=(machine.tiers[0], *rest))


def traced_device(machine: Machine | None) -> str | None:
    """The device type to trace for: the machine's, where this process has one; None for where the model is.

    Without a CUDA device torch cannot choose CUDA's attention kernels; cpu's stand in for them, whose saved tensors have
    the same shapes.
    """
    if machine is None or machine.device != "cuda":
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

"""Parameters and optimizer state whose home is another tier: on the device they have memory only while the step needs them.

The tensors stay the caller's own objects; it is their memory that comes and goes. Between steps such a tensor is *away*: it
has its shape, every element reads as not-a-number (as the smallest number, where its type has no other), and it cannot be
written in place. `state_dict` of the model or the optimizer brings everything back first, and so do an evaluation and planning
anew; the next planned step sends it home again. `bring_back` does it on demand.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from ...planner.capture.graph import Traced
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine
from ...planner.ir.schedule import Schedule
from ..tiers.moving import make_tier, new_tensor
from .token import Token, Turn

AWAY = "a forward pass of this planned step waits for its backward pass, for which its parameters are fetched and sent away: "\
       "run that first, or drop its outputs"  # fmt: skip


class Absence(NamedTuple):
    """What is known of a tensor that is away.

    Attributes:
        holder: a weak reference to the `Homes` that has its contents.
        size: bytes of its storage.
        offset: where it begins there, in elements.
        stride: in elements.
    """

    holder: Any
    size: int
    offset: int
    stride: tuple[int, ...]


HOOKED: Any = WeakIdKeyDictionary()  # model -> a weak reference to the `Homes` that its hooks are of
ABSENT: Any = WeakIdKeyDictionary()  # tensor that is away, or was -> its `Absence`


class Homes:
    """The homes of one model's parameters and of the state that an optimizer keeps for them.

    Attributes:
        tiers: the memories, by the machine's number.
        turn: one step at a time may fetch and send away.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, traced: Traced, schedule: Schedule, machine: Machine
    ):  # fmt: skip
        self.optimizer = optimizer
        self.states = traced.states
        self.named = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {
            buffer: self.named[traced.sources[traced.base[buffer]].name]
            for buffer, _ in schedule.homes
            if buffer not in self.states
        }
        self.tier_of = dict(schedule.homes)
        self.offset: dict[int, int] = {}
        ends = dict.fromkeys(self.tier_of.values(), 0)
        for buffer, tier in schedule.homes:
            alignment = machine.tiers[tier].alignment
            self.offset[buffer] = -(-ends[tier] // alignment) * alignment
            ends[tier] = self.offset[buffer] + traced.program.buffers[buffer].bytes
        self.tiers = {tier: make_tier(machine, tier, size) for tier, size in ends.items()}
        self.visits = {tier: memory.open() for tier, memory in self.tiers.items()}
        self.turn = Turn(AWAY)
        self.model = model
        self.hooks: list[Any] = []

    def claim(self) -> Token:
        """Take them for one step."""
        return self.turn.claim()

    def hook(self) -> None:
        """From now on whoever saves or loads finds everything in its place, and the model keeps what has the contents."""
        if self.hooks:
            return
        HOOKED[self.model] = weakref.ref(self)
        self.hooks.append(self.model.register_state_dict_pre_hook(lambda *_: self.restore()))
        # the public one dies with the unplanned model
        self.hooks.append(self.model._register_load_state_dict_pre_hook(lambda *_: self.restore()))
        if self.optimizer is not None:
            self.hooks.append(self.optimizer.register_state_dict_pre_hook(lambda *_: self.restore()))

    def unhook(self) -> None:
        """Another has taken over what is to be saved: the model keeps this one, its files or pinned memory, no longer."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def tensor(self, buffer: int) -> torch.Tensor | None:
        """The caller's tensor; None for state that the optimizer has not made yet."""
        if buffer in self.parameters:
            return self.parameters[buffer]
        name, number = self.states[buffer]
        assert self.optimizer is not None
        value = self.named[name]
        kept = [each for each in self.optimizer.state.get(value, {}).values()
                if isinstance(each, torch.Tensor) and each.shape == value.shape]  # fmt: skip
        return kept[number] if number < len(kept) else None

    def begin(self) -> None:
        """A step starts: what is on the device goes home.

        Raises:
            MemplanError: it cannot be copied, or another tensor shares its memory, which would stay.
        """
        self.settle()
        tensors = {buffer: value for buffer in self.tier_of if (value := self.tensor(buffer)) is not None}
        before = HOOKED.get(self.model, lambda: None)()
        for other in {*map(holder_of, filter(is_away, tensors.values())), *([before] if before else [])} - {self}:
            other.restore()
            other.unhook()
        self.hook()
        here = [buffer for buffer, value in tensors.items() if not is_away(value)]
        for buffer in here:
            self.store(buffer)
        held = []
        for buffer in here:
            self.wait(buffer)
            memory = StorageWeakRef(tensors[buffer].untyped_storage())
            self.release(buffer)
            if not memory.expired():
                held.append(buffer)
        for buffer in held:
            self.fetch(buffer)
            self.wait(buffer)
        if held:
            names = {id(value): name for name, value in reversed(self.named.items())}  # the first, of a tied one
            name = names.get(id(tensors[held[0]]), "state of the optimizer")
            raise MemplanError(f"the memory of {name} ({len(held)} in all) is held by another tensor, so that sending it "
                               "away would free nothing: drop views, .data and .detach(), or plan without offload")  # fmt: skip

    def settle(self) -> None:
        """Bring what a step that failed has left to an end: what was not read in full is still away."""
        for visit in self.visits.values():
            for buffer in visit.settle():
                self.leave(buffer)

    def fetch(self, buffer: int) -> None:
        """Start: memory for a tensor, and a copy into it."""
        value = self.tensor(buffer)
        if value is None or not is_away(value):
            return
        known = ABSENT[value]
        value.data = new_tensor(value.device, known.size, value.dtype, known.offset, tuple(value.shape), known.stride)
        visit = self.visits[self.tier_of[buffer]]
        try:
            visit.start(buffer, visit.get(self.offset[buffer], value))
        except MemplanError:
            self.leave(buffer)
            raise

    def store(self, buffer: int) -> None:
        """Start: a copy of a tensor to its home."""
        value = self.tensor(buffer)
        if value is not None:
            visit = self.visits[self.tier_of[buffer]]
            visit.start(buffer, visit.put(self.offset[buffer], value))

    def wait(self, buffer: int) -> None:
        """Wait for the copy that was started.

        Raises:
            MemplanError: it failed; a tensor that was to be read is still away.
        """
        visit = self.visits[self.tier_of[buffer]]
        job = visit.started.get(buffer)
        if job is None:
            return
        try:
            visit.wait(buffer)
        except MemplanError:
            if job.way == "in":
                self.leave(buffer)
            raise

    def release(self, buffer: int) -> None:
        """Free: take a tensor's memory."""
        value = self.tensor(buffer)
        if value is not None:
            size, offset = value.untyped_storage().nbytes(), int(value.storage_offset())
            ABSENT[value] = Absence(weakref.ref(self), size, offset, value.stride())
            self.leave(buffer)

    def leave(self, buffer: int) -> None:
        """From here on a tensor is away."""
        value = self.tensor(buffer)
        assert value is not None
        floating = value.dtype.is_floating_point or value.dtype.is_complex
        blank = float("nan") if floating else torch.iinfo(value.dtype).min
        value.data = torch.full((), blank, dtype=value.dtype, device=value.device).expand(value.shape)

    def restore(self) -> None:
        """Bring everything back to the device.

        Raises:
            MemplanError: it cannot be copied.
        """
        bring_back(value for value in map(self.tensor, self.tier_of) if value is not None)


def bring_back(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors that are at home elsewhere their memory and contents back, until the next planned step.

    Args:
        tensors: parameters of a model, say; those that have never left are left alone.

    Raises:
        MemplanError: they cannot be copied, or are gone with the model that was planned.
    """
    left = [value for value in tensors if value in ABSENT]  # some may be on their way back
    wanted = {id(value) for value in left}
    having = [value for value in left if is_away(value) or ABSENT[value].holder()]
    holders = {id(holder): holder for holder in map(holder_of, having)}
    for holder in holders.values():
        holder.settle()
        for buffer in holder.tier_of:
            if id(holder.tensor(buffer)) in wanted:
                holder.fetch(buffer)
                holder.wait(buffer)


def holder_of(value: torch.Tensor) -> Homes:
    """Who has the contents of a tensor that is away.

    Raises:
        MemplanError: nobody, for the model and the optimizer that it was planned with are gone.
    """
    holder = ABSENT[value].holder()
    if holder is None:
        raise MemplanError("a parameter's contents are gone with the model that was planned: keep the model, or call "
                           "memplan.bring_back on its parameters first")  # fmt: skip
    return holder


def is_away(value: torch.Tensor) -> bool:
    """Whether a tensor has no memory of its own now, for its contents are elsewhere."""
    return value.numel() > 1 and not any(value.stride()) and value in ABSENT  # the cheap question first: every call asks it


def absence_of(value: torch.Tensor) -> Absence | None:
    """What is known of a tensor that is away; None of one that is here."""
    return ABSENT[value] if is_away(value) else None

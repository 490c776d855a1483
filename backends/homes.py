"""Parameters and optimizer state whose home is another tier: on the device they have memory only while the step needs them.

The tensors stay the caller's own objects; it is their storages that are emptied and filled. Between steps such a tensor has a
shape and no memory. `state_dict` of the model or the optimizer brings everything back first, and so does an evaluation; the
next planned step sends it home again. `bring_back` does it on demand.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..planner.errors import MemplanError
from ..planner.graph import Traced
from ..planner.machine import Machine
from ..planner.schedule import Schedule
from .moving import make_tier
from .turn import Token, Turn

AWAY = "a forward pass of this planned step waits for its backward pass, for which its parameters are fetched and sent away: "\
       "run that first, or drop its outputs"  # fmt: skip
HOLDERS: Any = WeakIdKeyDictionary()  # tensor without memory -> a weak reference to the `Homes` that has its contents


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
        self.hook(model, optimizer)

    def claim(self) -> Token:
        """Take them for one step."""
        return self.turn.claim()

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Whoever saves or loads finds everything in its place."""
        model.register_state_dict_pre_hook(lambda *_: self.restore())
        model._register_load_state_dict_pre_hook(lambda *_: self.restore())  # the public one dies with the unplanned model
        if optimizer is not None:
            optimizer.register_state_dict_pre_hook(lambda *_: self.restore())

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
            MemplanError: it cannot be copied.
        """
        sent = []
        for buffer in self.tier_of:
            value = self.tensor(buffer)
            if value is not None and is_empty(value) and holder_of(value) is not self:
                bring_back([value])
            if value is not None and not is_empty(value):
                self.store(buffer)
                sent.append(buffer)
        for buffer in sent:
            self.wait(buffer)
            self.release(buffer)

    def fetch(self, buffer: int) -> None:
        """Start: memory for a tensor, and a copy into it."""
        value = self.tensor(buffer)
        if value is None or not is_empty(value):
            return
        storage = value.untyped_storage()
        storage.resize_(bytes_needed(value))
        visit = self.visits[self.tier_of[buffer]]
        visit.start(buffer, visit.get(self.offset[buffer], value))

    def store(self, buffer: int) -> None:
        """Start: a copy of a tensor to its home."""
        value = self.tensor(buffer)
        if value is not None:
            visit = self.visits[self.tier_of[buffer]]
            visit.start(buffer, visit.put(self.offset[buffer], value))

    def wait(self, buffer: int) -> None:
        """Wait for the copy that was started."""
        visit = self.visits[self.tier_of[buffer]]
        if buffer in visit.started:
            visit.wait(buffer)

    def release(self, buffer: int) -> None:
        """Free: take a tensor's memory."""
        value = self.tensor(buffer)
        if value is not None:
            if not value.untyped_storage().resizable():  # memory of somebody else, a file's mapping or numpy's
                value.data = value.data.clone()
            value.untyped_storage().resize_(0)
            HOLDERS[value] = weakref.ref(self)

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
    left = [value for value in tensors if is_empty(value) or value in HOLDERS]  # some may be on their way back
    wanted = {id(value) for value in left}
    holders = {id(holder): holder for holder in (holder_of(value) for value in left if is_empty(value) or HOLDERS[value]())}
    for holder in holders.values():
        for buffer in holder.tier_of:
            if id(holder.tensor(buffer)) in wanted:
                holder.fetch(buffer)
                holder.wait(buffer)


def holder_of(value: torch.Tensor) -> Homes:
    """Who has the contents of a tensor without memory.

    Raises:
        MemplanError: nobody, for the model and the optimizer that it was planned with are gone.
    """
    held = HOLDERS.get(value)
    holder = held() if held is not None else None
    if holder is None:
        raise MemplanError("a parameter's contents are gone with the model that was planned: keep the model, or call "
                           "memplan.bring_back on its parameters first")  # fmt: skip
    return holder


def is_empty(value: torch.Tensor) -> bool:
    """Whether a tensor has no memory, though it has elements."""
    return value.numel() > 0 and value.untyped_storage().nbytes() == 0


def bytes_needed(value: torch.Tensor) -> int:
    """The size of a storage that just holds a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return int(value.storage_offset() + last + 1) * value.element_size()

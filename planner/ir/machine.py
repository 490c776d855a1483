"""`Machine`: memory tiers, the units that compute on them, the links between them. Read from TOML.

    Machine = Tier* Unit* Link*

The first tier is where resident buffers live and what a budget limits. Presets are files in `planner/machines`,
each figure with its source beside it.
"""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import msgspec

from .errors import MachineError

PRESETS = Path(__file__).parent / "machines"
LOCAL = ("local", "local-cpu", "local-cuda")


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A memory.

    Attributes:
        capacity: bytes.
        bandwidth: bytes per second that a unit reads or writes it at.
        rounding: the allocator hands out multiples of this many bytes.
        alignment: planned addresses are multiples of this.
    """

    name: str
    capacity: int
    bandwidth: float
    rounding: int = 1
    alignment: int = 1


class Unit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that computes.

    Attributes:
        tier: the memory that it reads and writes.
        flops: peak rate for each element type, in floating-point operations per second; `default` for the rest.
        launch: seconds that any op takes at least.
        efficiency: the share of the peak rate that large matrix products reach.
    """

    name: str
    tier: str
    flops: Mapping[str, float]
    launch: float = 0.0
    efficiency: float = 1.0


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A one-way FIFO queue of copies between two tiers.

    Attributes:
        source: name of the tier copied from.
        target: name of the tier copied to.
        bandwidth: bytes per second.
        latency: seconds per copy.
        load: seconds of the computing units' time that each second of copying costs: 0 for an engine of its own, more where
            the same cores copy.
        duplex: the share of the bandwidth that is left while a copy goes the other way: 1 where the two directions do not
            touch, 0.5 where they share one bus.
    """

    source: str
    target: str
    bandwidth: float
    latency: float = 0.0
    load: float = 0.0
    duplex: float = 1.0


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What a program runs on. `device` is the torch device type that it stands for."""

    name: str
    device: str
    tiers: tuple[Tier, ...]
    units: tuple[Unit, ...]
    links: tuple[Link, ...] = ()

    def tier_index(self, name: str) -> int:
        """The index of the tier of that name."""
        for index, tier in enumerate(self.tiers):
            if tier.name == name:
                return index
        raise MachineError(f"machine {self.name} has no tier {name!r}; it has {[tier.name for tier in self.tiers]}")

    @cached_property
    def opposite(self) -> tuple[int | None, ...]:
        """For each link the fastest one between the same tiers the other way; None where there is none."""
        by_rate = sorted(range(len(self.links)), key=lambda index: -self.links[index].bandwidth)
        ends = [(link.source, link.target) for link in self.links]
        return tuple(next((index for index in by_rate if ends[index] == (target, source)), None) for source, target in ends)

    def rate_beside(self, link: int) -> float:
        """The share of its rate that a later copy has while one the other way, which keeps its time, is under way."""
        back = self.opposite[link]
        return 1.0 if back is None else max(0.0, self.links[link].duplex + self.links[back].duplex - 1)

    def arrival(self, link: int, size: int, clock: float, free: Sequence[float]) -> float:
        """When a copy that is put into a link's queue now has ended.

        A link carries one copy at a time, first come, first served. While the link the other way is busy both are slower, by
        their `duplex`; the copy that was queued first keeps the time it was given, and the later one bears what both lose.

        Args:
            link: index of the link.
            size: bytes.
            clock: seconds, now.
            free: for each link when what is in its queue has ended.
        """
        known, back = self.links[link], self.opposite[link]
        begin, seconds = max(clock, free[link]) + known.latency, size / known.bandwidth
        if back is None or free[back] <= begin:
            return begin + seconds
        busy, rate = free[back] - begin, self.rate_beside(link)
        return begin + seconds + (1 - rate) * (busy if seconds >= rate * busy else seconds / rate)

    def verify(self) -> None:
        """Check that capacities and rates are positive and that names refer to something.

        Raises:
            MachineError: what is wrong.
        """
        if not self.tiers or not self.units:
            raise MachineError(f"machine {self.name} needs at least one tier and one unit")
        names = [tier.name for tier in self.tiers]
        for tier in self.tiers:
            if names.count(tier.name) > 1:
                raise MachineError(f"machine {self.name} has two tiers called {tier.name!r}")
            if not all(map(positive, (tier.capacity, tier.bandwidth, tier.rounding, tier.alignment))):
                raise MachineError(f"tier {tier.name} of {self.name}: every figure must be positive")
        for unit in self.units:
            self.tier_index(unit.tier)
            if "default" not in unit.flops or not all(map(positive, unit.flops.values())) or not 0 < unit.efficiency <= 1:
                raise MachineError(f"unit {unit.name} of {self.name}: needs positive flops with a 'default'")
            if not 0 <= unit.launch < float("inf"):
                raise MachineError(f"unit {unit.name} of {self.name}: launch must be at least 0")
        for link in self.links:
            self.tier_index(link.source)
            self.tier_index(link.target)
            costs = all(0 <= figure < float("inf") for figure in (link.latency, link.load))
            if not positive(link.bandwidth) or not costs or not 0 < link.duplex <= 1:
                raise MachineError(
                    f"link {link.source}->{link.target} of {self.name}: bandwidth must be positive, latency and load at least "
                    "0, duplex above 0 and at most 1"
                )


def positive(figure: float) -> bool:
    """Whether it is above 0 and a number at all."""
    return 0 < figure < float("inf")


def preset_names() -> list[str]:
    """The names that `load_machine` knows without a path."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def named_machine(asked: "str | Machine | None") -> "Machine | None":
    """The machine that a user names, or None for this host's own.

    Raises:
        MachineError: as `load_machine`.
    """
    if asked is None or (isinstance(asked, str) and asked in LOCAL):
        return None
    if not isinstance(asked, str | Machine):
        raise MachineError(f"machine={asked!r}: give a preset's name, a TOML path or a Machine")
    return asked if isinstance(asked, Machine) else load_machine(asked)


def load_machine(name: str) -> Machine:
    """A machine by preset name or TOML path.

    Raises:
        MachineError: no such preset or file, or one that cannot be read as a machine.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join([*LOCAL, *preset_names()])
        raise MachineError(f"no machine {name!r}: give a TOML path or one of {known}")
    try:
        machine = msgspec.convert(tomllib.loads(path.read_text()), Machine)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise MachineError(f"{path} is not a machine description: {error}") from None
    machine.verify()
    return machine

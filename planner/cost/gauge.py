"""How fast the machine is now, against the fastest that it has been seen, whatever the reason.

Waits for a core show in counters (`watch`). What else slows a machine does not: neighbours that take memory bandwidth or
caches, a processor that has become hot, a hypervisor that gives less. So two fixed pieces of work, a product of matrices and
a copy, are timed before, between and after whatever is measured. Their times are kept beside every figure, as they were; so
figures of a slow hour are known for such as soon as a faster one has been seen, even if that is the next day.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from .cache import cache_directory, file_name, locked, write_atomically
from .watch import Watch

ROWS = {"cpu": 512, "cuda": 4096}  # and columns of the matrices
BYTES = {"cpu": 32 << 20, "cuda": 64 << 20}  # of the copy: more than a core's own caches hold
RUNS = 5  # of each work in a reading
LONGEST = 0.06  # seconds for either, once one run has been undisturbed; twice as long until then
KEPT = 6  # of the fastest readings ever
SLOW = 1.25  # times the best: what was timed then is not believed; 10 to 20 % come and go by themselves
BETTER = 1.1  # times as fast as then: worth timing again
MOST = 100  # times the work of the fixed pieces in the same time: nothing is so fast


class Reading(NamedTuple):
    """How fast the machine was at some time.

    Attributes:
        when: seconds since 1970.
        product: seconds that the product of matrices took; 0 where that is not known.
        copy: the same of the copy.
        disturbed: whether other work held the cores during every run.
    """

    when: int
    product: float = 0.0
    copy: float = 0.0
    disturbed: bool = False


def read_pace(device: str = "cpu") -> Reading:
    """How fast the machine is now; takes some 50 ms on a CPU, several times as long beside other work."""
    import torch

    now = int(time.time())
    try:
        matrix = torch.ones(ROWS[device], ROWS[device], device=device)
        source = torch.ones(BYTES[device], dtype=torch.uint8, device=device)
    except (RuntimeError, KeyError):  # no memory for it now, or no such device
        return Reading(now)
    product, target = torch.empty_like(matrix), torch.empty_like(source)
    found = [usual(work, device) for work in (lambda: torch.mm(matrix, matrix, out=product), lambda: target.copy_(source))]
    return Reading(now, found[0][0], found[1][0], found[0][1] or found[1][1])


def usual(work: Callable[[], object], device: str) -> tuple[float, bool]:
    """The median time of runs that nothing disturbed, and whether there were none: then the least time of all."""
    good: list[float] = []
    bad: list[float] = []
    timed(work, device)  # finds its memory
    start = time.monotonic()
    while len(good) < RUNS and (time.monotonic() - start < LONGEST * (1 if good else 2) or not (good or bad)):
        with Watch() as watch:
            took = timed(work, device)
        (bad if watch.disturbed else good).append(took)
    return (median(good), False) if good else (min(bad), True)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    work()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begin


def worse(one: Reading | None, other: Reading | None) -> Reading | None:
    """The slower of two readings, part by part: what is known of a time between them."""
    if one is None or other is None:
        return one or other
    return Reading(other.when, max(one.product, other.product), max(one.copy, other.copy), one.disturbed or other.disturbed)


class Fastest(msgspec.Struct, frozen=True):
    """The fastest readings of a device, ascending, as its file has them."""

    device: str
    product: tuple[float, ...] = ()
    copy: tuple[float, ...] = ()


class Reference:
    """The fastest that a device has been seen.

    The least but one of all readings counts, so that a single one that cannot be does no harm; where there is one only, that.
    """

    def __init__(self, device: str | None, directory: Path | None = None):
        """Open the device's file; one that is missing or makes no sense is empty, and None has none."""
        self.path = None if device is None else (directory or cache_directory()) / file_name("pace", device)
        self.fastest = Fastest(device or "")
        self.merge(self.read())

    def read(self) -> Fastest:
        """What the file has."""
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if self.path is None:
                return self.fastest
            found = msgspec.json.decode(self.path.read_bytes(), type=Fastest)
            if found.device == self.fastest.device:
                return found
        return Fastest(self.fastest.device)

    def merge(self, other: Fastest) -> None:
        """Take the fastest of both."""
        own = self.fastest
        self.fastest = Fastest(own.device, least(own.product + other.product), least(own.copy + other.copy))

    def add(self, readings: Iterable[Reading | None]) -> None:
        """Take what was read now. Each reading is to be added once."""
        known = [reading for reading in readings if reading is not None and not reading.disturbed]
        product, copy = (tuple(each) for each in ([r.product for r in known], [r.copy for r in known]))
        self.merge(Fastest(self.fastest.device, product, copy))
        self.save()

    def save(self) -> None:
        """Write the file; where that fails, what is known is this process's alone."""
        if self.path is None:
            return
        with suppress(OSError), locked(self.path):
            own, there = self.fastest, self.read()
            product = least((*own.product, *(value for value in there.product if value not in own.product)))
            copy = least((*own.copy, *(value for value in there.copy if value not in own.copy)))
            self.fastest = Fastest(own.device, product, copy)
            write_atomically(self.path, msgspec.json.encode(self.fastest))

    def forget(self) -> None:
        """Start anew: the machine may be another one than it was."""
        self.fastest = Fastest(self.fastest.device)
        with suppress(OSError):
            if self.path is not None:
                self.path.unlink()

    def slowness(self, reading: Reading | None) -> float:
        """How many times as long as at its best the machine took then; 1 where that is not known."""
        if reading is None:
            return 1.0
        pairs = (reading.product, best_of(self.fastest.product)), (reading.copy, best_of(self.fastest.copy))
        return max([1.0, *(now / best for now, best in pairs if now > 0 and best > 0)])

    def doubts(self, reading: Reading | None) -> bool:
        """Whether what was timed then is not to be believed."""
        return reading is not None and (reading.disturbed or self.slowness(reading) > SLOW)

    def is_better(self, now: Reading, then: Reading | None, disturbed: bool = False) -> bool:
        """Whether it is worth timing again now what was timed then.

        Args:
            now: as it is.
            then: as it was.
            disturbed: whether what was timed then is known to have been in other work's way.
        """
        disturbed |= then is not None and then.disturbed
        if now.disturbed:
            return False
        return disturbed or self.slowness(now) * BETTER <= self.slowness(then)


def best_of(fastest: tuple[float, ...]) -> float:
    """The least but one; 0 where there is none."""
    return fastest[min(1, len(fastest) - 1)] if fastest else 0.0


def least(values: Iterable[float]) -> tuple[float, ...]:
    """The smallest values that say something, ascending."""
    return tuple(sorted(value for value in values if 0 < value < float("inf"))[:KEPT])


def is_possible(seconds: float, flops: float, traffic: float, reading: Reading | None, device: str) -> bool:
    """Whether a machine that was so fast can have done so much work in that time, by a wide margin."""
    if reading is None or not 0 < seconds < float("inf") or min(reading.product, reading.copy) <= 0:
        return seconds > 0
    rate, bandwidth = 2 * ROWS[device] ** 3 / reading.product, 2 * BYTES[device] / reading.copy
    return seconds * MOST * rate >= flops and seconds * MOST * bandwidth >= traffic

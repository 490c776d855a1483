"""Where a planned step puts activations that the device has no room for, and fetches them from: what all tiers share.

A *tier* is kept with the planned module and serves many steps. Each step, forward and backward, pays it a *visit*: `size`
bytes of its own, in which every offset is planned, so that nothing is searched for and nothing fragments. A copy is a *job*:
it is started, runs beside the computation, and is waited for where its result is needed. `filetier` copies between the
CPU's memory and a disk, `pinnedtier` between a GPU's memory and the host's.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch

from ...planner.ir.errors import MemplanError

Way = Literal["out", "in"]  # away from the device, and back

# For counting and for starting threads, everywhere; held for moments, and by whoever forks, so that no child inherits it taken.
LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


@dataclass
class Traffic:
    """What has moved one way since the counts were last reset.

    Attributes:
        bytes: of the copies that are complete.
        busy: seconds spent copying.
        stalled: seconds that steps waited for copies.
        copies: how many are complete.
    """

    bytes: int = 0
    busy: float = 0.0
    stalled: float = 0.0
    copies: int = 0

    def add(self, *, bytes: int = 0, busy: float = 0.0, stalled: float = 0.0, copies: int = 0) -> None:
        """Count more, from any thread."""
        with LOCK:
            self.bytes += bytes
            self.busy += busy
            self.stalled += stalled
            self.copies += copies

    def reset(self) -> None:
        """Count from zero again."""
        with LOCK:
            self.bytes, self.busy, self.stalled, self.copies = 0, 0.0, 0.0, 0


class Job(ABC):
    """A copy that was started. Until it is complete it holds the tensor's memory, no longer.

    Attributes:
        way: `out` or `in`.
        begin: the first byte in the tier.
        end: one past the last.
        seconds: that copying took, once it is complete.
        stalled: seconds that callers spent in `wait`.
    """

    def __init__(self, way: Way, begin: int, end: int, traffic: Traffic):
        self.way: Way = way
        self.begin, self.end = begin, end
        self.traffic = traffic
        self.seconds = self.stalled = 0.0

    @property
    def bytes(self) -> int:
        """How many are copied."""
        return self.end - self.begin

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the copy has ended, well or not."""

    @abstractmethod
    def wait(self) -> None:
        """Return when what comes next may rely on the copy.

        Raises:
            MemplanError: it failed, or its visit was closed first.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Give the copy up; from here on it writes into no tensor. Called by finalizers: takes no lock and raises nothing."""


class Space:
    """Bytes of a tier that one visit at a time has.

    Attributes:
        jobs: copies that may still be under way, for the visit that has the space or for one that had it.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    @property
    def usable(self) -> bool:
        """Whether this process can still copy to and from it."""
        return True


class Visit:
    """A step's stay in a tier, used by one thread at a time. Dropping it closes it.

    What a tensor given to `put` or `get` stands for is its whole storage, whatever its layout, except that a flat contiguous
    tensor of bytes stands for just those: a piece of an arena, say.

    Attributes:
        failure: why a copy failed; every later `put` and `get` raises the same, until `settle`.
    """

    def __init__(self, tier: "Tier", space: Space):
        self.tier = tier
        self.space = space
        self.failure: str | None = None
        self.closed = False
        self.started: dict[int, Job] = {}

    def put(self, offset: int, tensor: torch.Tensor) -> Job:
        """Start copying the tensor to the bytes from `offset` on. Until that is done, nothing may be written to the tensor.

        Raises:
            MemplanError: they lie outside the tier, the visit is closed, or a copy of it has failed.
        """
        return self.copy("out", offset, tensor)

    def get(self, offset: int, tensor: torch.Tensor) -> Job:
        """Start filling the tensor from the bytes from `offset` on, with what was put there before, waited for or not.

        Raises:
            MemplanError: as `put`.
        """
        return self.copy("in", offset, tensor)

    def start(self, buffer: int, job: Job) -> None:
        """Keep a job under the number of the buffer that it moves."""
        self.started[buffer] = job

    def wait(self, buffer: int) -> None:
        """Wait for the job that was kept under a number.

        Raises:
            MemplanError: as `Job.wait`.
        """
        self.started.pop(buffer).wait()

    def settle(self) -> list[int]:
        """Wait for all that was started, well or not, and let copies be made again. Returns what could not be read."""
        failed = []
        for buffer, job in self.started.items():
            try:
                job.wait()
            except MemplanError:
                failed += [buffer] if job.way == "in" else []
        self.started.clear()
        self.failure = None
        return failed

    def copy(self, way: Way, offset: int, tensor: torch.Tensor) -> Job:
        """Start a job behind the unfinished ones that touch the same bytes, unless both only read them."""
        place = bytes_of(tensor)
        end = offset + place.numel()
        if self.closed:
            raise MemplanError("this step has given its offloaded tensors up: call the model again")
        if not 0 <= offset <= end <= self.tier.size:
            raise MemplanError(f"a step was to copy bytes {offset} to {end} of a tier of {self.tier.size} bytes: "
                               "the tier was made for another plan, apply the plan again")  # fmt: skip
        if self.failure is not None:
            raise MemplanError(self.failure)
        space = self.space
        space.jobs = [job for job in space.jobs if not job.finished]
        after = [job for job in space.jobs if "out" in (job.way, way) and job.begin < end and offset < job.end]
        job = self.tier.copy(self, way, offset, place, after)
        space.jobs.append(job)
        return job

    def close(self) -> None:
        """Give the space back. Copies under way are cancelled, and the next visit's wait for what is left of them."""
        if self.closed:
            return
        self.closed = True
        for job in self.space.jobs:
            job.cancel()
        if self.failure is None:
            self.tier.free.append(self.space)
        else:
            self.tier.spaces.discard(self.space)

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter is going down, and part of what is needed has gone
            pass


class Tier(ABC):
    """Memory behind the device. Several visits may be open at once, each in a space of its own; spaces are used again.

    Attributes:
        size: bytes that one step needs here.
        spaces: all there are, so that none goes when a visit does, in whatever order a collector takes them.
        free: those that no visit has. The first is made with the tier, so that lack of room shows before the first step.
    """

    def __init__(self, size: int):
        self.size = size
        self.counts: dict[Way, Traffic] = {"out": Traffic(), "in": Traffic()}
        self.spaces: set[Space] = {self.make()}
        self.free: deque[Space] = deque(self.spaces)

    def __deepcopy__(self, memo: dict) -> "Tier":
        return self  # copies of a planned module may share it: each step has a space of its own

    def open(self) -> Visit:
        """Space for one step, forward and backward.

        Raises:
            MemplanError: there is no room for it.
        """
        while self.free:
            try:
                space = self.free.pop()
            except IndexError:  # another thread was quicker
                break
            if space.usable:
                return Visit(self, space)
            self.spaces.discard(space)
        space = self.make()
        self.spaces.add(space)
        return Visit(self, space)

    @property
    def traffic(self) -> dict[Way, Traffic]:
        """What has moved `out` and `in`; the counts go on."""
        return self.counts

    def reset(self) -> None:
        """Count traffic from zero again."""
        for counts in self.traffic.values():
            counts.reset()

    @abstractmethod
    def make(self) -> Space:
        """A new space of `size` bytes.

        Raises:
            MemplanError: there is no room for it.
        """

    @abstractmethod
    def copy(self, visit: Visit, way: Way, offset: int, place: torch.Tensor, after: list[Job]) -> Job:
        """Start a copy that begins when those of `after` have ended; the bytes of `place` are known to fit at `offset`."""


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """What `Visit` says that a tensor stands for, as a flat tensor of bytes."""
    if tensor.dtype is torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous():
        return tensor.detach()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

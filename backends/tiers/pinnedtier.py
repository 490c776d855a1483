"""A tier in the host's memory, for tensors on a GPU.

Copies run on two streams beside the computation, one a way. Waiting for one makes the current stream wait; the host does
not. A job holds its tensor until then: what is freed after that, and given out again, is used behind the copy. So
`record_stream` is not needed, and is not called, for with it the allocator keeps a freed block until the host sees that the
copy is over: more memory than was planned.
"""

import os
import warnings
from collections import deque
from contextlib import suppress
from typing import Any

import torch

from ...planner.ir.errors import MemplanError
from ...planner.ir.units import show_bytes
from .store import Job, Space, Tier, Traffic, Visit, Way

DEVICE = "cuda"


class PinnedTier(Tier):
    """Page-locked bytes, exactly as many as planned: torch's own pinned allocator rounds up to powers of two.

    Traffic is counted when somebody asks for it, as far as the GPU has come: a stall is the time that the computing stream
    waited.
    """

    def __init__(self, size: int):
        """Make room for one step.

        Args:
            size: bytes of one step.

        Raises:
            MemplanError: there is no GPU, or not so much memory.
        """
        if not torch.cuda.is_available():
            raise MemplanError("tensors were to be offloaded from a GPU, and there is none here: plan for this machine")
        self.streams: dict[tuple[Way, torch.device], torch.cuda.Stream] = {}
        self.intervals: deque[Interval] = deque()
        super().__init__(size)

    def make(self) -> "Pinned":
        """New bytes of the host's memory."""
        return Pinned(self.size)

    def open(self) -> Visit:
        """Space for one step, forward and backward."""
        self.collect()
        return super().open()

    @property
    def traffic(self) -> dict[Way, Traffic]:
        """What has moved `out` and `in`, as far as the GPU has come."""
        self.collect()
        return self.counts

    def collect(self) -> None:
        """Count the intervals that are over."""
        for _ in range(len(self.intervals)):
            with suppress(IndexError):  # another thread was quicker
                interval = self.intervals.popleft()
                if not interval.count():
                    self.intervals.append(interval)

    def copy(self, visit: Visit, way: Way, offset: int, place: torch.Tensor, after: list[Job]) -> "PinnedJob":
        """Queue a copy on the stream of its way, behind what the current stream has been given so far.

        Raises:
            MemplanError: the tensor is not on a GPU.
        """
        device = place.device
        if device.type != DEVICE:
            raise MemplanError(f"a tensor on {device} cannot be offloaded to pinned memory: plan for the device it is on")
        assert isinstance(visit.space, Pinned)
        host = visit.space.memory[offset : offset + place.numel()]
        compute = torch.cuda.current_stream(device)
        if (way, device) not in self.streams:
            self.streams[way, device] = torch.cuda.Stream(device)
        side = self.streams[way, device]
        job = PinnedJob(self, way, offset, place, compute)
        side.wait_stream(compute)
        for other in after:
            assert isinstance(other, PinnedJob)
            side.wait_event(other.copied)
        target, source = (host, place) if way == "out" else (place, host)
        with torch.cuda.stream(side):
            began = mark(side)
            target.copy_(source, non_blocking=True)
            job.copied.record(side)
        self.intervals.append(Interval(job, began, job.copied))
        return job


class PinnedJob(Job):
    """A copy between a GPU and pinned memory; `seconds` and `stalled` are known once the tier's traffic has been read."""

    def __init__(self, tier: PinnedTier, way: Way, offset: int, place: torch.Tensor, compute: torch.cuda.Stream):
        super().__init__(way, offset, offset + place.numel(), tier.counts[way])
        self.intervals = tier.intervals
        self.place: torch.Tensor | None = place
        self.compute = compute
        self.copied = torch.cuda.Event(enable_timing=True)
        self.awaited = False

    @property
    def finished(self) -> bool:
        """Whether the copy is complete, or all that will be asked of the device comes behind it."""
        over = self.awaited or self.copied.query()
        if over:
            self.place = None
        return over

    def wait(self) -> None:
        """Make the current stream wait for the copy."""
        if not self.finished:
            stream = torch.cuda.current_stream(self.compute.device)
            began = mark(stream)
            stream.wait_event(self.copied)
            self.intervals.append(Interval(self, began, mark(stream), stall=True))
        self.place, self.awaited = None, True

    def cancel(self) -> None:
        """Make the stream that asked for the copy wait for it: it cannot be called back."""
        if self.place is not None and not self.finished:
            self.compute.wait_event(self.copied)
        self.place = None


class Interval:
    """Time between two events, for a job's books."""

    def __init__(self, job: PinnedJob, began: torch.cuda.Event, ended: torch.cuda.Event, stall: bool = False):
        self.job, self.began, self.ended, self.stall = job, began, ended, stall

    def count(self) -> bool:
        """Enter it if it is over, and say whether it was."""
        if not self.ended.query():
            return False
        job, seconds = self.job, self.began.elapsed_time(self.ended) / 1e3
        if self.stall:
            job.stalled += seconds
            job.traffic.add(stalled=seconds)
        else:
            job.seconds = seconds
            job.traffic.add(bytes=job.bytes, busy=seconds, copies=1)
        return True


class Pinned(Space):
    """Page-locked bytes of the host's memory, or pageable ones, with a warning, where the system locks no more."""

    def __init__(self, size: int):
        super().__init__()
        self.locked = False
        self.process = os.getpid()
        try:
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            raise MemplanError(f"cannot allocate {show_bytes(size)} of the host's memory for offloaded tensors: "
                               "plan with a larger budget, or free memory") from None  # fmt: skip
        if size:
            self.locked = int(cudart().cudaHostRegister(self.memory.data_ptr(), size, 0)) == 0
            if not self.locked:
                with suppress(RuntimeError):  # the next kernel would report the refusal as its own
                    torch.ones(1, device=DEVICE)
                warnings.warn(f"{show_bytes(size)} for offloaded tensors could not be page-locked: copies will be slow and "
                              "hold the computation up; raise the limit (ulimit -l) or free memory", stacklevel=2)  # fmt: skip

    @property
    def usable(self) -> bool:
        """Whether this process made it: a child that was forked cannot use the GPU."""
        return self.process == os.getpid()

    def __del__(self) -> None:
        try:
            if self.locked and self.usable:
                torch.cuda.synchronize()  # copies may be under way of which no job is left
                cudart().cudaHostUnregister(self.memory.data_ptr())
        except Exception:  # the interpreter is going down; the memory goes with it
            pass


def cudart() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The moment when a stream gets here."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event

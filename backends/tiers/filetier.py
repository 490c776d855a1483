"""A tier on a disk, for tensors in the CPU's memory.

I/O is buffered: tensors are not aligned as direct I/O wants them. What is written lies in the page cache for a while, and
is charged to the process's control group, so the kernel is asked to write each chunk to the disk now: a clean page is given
up the moment that memory is short, a dirty one would have to be waited for. What was read back is left in the cache, for
the next step writes to the same pages.
"""

import ctypes
import errno
import os
import queue
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from ...planner.cost.disk import named_directory
from ...planner.ir.errors import MemplanError
from ...planner.ir.units import show_bytes
from .spacefile import ANOTHER_DISK, NO_ROOM, File
from .store import LOCK, Job, Tier, Traffic, Visit, Way

CHUNK = 4 << 20  # bytes copied at a time; between chunks a job can be cancelled
PATIENCE = 1.0  # seconds after which a waiting thread looks whether the copying one still lives
POLL = 1e-3  # seconds
CLOSED = "the copy was cancelled, for its step gave its offloaded tensors up: call the model again"
DIED = "the thread that copies offloaded tensors has died, perhaps because the process was forked in the middle of a step: "\
       "call the model again"  # fmt: skip
FORKED = "this step began before the process was forked, and what it offloaded is the parent's: call the model again here"


class FileTier(Tier):
    """Files in one directory, a thread that writes and a thread that reads; both start with the first copy.

    Attributes:
        directory: where the files are. Made, for its owner alone, where it does not exist.
    """

    def __init__(self, size: int, directory: str | Path | None = None):
        """Make room for one step.

        Args:
            size: bytes of one step.
            directory: on a disk; else `$MEMPLAN_OFFLOAD`, else `offload` in the directory of the measurements.

        Raises:
            MemplanError: the directory cannot be written to, lies in memory, or has no room.
        """
        self.directory = Path(directory).absolute() if directory else named_directory()
        self.workers: dict[Way, Worker] = {}
        super().__init__(size)

    def make(self) -> File:
        """A new file."""
        return File(self.directory, self.size)

    def copy(self, visit: Visit, way: Way, offset: int, place: torch.Tensor, after: list[Job]) -> "FileJob":
        """Queue a copy for the thread of its way.

        Raises:
            MemplanError: the tensor is not in the CPU's memory, or the visit is another process's.
        """
        if place.device.type != "cpu":
            raise MemplanError(f"a tensor on {place.device} cannot be offloaded to a disk: plan for the device it is on")
        file = visit.space
        assert isinstance(file, File)
        if not file.usable:
            raise MemplanError(FORKED)
        job = FileJob(visit, file, way, offset, place, after, self.counts[way])
        with LOCK:
            worker = self.workers.get(way)
            if worker is None or not worker.thread.is_alive():
                worker = self.workers[way] = Worker(way)
            job.thread = worker.thread
            worker.queue.put(job)
        return job


class Worker:
    """A thread that runs jobs in the order of their coming, until this object is dropped and the last one is done."""

    def __init__(self, way: Way):
        self.queue: queue.SimpleQueue[FileJob | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=serve, args=(self.queue,), name=f"memplan offload {way}", daemon=True)
        self.thread.start()

    def __del__(self) -> None:
        self.queue.put(None)


def serve(jobs: "queue.SimpleQueue[FileJob | None]") -> None:
    """The life of a worker's thread."""
    while (job := jobs.get()) is not None:
        job.run()
        del job  # or it would be held until the next one comes


class FileJob(Job):
    """A copy between a file and memory."""

    thread: threading.Thread

    def __init__(
        self, visit: Visit, file: File, way: Way, offset: int, place: torch.Tensor, after: list[Job], traffic: Traffic
    ):
        super().__init__(way, offset, offset + place.numel(), traffic)
        self.visit = weakref.ref(visit)
        self.file: File | None = file
        self.place: torch.Tensor | None = place
        self.after = after
        self.done = threading.Event()
        self.running = self.cancelled = False
        self.failure: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the copy has ended, well or not."""
        return self.done.is_set()

    def wait(self) -> None:
        """Return when the copy is complete.

        Raises:
            MemplanError: it failed, its visit was closed first, or the thread that was to do it has died.
        """
        begin = time.perf_counter()
        self.settle()
        took = time.perf_counter() - begin
        self.stalled += took
        self.traffic.add(stalled=took)
        if self.failure is not None:
            raise MemplanError(self.failure)

    def settle(self) -> None:
        """Return when the copy has ended, well or not, or nobody is left to do it."""
        while not self.done.is_set():
            if not self.thread.is_alive() and not self.done.is_set():
                self.fail(DIED)
                self.let_go()
                return
            self.done.wait(PATIENCE)

    def cancel(self) -> None:
        """Stop at the next chunk. A chunk that is being read into a tensor is waited for, unless the wait were for oneself."""
        self.cancelled = True
        while self.running and self.way == "in" and self.thread.is_alive() and self.thread.ident != threading.get_ident():
            time.sleep(POLL)

    def run(self) -> None:
        """Copy, in the worker's thread. What goes wrong is kept for `wait`: the thread has other steps to serve."""
        begin = time.perf_counter()
        try:
            for job in self.after:
                assert isinstance(job, FileJob)
                job.settle()
            self.running = True
            begin = time.perf_counter()
            trouble = self.inherited() or self.transfer()
        except BaseException as error:
            trouble = self.explain(error)
        self.running = False
        if trouble is None:
            self.seconds = time.perf_counter() - begin
            self.traffic.add(bytes=self.bytes, busy=self.seconds, copies=1)
        else:
            self.fail(trouble)
        self.let_go()
        self.done.set()

    def inherited(self) -> str | None:
        """Why an earlier copy of the visit failed."""
        visit = self.visit()
        return visit.failure if visit is not None else None

    def transfer(self) -> str | None:
        """Copy chunk by chunk; what came between, if something did.

        Raises:
            OSError: the disk refused.
        """
        file, place, at = self.file, self.place, self.begin
        assert file is not None
        assert place is not None
        rest = memory_of(place)
        while rest:
            if self.cancelled:
                return CLOSED
            if self.way == "out":
                count = os.pwrite(file.fd, rest[:CHUNK], at)
            else:
                count = os.preadv(file.fd, [rest[:CHUNK]], at)
            if count == 0:
                raise OSError(errno.EIO, f"short {'write' if self.way == 'out' else 'read'} at byte {at}")
            if self.way == "out" and hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # on Linux this begins to write what is dirty, and waits for nothing
                    os.posix_fadvise(file.fd, at, count, os.POSIX_FADV_DONTNEED)
            rest = rest[count:]
            at += count
        return None

    def explain(self, error: BaseException) -> str:
        """One line about what went wrong."""
        what = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        where = self.file.directory if self.file is not None else "a closed file"
        copy = f"{'write' if self.way == 'out' else 'read'} {show_bytes(self.bytes)} of offloaded tensors"
        remedy = ANOTHER_DISK if isinstance(error, OSError) and error.errno in NO_ROOM else \
            "if it comes again, set MEMPLAN_OFFLOAD to a directory on another disk"  # fmt: skip
        return f"cannot {copy} in {where}: {what}: {remedy}"

    def fail(self, trouble: str) -> None:
        """Note a failure, for the visit too if it is still there."""
        self.failure = CLOSED if self.cancelled else trouble
        visit = self.visit()
        if visit is not None and not self.cancelled and visit.failure is None:
            visit.failure = trouble

    def let_go(self) -> None:
        """Hold no memory, no file and no other job any longer."""
        self.file = self.place = None
        self.after = []


def memory_of(place: torch.Tensor) -> memoryview:
    """A flat tensor's bytes, for as long as the tensor is held. A view by numpy would keep its storage from being resized."""
    return memoryview((ctypes.c_ubyte * place.numel()).from_address(place.data_ptr())).cast("B")

"""The disk behind this host's memory: which directory, how many bytes are free, how fast a step's copies are.

Copies are reads and writes of ordinary files, by way of the kernel's cache. They cost processor time and memory bandwidth, so
they are timed while torch's threads are busy, and what they take from those is measured with them; so is what writing and
reading take from one another. What the cache cannot hold waits for the disk itself; the figures leave that out.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

import msgspec

from ..ir.errors import MachineError
from ..ir.units import show_bytes
from .cache import cache_directory

RESERVE = 0.05  # the share of the free bytes that is left free
LENGTH = 256 << 20  # bytes of the file that the probe writes and reads
CHUNK = 4 << 20  # bytes of one call
PROBE_TIME = 1.0  # seconds for computing alone, for each direction, and for both
ROUNDS = 3  # of the whole probe; what else runs on the machine only ever makes one worse
PASSES = 4  # over the file at least: the first also finds memory for the kernel's cache, which later steps reuse
ROWS = 1024  # and columns of the matrices multiplied meanwhile
LENGTH_ADDED = 4 << 20  # elements of the tensors added meanwhile
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "rootfs", "hugetlbfs")  # file systems that are memory themselves


class DiskRates(msgspec.Struct, frozen=True):
    """What a probe measured.

    Attributes:
        write: bytes per second written.
        read: bytes per second read.
        write_load: seconds of computing lost for each second of writing.
        read_load: the same for reading.
        write_duplex: the share of its rate that writing has left while something is read.
        read_duplex: the same for reading while something is written.
    """

    write: float
    read: float
    write_load: float
    read_load: float
    write_duplex: float
    read_duplex: float

    @property
    def sound(self) -> bool:
        """Whether a plan can rest on the figures."""
        return min(self.write, self.read, self.write_duplex, self.read_duplex) > 0

    def better(self, other: "DiskRates") -> "DiskRates":
        """The better of each figure: what disturbs a probe only makes it worse."""
        return DiskRates(
            max(self.write, other.write),
            max(self.read, other.read),
            min(self.write_load, other.write_load),
            min(self.read_load, other.read_load),
            max(self.write_duplex, other.write_duplex),
            max(self.read_duplex, other.read_duplex),
        )


def offload_directory() -> Path:
    """Where a step's files lie: `$MEMPLAN_OFFLOAD`, or `offload` beside the measurements. Made for this user alone.

    Raises:
        MachineError: it cannot be made, or its file system is memory.
    """
    directory = named_directory()
    try:
        directory, kind = made_directory(directory)
    except OSError as error:
        raise MachineError(f"cannot offload to {directory}: {error.strerror}; set MEMPLAN_OFFLOAD") from None
    if kind in IN_MEMORY:
        raise MachineError(f"{directory} is {kind}, which is memory: set MEMPLAN_OFFLOAD to a directory on a disk")
    return directory


def named_directory() -> Path:
    """Where a step's files are to lie, there or not."""
    named = os.environ.get("MEMPLAN_OFFLOAD")
    return Path(named).absolute() if named else cache_directory() / "offload"


def made_directory(directory: Path) -> tuple[Path, str]:
    """A directory, made for this user alone where it is missing, without links; and the type of its file system.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = directory.resolve()
    return directory, system_of(directory)


def system_of(directory: Path) -> str:
    """The type of the file system that a directory lies on; "" where the system does not tell.

    Raises:
        OSError: there is no such directory.
    """
    device = directory.stat().st_dev
    with suppress(OSError):  # not Linux: there is no such list, and hardly a file system that is memory
        return file_system(device, Path("/proc/self/mountinfo").read_text(errors="replace"))
    return ""


def file_system(device: int, mounts: str) -> str:
    """The type of the file system on a device, or "" where the list does not have it.

    Args:
        device: as `st_dev` has it.
        mounts: the text of `/proc/self/mountinfo`; proc_pid_mountinfo(5) has its fields.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2:3] == [number]:
            return source.split()[0]
    return ""


def free_bytes(directory: Path) -> int:
    """Bytes that a step may lay down in the directory: what its file system has free now, less the reserve.

    Raises:
        MachineError: that is less than the probe needs.
    """
    status = os.statvfs(directory)
    free = int((1 - RESERVE) * status.f_bavail * status.f_frsize)
    if free < LENGTH:
        raise MachineError(f"{show_bytes(free)} free for offload in {directory}: set MEMPLAN_OFFLOAD to another directory")
    return free


def probe_disk(directory: Path) -> DiskRates:
    """Write and read a file there that has no name, as a step will: from hot memory, into new memory.

    Raises:
        MachineError: the system refuses.
    """
    import torch

    source = torch.ones(LENGTH, dtype=torch.uint8).numpy().data
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            handle = file.fileno()

            def write() -> None:
                each_chunk(lambda low, high: write_out(handle, source[low:high], low))

            def read() -> None:
                target = torch.empty(LENGTH, dtype=torch.uint8).numpy().data
                each_chunk(lambda low, high: os.preadv(handle, [target[low:high]], low))

            compute = computing()
            found = [beside(compute, write, read) for _ in range(ROUNDS)]
    except OSError as error:
        raise MachineError(f"cannot offload to {directory}: {error.strerror}; set MEMPLAN_OFFLOAD") from None
    (writing, write_load), (reading, read_load), *both = (min(each) for each in zip(*found, strict=True))
    shares = [min(1.0, alone / together) for alone, together in zip((writing, reading), both, strict=True)]
    return DiskRates(LENGTH / writing, LENGTH / reading, write_load, read_load, *shares)


def each_chunk(move: Callable[[int, int], int]) -> None:
    """Move all bytes of the file; `move` is given a range of them and returns how many it moved, from its start on."""
    low = 0
    while low < LENGTH:
        low += move(low, min(low + CHUNK, LENGTH))


def write_out(handle: int, source: memoryview, offset: int) -> int:
    """Write, and have the kernel begin to bring it to the disk, as `backends/tiers/filetier.py` does."""
    count = os.pwrite(handle, source, offset)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, count, os.POSIX_FADV_DONTNEED)
    return count


def computing() -> Callable[[], None]:
    """What torch's threads do meanwhile: a product of matrices, which keeps the cores busy, and a sum, which keeps the memory
    busy."""
    import torch

    matrix, long = torch.ones(ROWS, ROWS), torch.ones(LENGTH_ADDED)
    place = torch.empty_like(long)

    def compute() -> None:
        torch.mm(matrix, matrix)
        torch.add(long, long, out=place)

    return compute


def beside(
    compute: Callable[[], None], write: Callable[[], None], read: Callable[[], None]
) -> tuple[tuple[float, float], tuple[float, float], float, float]:
    """(time, computing lost for each second) of writing and of reading, beside computing; then the times of both at once."""
    alone = usual_time(compute)

    def meanwhile(*actions: Callable[[], None]) -> tuple[list[float], float]:
        with ThreadPoolExecutor(len(actions)) as workers:
            answers = [workers.submit(usual_time, action) for action in actions]
            turns, begin = 0, time.perf_counter()
            while not all(answer.done() for answer in answers):
                compute()
                turns += 1
            took = time.perf_counter() - begin
        return [answer.result() for answer in answers], max(0.0, 1 - alone * turns / took)

    ([writing], write_load), ([reading], read_load) = meanwhile(write), meanwhile(read)
    (writing_too, reading_too), _ = meanwhile(write, read)
    return (writing, write_load), (reading, read_load), writing_too, reading_too


def usual_time(action: Callable[[], object]) -> float:
    """The median of several times, until `PROBE_TIME` is over; the first is left out."""
    start = end = time.perf_counter()
    times: list[float] = []
    while len(times) < PASSES or end - start < PROBE_TIME:
        begin = time.perf_counter()
        action()
        end = time.perf_counter()
        times.append(end - begin)
    return median(times[1:])

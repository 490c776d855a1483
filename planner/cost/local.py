"""The machine at hand, as a `Machine`: what the system says, and what a probe of a second or so finds out.

The probe's figures are kept beside the measurements (`cache.cache_directory`), with how fast the machine was then (`gauge`);
they are taken again only where other work got in the way and the machine is quieter now, and then the better ones count.
Capacities are asked for each time, for limits change. The disk is looked at (`disk`) only where offload is asked for.
"""

import os
import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from ..ir.errors import MachineError
from ..ir.machine import PRESETS, Link, Machine, Tier, Unit, load_machine
from ..ir.units import show_bytes
from .cache import cache_directory, file_name, locked, write_atomically
from .disk import RESERVE, DiskRates, free_bytes, offload_directory, probe_disk
from .gauge import Reading, Reference, read_pace, worse
from .probe import Rates, probe, with_sure
from .workspaces import cublas_bytes

PAGE = 4096  # bytes
DISK_LATENCY = 1e-4  # seconds: estimate of handing a copy to the thread that does it, while torch's threads are busy
CUDA_LATENCY = 1e-5  # seconds: estimate of submitting an asynchronous copy and its event
CPU_ALIGNMENT = 64  # bytes: c10::gAlignment
# Bytes: kMinBlockSize of the caching allocator. Above 1 MiB that holds with expandable segments alone, which
# PYTORCH_ALLOC_CONF=expandable_segments:True sets: without, a block keeps a rest of up to 1 MiB (CUDACachingAllocator.cpp,
# should_split).
CUDA_ROUNDING = 512
# What stays free of a GPU, for capacity is read before the step runs: modules are loaded and libraries set themselves up in the
# first one, cuDNN and cuSOLVER among them, and what the allocator has cut up is not all of use again. Estimates.
CUDA_RESERVE = 0.03  # of the GPU's memory
CUDA_LATER = 1 << 30  # bytes
# Names that drivers report, with the preset whose figures hold for them.
KNOWN_GPUS = {
    "H100 80GB HBM3": "h100-80gb",
    "H200": "h200",
    "A100-SXM4-80GB": "a100-80gb",
    "A800-SXM4-80GB": "a800-80gb",
    "RTX 4090": "rtx4090",
}
# Settings that change how a process gets its memory, and so what an output costs.
ALLOCATOR_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


Figures = TypeVar("Figures", Rates, DiskRates)


class Probed(msgspec.Struct, frozen=True):
    """A probe's file: its figures, and how fast the machine was meanwhile."""

    figures: msgspec.Raw
    reading: Reading


def local_machine(device: str = "cpu", offload: bool = False, again: bool = False) -> Machine:
    """The machine that this process runs on.

    Args:
        device: `cpu`, or `cuda` for the current GPU with this host behind it.
        offload: put the disk behind the CPU's memory; the first time for a directory, that takes a probe of some twelve
            seconds. A GPU has this host behind it anyway.
        again: forget what probes have found before.

    Raises:
        MachineError: there is no such device here, or no disk that files can be laid down on.
    """
    if device == "cpu":
        return local_cpu(offload, again)
    if device == "cuda":
        return local_cuda(again)
    raise MachineError(f"no local machine for device {device!r}: it is 'cpu' or 'cuda'")


def local_cpu(offload: bool = False, again: bool = False) -> Machine:
    """This host, with its disk where offload is asked for.

    Sizes are rounded to pages: resident pages are what a limit on memory counts, and blocks large enough to matter are
    mapped singly. A small block takes less than its page; the error is on the safe side.
    """
    rates = known_rates("cpu", again)
    tiers = [Tier("device", memory_limit(), rates.bandwidth, rounding=PAGE, alignment=CPU_ALIGNMENT)]
    links = []
    if offload:
        directory = offload_directory()
        capacity = free_bytes(directory)
        disk = kept("disk", f"{device_key()}, {directory}", DiskRates, lambda: probe_disk(directory), "cpu", again)
        tiers.append(Tier("disk", capacity, min(disk.write, disk.read), rounding=PAGE, alignment=PAGE))
        links = [
            Link("device", "disk", disk.write, DISK_LATENCY, disk.write_load, disk.write_duplex),
            Link("disk", "device", disk.read, DISK_LATENCY, disk.read_load, disk.read_duplex),
        ]
    unit = Unit("cores", "device", rates.flops, launch=rates.launch)
    machine = Machine("local-cpu", "cpu", tuple(tiers), (unit,), tuple(links))
    machine.verify()
    return machine


def local_cuda(again: bool = False) -> Machine:
    """The current GPU, with this host's memory behind it."""
    import torch

    if not torch.cuda.is_available():
        raise MachineError("no GPU here that torch can use; name a preset instead, such as h100-80gb")
    capacity = gpu_room()
    name = torch.cuda.get_device_name()
    rates = known_rates("cuda", again)
    preset = next((preset for known, preset in KNOWN_GPUS.items() if known in name), None)
    if preset is not None and (PRESETS / f"{preset}.toml").is_file():
        known = load_machine(preset)
        bandwidth, unit = known.tiers[0].bandwidth, known.units[0]
    else:
        bandwidth, unit = rates.bandwidth, Unit("sm", "device", rates.flops, launch=rates.launch)
    tiers = (
        Tier("device", capacity, bandwidth, rounding=CUDA_ROUNDING, alignment=CUDA_ROUNDING),
        Tier("host", host_room(), known_rates("cpu").bandwidth, rounding=PAGE, alignment=PAGE),
    )
    ways = ("device", "host", rates.link), ("host", "device", rates.back)
    links = tuple(Link(*way, latency=CUDA_LATENCY, duplex=rates.duplex) for way in ways)
    machine = Machine("local-cuda", "cuda", tiers, (unit,), links)
    machine.verify()
    return machine


def device_key(device: str = "cpu", threads: int | None = None) -> str:
    """What measurements hold for: the processor, the threads, torch's version, and the allocator's settings.

    Args:
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; default: as many as in this process.
    """
    import torch

    parts = [torch.cuda.get_device_name()] if device == "cuda" else [cpu_name()]
    if device == "cpu":
        parts.append(f"{threads or torch.get_num_threads()} threads")
    parts.append(f"torch {metadata.version('torch')}")
    parts += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ALLOCATOR_SETTINGS)]
    return ", ".join(parts)


def cpu_name() -> str:
    """The processor as the system names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Memory


def gpu_room() -> int:
    """Bytes of the current GPU that a step may use, beside what libraries take.

    What torch has reserved in this process counts as free, for a step can use it again.

    Raises:
        MachineError: there are none.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    kept = int(CUDA_RESERVE * total) + CUDA_LATER + cublas_bytes(torch.cuda.get_device_capability()[0])
    room = free + torch.cuda.memory_reserved() - kept
    if room <= 0:
        raise MachineError(f"{show_bytes(free)} free on {torch.cuda.get_device_name()}, and {show_bytes(kept)} are left to "
                           "libraries: end what else uses it, or name a preset, such as h100-80gb")  # fmt: skip
    return room


def host_room() -> int:
    """Bytes of this host's memory that a GPU's step may lock: what is available now, less the reserve."""
    return int((1 - RESERVE) * min(memory_limit(), memory_available()))


def memory_available() -> float:
    """Bytes that the host has left without swapping; infinity where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float("inf")


def memory_limit() -> int:
    """Bytes of memory that this process may use: what the host has, or its control group's limit if that is less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([pages, *control_group_limits(Path("/sys/fs/cgroup"))])


def control_group_limits(root: Path) -> list[int]:
    """The limits of this process's control group and those above it, in both versions of the interface."""
    limits = []
    group = ""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                group = path.strip("/")
    own = Path(group)
    for folder in (own, *own.parents):
        for name in ("memory.max", "memory.limit_in_bytes"):
            for top in (root, root / "memory"):
                with suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int((top / folder / name).read_text()))
    return [limit for limit in limits if limit > 0]


# Rates


def known_rates(device: str, again: bool = False) -> Rates:
    """The probe's figures for the device."""
    return kept("rates", device_key(device), Rates, lambda: probe(device), device, again)


def kept(
    prefix: str, key: str, kind: type[Figures], measure: Callable[[], Figures], device: str, again: bool = False
) -> Figures:
    """Figures of a kind for what the key names: read, or else measured and kept.

    Where other work got in the way of what is kept, or the machine was slow then, and neither is so now, they are measured
    again; of each figure the better one counts.

    Args:
        prefix: of the file's name.
        key: what the figures hold for.
        kind: of figures.
        measure: finds them.
        device: whose pace tells what they are worth.
        again: whatever is kept, measure and keep that instead.
    """
    path, reference = cache_directory() / file_name(prefix, key), Reference(device_key(device))
    before = None if again else read_probed(path, kind)
    if before is not None and not reference.doubts(before[1]):
        return before[0]
    begun = read_pace(device)
    if before is not None and not reference.is_better(begun, before[1]):
        return believed(before[0], device)
    figures = measure()
    ended = read_pace(device)
    reference.add([begun, ended])
    reading = worse(begun, ended) or ended
    if before is not None:
        figures = before[0].better(figures)  # pyright: ignore[reportArgumentType]
        # begun in quiet, it is believed: a processor grows hot by the probe itself, and a disk goes on writing after it
        reading = min(before[1], reading, begun, key=lambda each: (each.disturbed, reference.slowness(each)))
    try:
        with locked(path):
            write_atomically(path, msgspec.json.encode(Probed(msgspec.Raw(msgspec.json.encode(figures)), reading)))
    except OSError as error:
        warnings.warn(f"cannot keep what was measured in {path}: {error.strerror}", stacklevel=2)
    return believed(figures, device) if reference.doubts(reading) else figures


def believed(figures: Figures, device: str) -> Figures:
    """What is believed of figures that other work got in the way of."""
    return with_sure(figures, device) if isinstance(figures, Rates) else figures


def doubts_rates(device: str) -> bool:
    """Whether other work got in the way of the probe whose rates `local_machine` has."""
    key = device_key(device)
    found = read_probed(cache_directory() / file_name("rates", key), Rates)
    return found is not None and Reference(key).doubts(found[1])


def read_probed(path: Path, kind: type[Figures]) -> tuple[Figures, Reading] | None:
    """What a probe's file has; None where it has nothing that a plan can rest on, or does not say how fast the machine was."""
    with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        file = msgspec.json.decode(path.read_bytes(), type=Probed)
        figures = msgspec.json.decode(file.figures, type=kind)
        if figures.sound:
            return figures, file.reading
    return None

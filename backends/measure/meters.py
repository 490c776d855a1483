"""What a call takes: seconds, and bytes of workspace beside its inputs and results."""

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from ...planner.cost.watch import Watch
from ..eager.calls import Call, storages

KEY_BUDGET = 0.15  # seconds for the repetitions of one key
MOST_REPEATS = 15
PATIENCE = 4  # times as many seconds and repetitions, where other work gets in the way
PASSING = 64  # times the operands' bytes that pass through the caches between two runs: in a step, that of the ops between
MOST_PASSING = 128 << 20
# Bytes written on a GPU before a call that is timed: 0.1 (H200) to 0.6 ms (RTX 4090), so that the host is done with calling an
# operator before the device is ready for it, and the time is the kernels' own. It is more than any second-level cache holds.
HEAD_START = 512 << 20
TRIALS = 3  # of the workspace, of which the least counts: the kernel's counters lag
NOISE = 64 * 1024  # bytes below which a resident-set difference says nothing
MMAP_THRESHOLD = 65536  # blocks from this size on are mapped and unmapped singly, so that the resident set follows them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def seconds_of(call: Callable[[], Any], repeats: int, device: str, operands: int = 0) -> tuple[float, bool]:
    """The time of one call, its outputs allocated and freed each time as in a step; and whether all runs were disturbed.

    In between, other bytes pass through the caches: `operands` says how many the call's own have. Runs during which a
    thread had to wait for a core do not count, if there are others; their median does.
    """
    once = timed_on_cuda if device == "cuda" else partial(timed_on_cpu, passing=min(PASSING * operands, MOST_PASSING))
    once(call)
    good: list[float] = []
    bad: list[float] = []
    spent, least = 0.0, 1
    while len(good) < least or (len(good) < MOST_REPEATS and spent < KEY_BUDGET / 2):
        if bad and (len(bad) >= PATIENCE * MOST_REPEATS or spent > PATIENCE * KEY_BUDGET):
            break
        with Watch() as watch:
            took = once(call)
        (bad if watch.disturbed else good).append(took)
        spent += max(took, watch.seconds)
        least = repeats if took * repeats <= KEY_BUDGET else min(repeats, 2)
    return (median(good), False) if good else (min(bad), True)


def timed_on_cpu(call: Callable[[], Any], passing: int = 0) -> float:
    if passing:
        other_bytes()[:passing].add_(1)
    begin = time.perf_counter()
    result = call()
    del result  # giving the pages back is part of what an output costs
    return time.perf_counter() - begin


@cache
def other_bytes() -> Any:
    """What passes through the caches between two runs."""
    import torch

    return torch.zeros(MOST_PASSING, dtype=torch.uint8)


def timed_on_cuda(call: Callable[[], Any]) -> float:
    import torch

    head_start().zero_()  # and the inputs are as cold as a step finds them
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def head_start() -> Any:
    """What a GPU writes before a call that is timed."""
    import torch

    return torch.empty(HEAD_START, dtype=torch.uint8, device="cuda")


def workspace_of(call: Call, device: str) -> int:
    """Bytes live at the call's highest point beside its inputs and outputs."""
    if device == "cuda":
        extra = cuda_extra
    elif can_reset_peak():
        extra = resident_extra
    else:
        extra = allocator_extra
    inputs = call.inputs
    extra(call, inputs)  # a library's own buffers come into being with the first call, and stay: `cublas_bytes` counts those
    begin = time.perf_counter()
    least = extra(call, inputs)
    for _ in range(TRIALS - 1):
        if least < NOISE or time.perf_counter() - begin > KEY_BUDGET or device == "cuda":
            break
        least = min(least, extra(call, inputs))
    return least if least >= NOISE or device == "cuda" else 0


def resident_extra(call: Callable[[], Any], inputs: set[int]) -> int:
    """From the high-water mark of the resident set, which sees the memory of oneDNN and MKL as well."""
    trim()
    before = resident()
    reset_peak()
    result = call()
    return max(0, highest() - before - output_bytes(result, inputs))


def allocator_extra(call: Callable[[], Any], inputs: set[int]) -> int:
    """From torch's allocator alone, for systems whose resident set cannot be followed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events: list[Any] = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return max(0, peak - output_bytes(result, inputs))


def cuda_extra(call: Callable[[], Any], inputs: set[int]) -> int:
    """From the caching allocator's peak."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    made = sum(-(-size // 512) * 512 for size in output_storages(result, inputs).values())
    return max(0, torch.cuda.max_memory_allocated() - before - made)


def output_storages(result: Any, inputs: set[int]) -> dict[int, int]:
    """Address and bytes of each storage that the call made; views of inputs are not among them."""
    return {found.data_ptr(): found.nbytes() for found in storages(result) if found.data_ptr() not in inputs}


def output_bytes(result: Any, inputs: set[int]) -> int:
    """Bytes of the storages that the call made."""
    return sum(output_storages(result, inputs).values())


# A GPU's allocator

EXPANDABLE = "expandable_segments:True"
CUDA_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the first is deprecated, and still counts


def cuda_environment() -> dict[str, str]:
    """Variables for a process with a GPU: segments that grow, without which a block above 1 MiB takes up to 1 MiB more.

    Plans count blocks in steps of 512 bytes (`planner.cost.local.CUDA_ROUNDING`). Empty where the user has set the allocator.
    """
    return {} if any(name in os.environ for name in CUDA_SETTINGS) else {"PYTORCH_ALLOC_CONF": EXPANDABLE}


# The resident set (Linux)


def can_reset_peak() -> bool:
    """Whether this process may reset its high-water mark."""
    try:
        reset_peak()
        return resident() > 0 and highest() > 0
    except OSError:
        return False


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """The most bytes resident since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM")


def return_memory_at_once() -> None:
    """Make glibc's malloc map large blocks singly, so that what is freed leaves the resident set."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD)


def fill_heap() -> None:
    """Take, for good, what the heap has free in pieces as large as those that are mapped singly.

    malloc gives such pieces out before it maps fresh pages, and they are resident already: a tensor in them would not show,
    and a page that it leaves behind in them would show as if it were needed. Tracing leaves some 15 MiB of them.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for function in (libc.malloc, libc.sbrk):
            function.restype = ctypes.c_void_p
        libc.malloc.argtypes, libc.sbrk.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t], [ctypes.c_void_p]
        end = libc.sbrk(0)
        while (piece := libc.malloc(MMAP_THRESHOLD)) is not None and piece + MMAP_THRESHOLD <= end:
            pass
        libc.free(piece)


def trim() -> None:
    """Give free heap pages back to the system: memory that is reused would not show."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

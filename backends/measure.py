"""What an op takes on the device at hand: seconds and workspace, found by running it.

The work happens in a fresh process (`python -m memplan.backends.measure`), one request a line on its standard input and
one answer a line on its standard output, so that the caller's process neither grows nor dies with a kernel. There are
two such processes, one after the other: the first takes times, with the allocator as the user has it set, the second
workspaces, with an allocator that gives memory back at once.

What accuracy to expect, seen on two cores of an AMD EPYC 7003 with torch 2.13 over one training step of five models
(GPT-2, Llama, BERT, ViT, ResNet-50; 34 to 118 distinct keys each, 4 to 12 s to measure): the medians of the repeated
times add up to 0.97 to 1.06 of what the same ops take inside a step. What is kept is the lower quartile: with other
work on the cores it was within 17 % of the least of 21 runs in one process for 11 of 12 typical ops, where medians
were up to 60 % above. Large ops are mostly within 10 % one by one, some convolutions and random draws within 30 %;
elementwise ops come out at half of their time in a step, for here their inputs are still in the cache; single tensors
above 32 MiB, mapped anew on each call, at up to three times. With `MALLOC_MMAP_THRESHOLD_` set low, page faults
outweigh the arithmetic of all but matrix products, and times vary by a factor of two between runs. Workspaces repeat
within 100 KiB, and are within 5 % of what torch's allocator reports where it sees all of them.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..planner.cost import Figures, Table, measurable, roofline
from ..planner.errors import MemplanError
from ..planner.machine import Machine
from ..planner.program import Program

if TYPE_CHECKING:
    import torch

KEY_BUDGET = 0.15  # seconds for the repetitions of one key
KEY_LIMIT = 30.0  # seconds after which a key is given up and its worker killed
START_LIMIT = 120.0  # seconds for the worker to import torch
MOST_REPEATS = 15
TRIALS = 3  # of the workspace, of which the least counts: the kernel's counters lag
NOISE = 64 * 1024  # bytes below which a resident-set difference says nothing
TIME_SHARE = 0.7  # of a time limit goes to times, the rest to workspaces
BLOCK = 1 << 16  # random elements that fill a tensor over and over
MMAP_THRESHOLD = 65536  # blocks from this size on are mapped and unmapped singly, so that the resident set follows them
GROWN_THRESHOLD = (32 << 20) - 4096  # bytes, just below DEFAULT_MMAP_THRESHOLD_MAX of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

Progress = Callable[[int, int], None]


# The caller's side


def calibrate(
    program: Program,
    machine: Machine,
    table: Table,
    *,
    device: str | None = None,
    threads: int | None = None,
    time_limit: float | None = 60.0,
    progress: Progress | None = None,
) -> int:
    """Measure the program's ops that the table lacks, the most expensive by roofline first, and store the figures.

    Args:
        program: what is to be planned.
        machine: gives the roofline that orders the keys.
        table: is added to and saved.
        device: the torch device that measures; default: the machine's.
        threads: of torch on the CPU; default: as many as in this process.
        time_limit: seconds in all; None for no limit.
        progress: is told (measurements done, measurements to do).

    Returns:
        How many keys were measured. Keys that cannot be run are remembered as such and not counted.
    """
    worth: dict[str, float] = {}
    for op in program.ops:
        if op.key not in table and measurable(op.key):
            worth[op.key] = worth.get(op.key, 0.0) + roofline(op, machine)
    if not worth:
        return 0
    keys = sorted(worth, key=lambda key: -worth[key])
    found = measure(keys, device or machine.device, threads=threads, time_limit=time_limit, progress=progress)
    table.update(found)
    table.save()
    return sum(figures is not None for figures in found.values())


def measure(
    keys: Iterable[str],
    device: str = "cpu",
    *,
    threads: int | None = None,
    repeats: int = 3,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Figures | None]:
    """Run every key on the device.

    Args:
        keys: of ops, as `Op.key` has them.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; default: as many as torch uses in this process.
        repeats: timed runs of each key at least; 2 where one run takes longer than a key's budget.
        time_limit: seconds in all; None for no limit.
        progress: is told (measurements done, measurements to do).

    Returns:
        For each key (seconds, workspace bytes), or None where it was tried and cannot be run: an unknown operator, an
        argument that no key can carry, a crash. A key that the time limit left out is missing.

    Raises:
        MemplanError: the worker does not start.
    """
    wanted = list(dict.fromkeys(keys))
    found: dict[str, Figures | None] = {}
    seconds: dict[str, float] = {}
    if not wanted:
        return found
    if threads is None:
        threads = torch_threads()
    report = progress or (lambda done, total: None)
    total = 2 * len(wanted)
    start = time.monotonic()
    limit = float("inf") if time_limit is None else time_limit
    with Worker(worker_command("time", device, threads, repeats)) as worker:
        for index, key in enumerate(wanted):
            answer = worker.ask(key, start + limit * TIME_SHARE - time.monotonic())
            if isinstance(answer, float):
                seconds[key] = answer
            elif answer is None:
                found[key] = None
            report(index + 1, total)
    with Worker(worker_command("workspace", device, threads, repeats)) as worker:
        for index, key in enumerate(seconds):
            answer = worker.ask(key, start + limit - time.monotonic())
            if isinstance(answer, float):
                found[key] = (seconds[key], int(answer))
            elif answer is None:
                found[key] = None
            report(len(wanted) + index + 1, total)
    report(total, total)
    return found


def worker_command(mode: str, device: str, threads: int, repeats: int) -> list[str]:
    """The command line of a worker. `-P`: what lies in the working directory must not shadow a library."""
    return [sys.executable, "-P", "-m", "memplan.backends.measure", mode, device, str(threads), str(repeats)]


def torch_threads() -> int:
    """The threads that torch uses in this process."""
    import torch

    return torch.get_num_threads()


OUT_OF_TIME = "out of time"


class Worker:
    """The measuring process, started again whenever it dies. Use as a context manager."""

    def __init__(self, command: Sequence[str]):
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.log: BinaryIO | None = None

    def __enter__(self) -> "Worker":
        self.log = tempfile.TemporaryFile()
        try:
            self.start()
        except MemplanError:
            self.log.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.log is not None:
            self.log.close()

    def start(self) -> None:
        """Start the process and wait until it answers."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": paths},
        )
        if self.exchange(b"{}", START_LIMIT) is None:
            self.stop()
            raise MemplanError(f"the measuring process does not start: {self.last_words()}")

    def stop(self) -> None:
        """End the process and close its pipes."""
        if self.process is None:
            return
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # bytes left in the buffer of a broken pipe
                    pipe.close()
        self.process.wait()
        self.process = None

    def last_words(self) -> str:
        """The last line that the process wrote on standard error."""
        if self.log is None:
            return "no message"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def ask(self, key: str, limit: float) -> float | str | None:
        """One measurement: the figure, None where the key cannot be run, or `OUT_OF_TIME` where `limit` cut it off."""
        if limit <= 0:
            return OUT_OF_TIME
        if self.process is None:
            self.start()
        line = json.dumps({"key": key}).encode()
        begin = time.monotonic()
        answer = self.exchange(line, min(limit, KEY_LIMIT))
        if answer is None:
            self.stop()
            return OUT_OF_TIME if time.monotonic() - begin >= limit else None
        value = answer.get("value")
        return float(value) if isinstance(value, int | float) else None

    def exchange(self, line: bytes, limit: float) -> dict[str, Any] | None:
        """Send a line and read the answer; None where the process died or had to be killed."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(limit, process.kill)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            watch.cancel()


# Keys to calls


class Unmeasurable(Exception):
    """A key that names no operator, or carries an argument that cannot be built."""


@dataclass(frozen=True)
class Call:
    """An operator and its arguments; calling it runs it."""

    op: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.op(*self.args, **self.kwargs)

    @property
    def inputs(self) -> set[int]:
        """The addresses of the storages that it is given."""
        return {storage.data_ptr() for storage in storages([self.args, list(self.kwargs.values())])}


def build(key: str, device: str) -> Call:
    """The call that a key describes, on fresh tensors of random contents.

    Indices are random within what they index, other integers zero, so that no kernel leaves its tensors.

    Raises:
        Unmeasurable: the key does not describe a call that can be made here.
    """
    try:
        spec = json.loads(key)
        name, args, kwargs = spec["op"], spec["args"], spec["kwargs"]
    except (ValueError, TypeError, KeyError):
        raise Unmeasurable("not a description of a call") from None
    op = resolve(name)
    named = {**dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)), **kwargs}
    bounds = index_bounds(name.split(".")[1], named)
    built = {name: decode(value, device, bounds.get(name, ())) for name, value in named.items()}
    return Call(op, list(built.values())[: len(args)], {name: built[name] for name in kwargs})


def resolve(name: str) -> Any:
    """The operator of that name."""
    import torch

    parts = name.split(".")
    if len(parts) != 3:
        raise Unmeasurable(f"{name} is not an operator")
    try:
        return getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        raise Unmeasurable(f"{name} is not an operator") from None


def index_bounds(op: str, named: dict[str, Any]) -> dict[str, Sequence[int]]:
    """For an argument that holds indices, by its name in the operator's schema: what each must stay below."""

    def shape(name: str) -> list[int]:
        value = named.get(name)
        return value["s"] if isinstance(value, dict) and "s" in value else []

    if op in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        return {"indices": shape("weight")[:1]}
    if op == "embedding_dense_backward":
        return {"indices": [named.get("num_weights", 1)]}
    if op.startswith(("nll_loss", "cross_entropy")):
        classes = shape("self")
        return {"target": classes[1:2] or classes}
    if op in ("index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put"):
        return {"indices": shape("self")}
    if op.startswith("max_pool2d_with_indices_backward"):
        return {"indices": [prod(shape("self")[-2:])]}
    if isinstance(named.get("dim"), int) and "index" in named and shape("self"):
        return {"index": [shape("self")[named["dim"]]]}
    return {}


def decode(value: Any, device: str, bounds: Sequence[int] = ()) -> Any:
    """An argument of a call from its JSON form."""
    import torch

    if isinstance(value, list):
        padded = [*bounds, *[0] * len(value)]
        return [decode(item, device, padded[index : index + 1]) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "t" in value:
        return tensor(value, device, bounds[0] if bounds else 0)
    if "f" in value:
        return float(value["f"])
    if "device" in value:
        return torch.device(device)
    for form, kind in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        found = getattr(torch, str(value.get(form)), None)
        if isinstance(found, kind):
            return found
    raise Unmeasurable(f"an argument {value} cannot be built")


def tensor(spec: dict[str, Any], device: str, bound: int) -> "torch.Tensor":
    """A tensor of the given type, shape, strides and offset over a storage that just holds it."""
    import torch

    dtype = getattr(torch, spec["t"], None)
    if not isinstance(dtype, torch.dtype):
        raise Unmeasurable(f"unknown element type {spec['t']}")
    shape, strides, offset = spec["s"], spec["st"], spec.get("o", 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    room = (offset + extent) * dtype.itemsize
    if room > free_bytes(device) / 3:
        raise Unmeasurable(f"a tensor of {room} bytes does not fit")
    return contents(offset + extent, dtype, device, bound).as_strided(shape, strides, offset)


def contents(count: int, dtype: "torch.dtype", device: str, bound: int) -> "torch.Tensor":
    """`count` elements: floats within [0.1, 0.9), which are fit for logarithms, variances and probabilities alike."""
    import torch

    if dtype is torch.bool:
        block = torch.rand(BLOCK, device=device) < 0.5
    elif dtype.is_floating_point or dtype.is_complex:
        block = (torch.rand(BLOCK, device=device) * 0.8 + 0.1).to(dtype)
    elif bound > 0:
        largest = torch.iinfo(dtype).max
        block = torch.randint(min(bound, largest), (BLOCK,), device=device).to(dtype)
    else:
        return torch.zeros(count, dtype=dtype, device=device)
    filled = torch.empty(count, dtype=dtype, device=device)
    whole = count // BLOCK * BLOCK
    filled[:whole].view(-1, BLOCK).copy_(block.expand(whole // BLOCK, BLOCK))
    filled[whole:].copy_(block[: count - whole])
    return filled


def free_bytes(device: str) -> float:
    """Bytes that can still be allocated; infinity where the system does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float("inf")


# Calls to figures


def seconds_of(call: Callable[[], Any], repeats: int, device: str) -> float:
    """The time of one call, its outputs allocated and freed each time as in a step.

    Of several times the lower quartile: another process on the cores only ever lengthens a run, and where threads wait
    for one another, tenfold.
    """
    once = timed_on_cuda if device == "cuda" else timed_on_cpu
    once(call)
    times = [once(call)]
    least = repeats if times[0] * repeats <= KEY_BUDGET else min(repeats, 2)
    spent = times[0]
    while len(times) < least or (len(times) < MOST_REPEATS and spent < KEY_BUDGET / 2):
        times.append(once(call))
        spent += times[-1]
    return sorted(times)[len(times) // 4]


def timed_on_cpu(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = call()
    del result  # giving the pages back is part of what an output costs
    return time.perf_counter() - begin


def timed_on_cuda(call: Callable[[], Any]) -> float:
    import torch

    # writing more than the second-level cache holds leaves the inputs as cold as a step finds them
    torch.empty(64 << 20, dtype=torch.int8, device="cuda").zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def workspace_of(call: Call, device: str) -> int:
    """Bytes live at the call's highest point beside its inputs and outputs."""
    if device == "cuda":
        extra = cuda_extra
    elif can_reset_peak():
        extra = resident_extra
    else:
        extra = allocator_extra
    inputs = call.inputs
    extra(call, inputs)  # a library's own buffers come into being with the first call, and stay
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


def storages(value: Any) -> Iterator["torch.UntypedStorage"]:
    """The storages of every tensor in nested lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from storages(item)


def output_storages(result: Any, inputs: set[int]) -> dict[int, int]:
    """Address and bytes of each storage that the call made; views of inputs are not among them."""
    return {found.data_ptr(): found.nbytes() for found in storages(result) if found.data_ptr() not in inputs}


def output_bytes(result: Any, inputs: set[int]) -> int:
    """Bytes of the storages that the call made."""
    return sum(output_storages(result, inputs).values())


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


def trim() -> None:
    """Give free heap pages back to the system: memory that is reused would not show."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# The worker's side


def answer(request: dict[str, str], figure: Callable[[Call], float]) -> dict[str, Any]:
    """The figure that a request asks for, or the error that stood against it."""
    if "key" not in request:
        return {"ready": True}
    try:
        return {"value": figure(build(request["key"], request["device"]))}
    except Exception as error:  # kernels raise whatever they like; only this key is lost
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def serve(mode: str, device: str, threads: int, repeats: int) -> None:
    """Answer requests until the input ends, with seconds or with bytes as `mode` says."""
    if mode == "workspace":
        return_memory_at_once()
    import torch

    with suppress(OSError):  # where memory runs out, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not talk into the answers
    torch.set_num_threads(threads)
    gc.disable()
    # glibc maps blocks singly from a size on that grows with each such block freed, up to 32 MiB: a process that has
    # run a step or two has grown it, and gets the pages of a freed block back without page faults
    torch.empty(GROWN_THRESHOLD, dtype=torch.uint8)

    def figure(call: Call) -> float:
        return seconds_of(call, repeats, device) if mode == "time" else workspace_of(call, device)

    with torch.no_grad():
        for line in sys.stdin:
            reply = answer({"device": device, **json.loads(line)}, figure)
            answers.write(json.dumps(reply).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

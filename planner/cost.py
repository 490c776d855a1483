"""What an op costs: measured figures where a table has them, else the machine's roofline and a model of workspaces.

Costs enter a program in one place, `apply_costs`. Nothing here runs a kernel; `backends.measure` does that and fills
the table.
"""

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .machine import Machine
from .program import Op, Program
from .units import show_seconds


class Figures(NamedTuple):
    """What was measured of a call.

    Attributes:
        seconds: it takes.
        workspace: bytes beside its operands.
        disturbed: whether other work got in the way of every run, so that the time is only an upper bound.
    """

    seconds: float
    workspace: int
    disturbed: bool = False


FORMAT = 3
MARGIN = 1.1  # modelled workspaces are multiplied by this: shapes round up to a kernel's blocks
CUBLAS_WORKSPACE = 32 << 20  # torch's default on Hopper, at::cuda::getChosenWorkspaceSize; 8 MiB on older GPUs
ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


# Keys


class Tensor(msgspec.Struct, frozen=True):
    """A tensor as an op's key describes it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of a compact copy."""
        return self.count * ITEMSIZE.get(self.dtype, 1)

    @property
    def floating(self) -> bool:
        """Whether arithmetic on it counts as floating-point operations."""
        return self.dtype.startswith(("float", "bfloat", "complex"))


class Call(msgspec.Struct, frozen=True):
    """The part of a key that the models look at: the operator without its overload, its tensors in order."""

    op: str
    tensors: tuple[Tensor, ...]
    opaque: bool


@lru_cache(maxsize=1 << 14)
def read_key(key: str) -> Call | None:
    """A key taken apart; None where it is not the description of a call."""
    try:
        spec = msgspec.json.decode(key)
        name = spec["op"].split(".")
        leaves = list(leaves_of([spec["args"], list(spec["kwargs"].values())]))
        tensors = tuple(Tensor(leaf["t"], tuple(leaf["s"]), tuple(leaf["st"])) for leaf in leaves if "t" in leaf)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return None
    opaque = len(name) != 3 or any("x" in leaf for leaf in leaves)
    return Call(name[1] if len(name) == 3 else spec["op"], tensors, opaque)


def leaves_of(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in nested lists."""
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from leaves_of(item)


def measurable(key: str) -> bool:
    """Whether the key describes a call of an operator that can be built again from it."""
    call = read_key(key)
    return call is not None and not call.opaque


# Roofline


def roofline(op: Op, machine: Machine) -> float:
    """Seconds that the op takes at least on the machine's first unit: the longest of compute, memory and launch."""
    unit = machine.units[0]
    tier = machine.tiers[machine.tier_index(unit.tier)]
    call = read_key(op.key)
    dtype = next((tensor.dtype for tensor in call.tensors if tensor.floating), "default") if call else "default"
    rate = unit.flops.get(dtype, unit.flops["default"]) * unit.efficiency
    return max(op.flops / rate, op.traffic / tier.bandwidth, unit.launch)


# Workspaces

Rule = Callable[[Call, int], float]  # the call and the bytes it writes -> workspace bytes


def nothing(call: Call, written: int) -> float:
    """The kernel works in its outputs and in registers."""
    return 0


def written_times(factor: float) -> Rule:
    """Temporaries of the output's size, as composites of elementwise kernels make them."""
    return lambda call, written: factor * written


def inputs_and_outputs(call: Call, written: int) -> float:
    """A copy of everything in the kernel's own layout: what a convolution library makes at worst."""
    return sum(tensor.bytes for tensor in call.tensors) + written


def inputs_times(factor: float) -> Rule:
    """Scratch in proportion to the input, as sorting needs it."""
    return lambda call, written: factor * sum(tensor.bytes for tensor in call.tensors)


def scattered_inputs(call: Call, written: int) -> float:
    """A compact copy of each matrix whose rows and columns both have gaps, which no BLAS reads."""
    return sum(tensor.bytes for tensor in call.tensors if scattered(tensor))


def scattered(tensor: Tensor) -> bool:
    """Whether a tensor of at least two dimensions is contiguous along neither of its last two."""
    return len(tensor.shape) >= 2 and 1 not in tensor.strides[-2:] and 1 not in tensor.shape[-2:]


def promoted_inputs(call: Call, written: int) -> float:
    """Copies in the widest type: on the CPU an elementwise kernel with mixed types converts its inputs first."""
    floating = [tensor for tensor in call.tensors if tensor.floating]
    widest = max((ITEMSIZE.get(tensor.dtype, 1) for tensor in floating), default=0)
    return sum(widest * tensor.count for tensor in floating if ITEMSIZE.get(tensor.dtype, 1) < widest)


def scores(call: Call, written: int) -> float:
    """Twice the matrix of scores, which attention without a fused kernel writes out."""
    if len(call.tensors) < 2 or any(len(tensor.shape) < 2 for tensor in call.tensors[:2]):
        return 2 * written
    query, key = call.tensors[:2]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * ITEMSIZE.get(query.dtype, 4)


def cublas(call: Call, written: int) -> float:
    """The workspace that torch gives cuBLAS."""
    return CUBLAS_WORKSPACE / MARGIN + scattered_inputs(call, written)


def single_precision(first: int, last: int) -> Rule:
    """Accumulators in single precision of the shapes of tensors `first` to `last` (exclusive)."""
    return lambda call, written: sum(4 * tensor.count for tensor in call.tensors[first:last])


def sorted_indices(call: Call, written: int) -> float:
    """Indices sorted with their positions, segments, and partial sums: at worst one for each row of the gradient."""
    return sum(6 * tensor.bytes if tensor.dtype == "int64" else 4 * tensor.count for tensor in call.tensors)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv")
CONVOLUTIONS = ("convolution", "convolution_backward", "_convolution")
ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "where", "maximum", "minimum", "addcmul", "addcdiv", "lerp", "pow")
SORTS = ("sort", "topk", "argsort", "index_put", "_unsafe_index_put", "unique_dim")
COMPOSITES: dict[str, Rule] = {
    "_safe_softmax": written_times(0.5),  # which rows are masked out altogether
    "_scaled_dot_product_attention_math": scores,
}
CPU_RULES: dict[str, Rule] = {
    **COMPOSITES,
    **dict.fromkeys(PRODUCTS, scattered_inputs),
    **dict.fromkeys(CONVOLUTIONS, inputs_and_outputs),  # oneDNN's blocked layouts
    **dict.fromkeys(ELEMENTWISE, promoted_inputs),
    **dict.fromkeys(SORTS, inputs_times(2)),
    "native_dropout": written_times(1),  # the mask as floats
    "native_dropout_backward": written_times(1),
    "_scaled_dot_product_flash_attention_for_cpu": written_times(0.25),  # blocks of scores for each thread
    "_scaled_dot_product_flash_attention_for_cpu_backward": written_times(0.5),
    "upsample_bilinear2d": written_times(1),
    "upsample_bicubic2d": written_times(1),
}
CUDA_RULES: dict[str, Rule] = {
    **COMPOSITES,
    **dict.fromkeys(PRODUCTS, cublas),
    **dict.fromkeys(CONVOLUTIONS, inputs_and_outputs),  # cuDNN's transposes and workspace
    **dict.fromkeys(SORTS, inputs_times(4)),
    "_scaled_dot_product_flash_attention_backward": single_precision(1, 2),  # the query's gradient
    "_scaled_dot_product_cudnn_attention_backward": single_precision(1, 2),
    "_scaled_dot_product_efficient_attention_backward": single_precision(1, 4),
    "embedding_dense_backward": sorted_indices,
}
RULES = {"cpu": CPU_RULES, "cuda": CUDA_RULES}


def modelled_workspace(key: str, written: int, device: str) -> int:
    """Bytes that an op may allocate beside its outputs, with a margin: what the source of its kernel suggests.

    Args:
        key: of the op.
        written: bytes of its outputs.
        device: `cpu` or `cuda`.
    """
    call = read_key(key)
    if call is None:
        return 0
    rule = RULES.get(device, CPU_RULES).get(call.op, nothing)
    return int(MARGIN * rule(call, written))


# Measurements


def cache_directory() -> Path:
    """Where measurements are kept: `$MEMPLAN_CACHE`, or `~/.cache/memplan`."""
    named = os.environ.get("MEMPLAN_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "memplan"


def file_name(prefix: str, device: str) -> str:
    """A file name that people can read, unique to the device."""
    readable = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")[:80]
    return f"{prefix}-{readable}-{hashlib.sha256(device.encode()).hexdigest()[:8]}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new content, never a part.

    Raises:
        OSError: the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


class TableFile(msgspec.Struct, frozen=True):
    """A table on disk. Keys are hashed, for they are long; None marks a key that cannot be measured."""

    device: str
    entries: dict[str, Figures | None]
    format: int = FORMAT


class Table:
    """What was measured on one device: op key -> seconds and workspace bytes.

    Attributes:
        device: what the figures hold for, as `planner.local.device_key` names it.
        path: the file they are kept in.
    """

    def __init__(self, device: str, directory: Path | None = None):
        """Open the device's table, which is empty where there is no file or none that can be read."""
        self.device = device
        self.path = (directory or cache_directory()) / file_name("costs", device)
        self.entries = self.read()

    def __contains__(self, key: str) -> bool:
        """Whether the key was tried, successfully or not."""
        return digest(key) in self.entries

    def __len__(self) -> int:
        return sum(figures is not None for figures in self.entries.values())

    def get(self, key: str) -> Figures | None:
        """What was measured; None where the key was not measured or cannot be."""
        return self.entries.get(digest(key))

    def update(self, found: Mapping[str, Figures | None]) -> None:
        """Add figures by key; None marks a key that cannot be measured."""
        self.entries = merged(self.entries, {digest(key): figures for key, figures in found.items()})

    def read(self) -> dict[str, Figures | None]:
        """The entries on disk; a file that makes no sense is left aside with a warning."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"cannot read the measurements in {self.path}: {error.strerror}", stacklevel=3)
            return {}
        try:
            file = msgspec.json.decode(content, type=TableFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            warnings.warn(f"ignoring {self.path}, which is not a table of measurements: {error}", stacklevel=3)
            return {}
        if file.format != FORMAT or file.device != self.device:
            return {}
        usable = {key: f for key, f in file.entries.items() if f is None or (0 < f.seconds < float("inf") and f.workspace >= 0)}
        if len(usable) < len(file.entries):
            warnings.warn(f"ignoring impossible figures in {self.path}", stacklevel=3)
        return usable

    def save(self) -> None:
        """Write the table, with what other processes have added to the file since; a failure is a warning."""
        try:
            with locked(self.path):
                self.entries = merged(self.read(), self.entries)
                write_atomically(self.path, msgspec.json.encode(TableFile(self.device, self.entries)))
        except OSError as error:
            warnings.warn(f"cannot keep the measurements in {self.path}: {error.strerror}", stacklevel=2)


def merged(old: Mapping[str, Figures | None], new: Mapping[str, Figures | None]) -> dict[str, Figures | None]:
    """The newer figures, but for those that were disturbed and have better ones before them."""
    made = dict(old)
    for key, figures in new.items():
        before = old.get(key)
        if figures is not None and figures.disturbed and before is not None:
            figures = min(before, figures, key=lambda each: (each.disturbed, each.seconds))
        made[key] = figures
    return made


def digest(key: str) -> str:
    """What stands for a key on disk."""
    return hashlib.sha256(key.encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to rewrite a file, among processes that ask for it; where locks are unknown, do nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the last writer wins
        yield
        return
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Programs


def apply_costs(program: Program, machine: Machine, table: Table | None = None) -> Program:
    """The program with time and workspace for every op, and buffers of the sizes that the machine hands out.

    Args:
        program: as captured.
        machine: its first tier rounds buffers; its first unit gives the times that were not measured.
        table: measurements of the device; None or a missing key falls back on the roofline and a modelled workspace.
    """
    rounding = machine.tiers[0].rounding
    buffers = tuple(
        msgspec.structs.replace(buffer, bytes=-(-buffer.bytes // rounding) * rounding) for buffer in program.buffers
    )

    def cost(op: Op) -> Op:
        figures = table.get(op.key) if table is not None else None
        if figures is None:
            written = sum(program.buffers[buffer].bytes for buffer in op.writes)
            figures = Figures(roofline(op, machine), modelled_workspace(op.key, written, program.device))
        return msgspec.structs.replace(op, seconds=figures.seconds, workspace=figures.workspace)

    return msgspec.structs.replace(program, buffers=buffers, ops=tuple(cost(op) for op in program.ops))


class Coverage(msgspec.Struct, frozen=True):
    """How much of a program's cost was measured rather than modelled.

    Attributes:
        ops: ops in the program.
        measured: those of them with measured figures.
        seconds: of all ops, run once each.
        measured_seconds: of the measured ones.
    """

    ops: int
    measured: int
    seconds: float
    measured_seconds: float

    def __str__(self) -> str:
        share = self.measured_seconds / self.seconds if self.seconds > 0 else 0.0
        return f"{self.measured} of {self.ops} ops measured, {share:.1%} of {show_seconds(self.seconds)}"


def coverage(program: Program, table: Table | None) -> Coverage:
    """What the table covers of a program that `apply_costs` has been through."""
    known = [op for op in program.ops if table is not None and table.get(op.key) is not None]
    return Coverage(
        ops=len(program.ops),
        measured=len(known),
        seconds=sum(op.seconds for op in program.ops),
        measured_seconds=sum(op.seconds for op in known),
    )

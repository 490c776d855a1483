"""Real training steps in a fresh process, so that the peak of memory found is the steps' and nothing else's.

    python -m memplan.backends.trial < request.json      runs one `Request` and prints one `Trial`

On Linux a CPU step's peak is what the step adds to the process at its highest (VmHWM after a reset, less the resident
size before the step) plus the tensors that were there already. On CUDA it is `max_memory_allocated`, in which cuBLAS's
workspaces are counted, with segments that grow unless the user has set the allocator. Elsewhere the peak is unknown and None.

Peaks want an allocator that gives memory back at once, which can double the time of a step; times want the allocator
as users have it. So the steps run twice: first for peaks, losses and gradients, then for times.
"""

import ctypes
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from ..planner.errors import MemplanError
from ..planner.plan import OPTIMIZERS
from .meters import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, cuda_environment, fill_heap, highest, reset_peak, resident

if TYPE_CHECKING:
    import torch
    from torch import nn

# Blocks of this size and more go back to the system when freed, so that the resident size follows the tensors.
CHILD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX in glibc
FUSED = ("sgd", "adam", "adamw")
LEARNING_RATE = 1e-3


class Request(msgspec.Struct, frozen=True):
    """What to run.

    Attributes:
        model: as on the command line.
        plan: a plan file to apply; None for the model as it is.
        steps: how many to measure, once for memory and once for time, each after one that is not measured.
        optimizer: a key of `OPTIMIZERS`, or None to leave the parameters alone.
        device: where to move the model; None for where it is.
        in_backward: the planned step updates parameters itself, so that they are compared, for gradients are gone.
    """

    model: str
    plan: str | None
    steps: int
    optimizer: str | None = None
    device: str | None = None
    in_backward: bool = False


class Copies(msgspec.Struct, frozen=True):
    """Copies of one way in a step: bytes, seconds spent copying, and seconds that the step waited for them."""

    bytes: float
    busy: float
    stalled: float


class Trial(msgspec.Struct, frozen=True):
    """What was measured.

    Attributes:
        peak: bytes, everything counted; None where this system does not tell.
        seconds: the median step.
        losses: the loss of each step, exactly, as `float.hex` writes it.
        gradients: a checksum of all gradients after each step, or of the parameters if `Request.in_backward`.
        copies: what a step moves to other tiers (`out`) and back (`in`), on average over the steps that are timed.
    """

    peak: int | None
    seconds: float
    losses: tuple[str, ...]
    gradients: tuple[str, ...]
    copies: dict[str, Copies] = {}


def in_fresh_process(request: Request) -> Trial:
    """Run a request in a process of its own.

    Raises:
        MemplanError: the process failed; the message has its reason.
    """
    command = [sys.executable, "-P", "-m", "memplan.backends.trial"]
    environment = {**os.environ, **CHILD, **cuda_environment()}
    child = subprocess.run(command, input=msgspec.json.encode(request), env=environment, capture_output=True)
    what = f"the {'unplanned' if request.plan is None else 'planned'} run of {request.model}"
    if child.returncode < 0:
        raise MemplanError(f"{what} was killed by signal {-child.returncode}: is there memory for it?")
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MemplanError(f"{what} failed: {''.join(last) or f'exit status {child.returncode}'}") from None
    if "error" in answer:
        raise MemplanError(f"{what} failed: {answer['error']}")
    return msgspec.convert(answer, Trial)


def run(request: Request) -> Trial:
    """Train for the request's steps in this process."""
    from ..planner.models import load_model

    return train(request, *to_device(request.device, *load_model(request.model, meta=False)))


def train(request: Request, model: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> Trial:
    """The same for a model that is there."""
    import torch

    from ..planner.capture import find_loss
    from ..planner.plan import load

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = parameters[0].device.type if parameters else "cpu"
    optimizer = None
    if request.optimizer is not None:
        # what a plan takes the optimizer's name for (`planner.optimizers.kept_by`)
        fused = {"fused": True} if kind == "cuda" and request.optimizer in FUSED else {}
        optimizer = getattr(torch.optim, OPTIMIZERS[request.optimizer])(parameters, lr=LEARNING_RATE, **fused)
    given = optimizer if request.in_backward else None
    called = model if request.plan is None else load(request.plan).apply(model, optimizer=given)
    code = getattr(getattr(called, "forward", None), "code", None)
    homes = getattr(code, "homes", None)
    meter = Meter(kind)

    def step(number: int) -> float:
        torch.manual_seed(number)
        output = called(*args, **kwargs)
        loss = find_loss(output)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.item()  # waits for the device too

    step(0)  # compiles, fills caches, makes the optimizer's state
    model.zero_grad(set_to_none=True)
    resident = [*model.parameters(), *model.buffers(), *tensors((args, kwargs))]
    resident += tensors(list(optimizer.state.values())) if optimizer is not None else []
    storages = [tensor.untyped_storage() for tensor in resident]
    fixed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + arena_bytes(called)
    peaks, losses, gradients = [], [], []
    for number in range(1, request.steps + 1):
        meter.reset()
        losses.append(step(number).hex())
        peaks.append(meter.peak(fixed))
        if homes is not None:
            homes.restore()
        gradients.append(checksum(model, request.in_backward))
        if homes is not None:
            homes.begin()
        model.zero_grad(set_to_none=True)
    keep_freed_memory()
    tiers = [*getattr(code, "tiers", {}).values(), *(homes.tiers.values() if homes is not None else ())]
    for tier in tiers:
        tier.reset()
    seconds = []
    for number in range(request.steps + 1):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    known = [peak for peak in peaks if peak is not None]
    copies = {way: Copies(*(sum(getattr(tier.traffic[way], part) for tier in tiers) / len(seconds)
                            for part in ("bytes", "busy", "stalled"))) for way in ("out", "in") if tiers}  # fmt: skip
    return Trial(max(known, default=None), statistics.median(seconds[1:]), tuple(losses), tuple(gradients), copies)


def arena_bytes(called: Any) -> int:
    """Bytes that a planned module holds between steps, because its plan has addresses."""
    arena = getattr(getattr(getattr(called, "forward", None), "code", None), "arena", None)
    return arena.bytes if arena is not None else 0


def keep_freed_memory() -> None:
    """Undo `CHILD`: what glibc's malloc does once a process has freed a large block (mallopt(3), dynamic threshold)."""
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)


def to_device(device: str | None, model: "nn.Module", *rest: Any) -> tuple[Any, ...]:
    """The model and its arguments on a device; as they are for None.

    Raises:
        MemplanError: there is no such device here.
    """
    import torch
    from torch.utils import _pytree as pytree

    if device is None:
        return (model, *rest)
    kind, _, number = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}.get(kind, -1)
    if count < 0 or (number and not number.isdecimal()):
        raise MemplanError(f"no device {device!r}: give cpu or cuda")
    if int(number or 0) >= count:
        raise MemplanError(f"no device {device!r} here: torch sees {count} of {kind}; leave --device out, or give cpu")
    return (model.to(device), *pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), rest))


def tensors(nested: Any) -> "Iterator[torch.Tensor]":
    """The tensors in nested tuples, lists and dicts."""
    import torch
    from torch.utils import _pytree as pytree

    yield from (leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, torch.Tensor))


def checksum(model: "nn.Module", values: bool = False) -> str:
    """A hash of every gradient's bits, or of every parameter's."""
    import torch

    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        tensor = parameter.detach() if values else parameter.grad
        if tensor is not None:
            sha.update(name.encode())
            sha.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Meter:
    """The peak of memory since the last reset."""

    def __init__(self, device: str):
        self.device = device
        self.before: int | None = None

    def reset(self) -> None:
        """Start anew."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        try:
            fill_heap()
            self.before = resident()
            reset_peak()
        except OSError:  # not Linux, or a container that forbids it
            self.before = None

    def peak(self, fixed: int) -> int | None:
        """Bytes at the highest since the reset; `fixed` are those of the tensors that were there then."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        if self.before is None:
            return None
        return highest() - self.before + fixed


def main() -> None:
    """Answer the request on standard input. What a model prints goes to standard error."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    answer: dict[str, Any]
    with redirect_stdout(sys.stderr):
        try:
            answer = msgspec.to_builtins(run(request))
        except Exception as error:  # whatever it is, the parent reports it in one line
            kind = "" if isinstance(error, MemplanError) else f"{type(error).__name__}: "
            answer = {"error": kind + " ".join(str(error).split())}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

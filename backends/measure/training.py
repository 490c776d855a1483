"""Real training steps in a fresh process, so that the peak of memory found is the steps' and nothing else's.

    python -m memplan.backends.measure.training < request.json      runs one `Request` and prints one `Trial`
    python -m memplan.backends.measure.training --turns             the same, a step at a time, as `compare` asks for them

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

from ...planner.cost.watch import Watch
from ...planner.ir.errors import MemplanError
from ...planner.ir.names import OPTIMIZERS
from .fresh import python_running
from .meters import (
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    cuda_environment,
    fill_heap,
    highest,
    reset_peak,
    resident,
)

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
        disturbed: how many of those other work held the cores in, where no other steps count.
    """

    peak: int | None
    seconds: float
    losses: tuple[str, ...]
    gradients: tuple[str, ...]
    copies: dict[str, Copies] = {}
    disturbed: int = 0


COMMAND = python_running("memplan.backends.measure.training")


def child_environment() -> dict[str, str]:
    """Of a process that trains."""
    return {**os.environ, **CHILD, **cuda_environment()}


def name_of(request: Request) -> str:
    """What an error calls a run."""
    return f"the {'unplanned' if request.plan is None else 'planned'} run of {request.model}"


def in_fresh_process(request: Request) -> Trial:
    """Run a request in a process of its own.

    Raises:
        MemplanError: the process failed; the message has its reason.
    """
    child = subprocess.run(COMMAND, input=msgspec.json.encode(request), env=child_environment(), capture_output=True)
    what = name_of(request)
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
    from ...planner.models.byname import load_model

    return train(request, *to_device(request.device, *load_model(request.model, meta=False)))


def train(request: Request, model: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> Trial:
    """The same for a model that is there."""
    training = Training(request, model, args, kwargs)
    training.begin_timing()
    timed = [training.timed_step() for _ in range(request.steps + 1)][1:]
    quiet = [seconds for seconds, disturbed in timed if not disturbed]
    seconds = statistics.median(quiet or [seconds for seconds, _ in timed])
    return training.trial(seconds, 0 if quiet else len(timed))


class Training:
    """Steps of a model: first those for peaks, losses and gradients, when it is made; then, one by one, those for times."""

    def __init__(self, request: Request, model: "nn.Module", args: tuple, kwargs: dict[str, Any]):
        import torch

        from ...planner.ir.plan import load

        self.request, self.model, self.inputs = request, model, (args, kwargs)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = parameters[0].device.type if parameters else "cpu"
        self.optimizer: Any = None
        if request.optimizer is not None:
            # what a plan takes the optimizer's name for (`planner.capture.optimizers.kept_by`)
            fused = {"fused": True} if kind == "cuda" and request.optimizer in FUSED else {}
            self.optimizer = getattr(torch.optim, OPTIMIZERS[request.optimizer])(parameters, lr=LEARNING_RATE, **fused)
        given = self.optimizer if request.in_backward else None
        self.called = model if request.plan is None else load(request.plan).apply(model, optimizer=given)
        self.code = getattr(getattr(self.called, "forward", None), "code", None)
        self.homes = getattr(self.code, "homes", None)
        self.peaks: list[int | None] = []
        self.losses: list[str] = []
        self.gradients: list[str] = []
        self.timed = 0
        self.step(0)  # compiles, fills caches, makes the optimizer's state
        model.zero_grad(set_to_none=True)
        self.measure(Meter(kind))

    def step(self, number: int) -> float:
        """One step; returns the loss, and so waits for the device."""
        import torch

        from ...planner.capture.step import find_loss

        args, kwargs = self.inputs
        torch.manual_seed(number)
        output = self.called(*args, **kwargs)  # held until the step ends, as a script holds it, and a plan counts it
        loss = find_loss(output)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.item()

    def measure(self, meter: "Meter") -> None:
        """Peaks, losses and gradients."""
        model, homes = self.model, self.homes
        resident = [*model.parameters(), *model.buffers(), *tensors(self.inputs)]
        resident += tensors(list(self.optimizer.state.values())) if self.optimizer is not None else []
        storages = [tensor.untyped_storage() for tensor in resident]
        fixed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + arena_bytes(self.called)
        for number in range(1, self.request.steps + 1):
            meter.reset()
            self.losses.append(self.step(number).hex())
            self.peaks.append(meter.peak(fixed))
            if homes is not None:
                homes.restore()
            self.gradients.append(checksum(model, self.request.in_backward))
            if homes is not None:
                homes.begin()
            model.zero_grad(set_to_none=True)

    @property
    def tiers(self) -> list[Any]:
        """Where the step's copies go."""
        homes = self.homes.tiers.values() if self.homes is not None else ()
        return [*getattr(self.code, "tiers", {}).values(), *homes]

    def begin_timing(self) -> None:
        """From here on, the allocator is as users have it."""
        keep_freed_memory()
        for tier in self.tiers:
            tier.reset()

    def timed_step(self) -> tuple[float, bool]:
        """The seconds of one step, and whether other work held the cores meanwhile. The first one warms up."""
        with Watch() as watch:
            began = time.perf_counter()
            self.step(self.timed)
            took = time.perf_counter() - began
        self.model.zero_grad(set_to_none=True)
        self.timed += 1
        return took, watch.disturbed

    def trial(self, seconds: float, disturbed: int) -> Trial:
        """What was found, with what is made of the times."""
        tiers = self.tiers
        copies = {way: Copies(*(sum(getattr(tier.traffic[way], part) for tier in tiers) / max(self.timed, 1)
                                for part in ("bytes", "busy", "stalled"))) for way in ("out", "in") if tiers}  # fmt: skip
        known = [peak for peak in self.peaks if peak is not None]
        return Trial(
            max(known, default=None), seconds, tuple(self.losses), tuple(self.gradients), copies, disturbed
        )  # fmt: skip


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
    """Answer the request on standard input, or those of `compare`. What a model prints goes to standard error."""
    if "--turns" in sys.argv[1:]:
        return serve_turns()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    answer: dict[str, Any]
    with redirect_stdout(sys.stderr):
        try:
            answer = msgspec.to_builtins(run(request))
        except Exception as error:  # whatever it is, the parent reports it in one line
            answer = reason_of(error)
    print(json.dumps(answer))
    return None


def serve_turns() -> None:
    """A request on the first line of standard input; then `step` or `end` on each. Answers each line with one."""
    from ...planner.models.byname import load_model

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not talk into the answers
    training: Training | None = None
    with redirect_stdout(sys.stderr):
        for line in sys.stdin.buffer:
            answer: dict[str, Any] = {}
            try:
                if training is None:
                    request = msgspec.json.decode(line, type=Request)
                    training = Training(request, *to_device(request.device, *load_model(request.model, meta=False)))
                    training.begin_timing()
                elif line.strip() == b"step":
                    seconds, disturbed = training.timed_step()
                    answer = {"seconds": seconds, "disturbed": disturbed}
                else:
                    answer = msgspec.to_builtins(training.trial(0.0, 0))
            except Exception as error:  # whatever it is, the parent reports it in one line
                answer = reason_of(error)
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()


def reason_of(error: Exception) -> dict[str, str]:
    """An error as an answer."""
    kind = "" if isinstance(error, MemplanError) else f"{type(error).__name__}: "
    return {"error": kind + " ".join(str(error).split())}


if __name__ == "__main__":
    main()

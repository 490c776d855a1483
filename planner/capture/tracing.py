"""AOTAutograd's joint graph of a module, or an error in one line that names the line of the model."""

import logging
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ..ir.errors import CaptureError, MemplanError
from .constants import Refusal
from .native import native_kernels
from .plain_calls import gathered, no_saving, plain_calls
from .unasked import unasked

IN_DATA = {
    DataDependentOutputException: "the model takes a number out of a tensor ({}), and a plan needs branches and numbers that "
                                  "do not depend on data: keep it as a Python number, or compute with the tensor",
    DynamicOutputShapeException: "the data decide a shape ({}), and a plan needs shapes that are known: use torch.where or "
                                 "masked_fill, or an index of a fixed size",
}  # fmt: skip

# Its state could be set by the model itself at each call, and would have to be put back for a repetition.
OWN_GENERATOR = (
    "the model draws from a torch.Generator that it is given (generator=): leave that out, or pass what is drawn as an input"
)


def trace(
    step: nn.Module, inputs: list[torch.Tensor], mode: FakeTensorMode, train: bool, stack: ExitStack, reentrant: bool = False
) -> Any:
    """AOTAutograd's joint graph with descriptors, or a `CaptureError` that names the model's line.

    Args:
        step: what to trace.
        inputs: fake tensors.
        mode: theirs.
        train: trace the backward pass too.
        stack: ends with the tracing; the graph is to be used before.
        reentrant: a `Function` calls `backward()` in its backward pass: see `planner.capture.plain_calls.gathered`.
    """
    with in_words("trace the model"):
        stack.enter_context(quiet("torch._subclasses.fake_tensor"))  # what goes wrong is told in one line
        stack.enter_context(mode)
        stack.enter_context(native_kernels())
        stack.enter_context(unasked())
        stack.enter_context(plain_calls())
        stack.enter_context(no_saving())
        if reentrant:
            stack.enter_context(gathered(step))
        stack.enter_context(functorch_config.patch(backward_pass_autocast="off"))  # where `backward()` should be called
        stack.enter_context(torch.enable_grad() if train else torch.no_grad())
        return aot_export_joint_with_descriptors(stack, step, tuple(inputs), decompositions={})


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger say nothing."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Turn whatever goes wrong into a `CaptureError` of one line, with the model's own where that is known."""
    try:
        yield
    except MemplanError:
        raise
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        kind = "" if isinstance(error, Refusal) else f"{type(error).__name__}: "
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            kind, reason = "", IN_DATA[type(error)].format(reason)
            if any("/torch/distributions/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
                reason = "a distribution looks whether its arguments are sound: give it validate_args=False"
        elif isinstance(error, NotImplementedError) and "torch._C.Generator" in reason:  # torch's word for it before 2.12
            kind, reason = "", OWN_GENERATOR
        elif "with_effects" in reason:
            kind, reason = "", ("it asks whether a result is sound, as torch.linalg's inv, solve and cholesky do: use their "
                                "_ex forms, such as torch.linalg.inv_ex(x)[0]")  # fmt: skip
        elif "resize a view tensor" in reason:
            kind, reason = "", "it gives a buffer another size: if only its first call does, call it once before planning"
        raise CaptureError(f"cannot {doing}{model_line(error)}: {kind}{reason}") from error


def model_line(error: BaseException) -> str:
    """` at file:line (code)` of the innermost frame that is the user's, else of torch's own modules, else nothing."""
    root = __file__.rsplit("/", 3)[0]
    ours = tuple(f"{root}/{room}/" for room in ("planner", "passes", "solvers", "backends"))
    library = sysconfig.get_paths()["stdlib"]
    theirs, modules = [], []
    for frame in traceback.extract_tb(error.__traceback__):
        inside = "/torch/nn/modules/" in frame.filename or "/torch/ao/" in frame.filename
        if inside and not frame.filename.endswith(("/module.py", "/container.py")):
            modules.append(frame)
        standard = frame.filename.startswith((library, "<")) and "site-packages" not in frame.filename
        if not standard and "/torch/" not in frame.filename and not frame.filename.startswith(ours):
            theirs.append(frame)
    for frame in (theirs or modules)[-1:]:
        return f" at {frame.filename}:{frame.lineno} ({(frame.line or '').strip()[:120]})"
    return ""

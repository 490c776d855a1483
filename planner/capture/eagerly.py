"""What a step does in eager PyTorch: run once under fake tensors, by autograd itself and without the tracer.

The tracer follows operators. What goes around them (checkpointing and hooks, functions with a backward pass of their own that
do more than return gradients) it can lose, and a gradient that is lost that way is None, in silence. So the set of those that
eager has is found apart, and compared; and the bytes that live on the way are counted (`live`). It costs a quarter
of tracing: 1.4 s of 5.4 s for GPT-2 of 12 layers (two cores of a Xeon).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..ir.errors import CaptureError
from .constants import Constants, Refusal
from .live import Live, Moments
from .plain_calls import called_by_checkpointing, no_saving, replaced
from .standins import fake_parameters, named_tensors
from .tracing import in_words, quiet
from .unasked import unasked


@dataclass(frozen=True)
class Reached:
    """What a step in eager mode does.

    Attributes:
        parameters: names of those that get a gradient; of a tied one the first.
        inputs: indices of the tensors given that do.
        reentrant: whether a `Function` calls `backward()` in its own backward pass.
        moments: how many bytes lived when its ops ran, the caller's loss function left out.
    """

    parameters: frozenset[str]
    inputs: frozenset[int]
    reentrant: bool
    moments: Moments


def reached(
    model: nn.Module, device: str, train: bool, make: Callable[[Constants], tuple[Any, list[torch.Tensor]]]
) -> Reached | None:
    """Run a step as eager PyTorch runs it, on fake tensors; of an inference the forward pass, for the sake of its hooks.

    Args:
        model: the model.
        device: the type of device that it is traced for.
        train: whether there is a backward pass.
        make: from a mode of fake tensors to what is called and its inputs.

    Returns:
        None of an inference.

    Raises:
        CaptureError: what cannot be run like that; a hook that a plan cannot take; a parameter that the call
            freezes or unfreezes.
    """
    mode = Constants()
    step, inputs = make(mode)
    calls: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(in_words("trace the model"))
        names = stack.enter_context(fake_parameters(model, mode, device))
        stack.enter_context(quiet("torch._subclasses.fake_tensor"))
        live = Live([*(value for _, value in named_tensors(model)), *inputs])
        for context in (mode, unasked(), no_saving(), step.hooks.tries(), live, torch.set_grad_enabled(train)):
            stack.enter_context(context)
        wanted = {name: value.requires_grad for name, value in model.named_parameters()}
        with no_backward():
            outputs = [value for value in step(*inputs) if value.requires_grad and not is_given(value)]
        if not train:
            return None
        changed = [name for name, value in model.named_parameters() if wanted.get(name) not in (None, value.requires_grad)]
        if changed:
            raise CaptureError(f"the model sets requires_grad of {changed[0]} in its forward: set it before planning")
        with torch.amp.autocast(device, enabled=False), noted_backward(calls):
            torch.autograd.backward(outputs, [torch.ones_like(value) for value in outputs])
        found = {names.get(name, name) for name, value in model.named_parameters() if value.grad is not None}
    got = frozenset(index for index, value in enumerate(inputs) if value.is_leaf and value.grad is not None)
    return Reached(frozenset(found), got, len(calls) > 0, live.moments)


def is_given(output: torch.Tensor) -> bool:
    """Whether an output is a parameter or an input, or a view of one: a planned step lets no gradient through, and says so."""
    return output.is_leaf or (output._base is not None and output._base.is_leaf)


@contextmanager
def no_backward() -> Iterator[None]:
    """Refuse a forward pass that calls `backward()`: gradients would be there that a plan knows nothing of."""
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def refused(*args: Any, **options: Any) -> Any:
        if options.get("accumulate_grad", True):
            raise Refusal("the model calls backward() in its forward: call it outside, or use torch.autograd.grad")
        return run(*args, **options)

    with replaced(torch.autograd, "_engine_run_backward", refused):
        yield


@contextmanager
def noted_backward(calls: list[Any]) -> Iterator[None]:
    """Note who calls `backward()` within the next backward pass, other than torch's checkpointing."""
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    running = [False]

    def noted(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(2)
        if running[0] and options.get("accumulate_grad", True) and not called_by_checkpointing(caller):
            calls.append(caller)
        running[0] = True
        return run(*args, **options)

    with replaced(torch.autograd, "_engine_run_backward", noted):
        yield


def check_gradients(
    graph: fx.GraphModule, known: Reached, parameter_name: Callable[[str], str], input_name: Callable[[int], str]
) -> None:
    """Refuse a traced step whose gradients are others than eager's.

    Args:
        graph: a joint graph with descriptors.
        known: what eager does.
        parameter_name: from a descriptor's target to the name in the model; tied names map to the first.
        input_name: what to call a traced input.

    Raises:
        CaptureError: the parameters, or inputs, that lack a gradient, or have one that they should not have.
    """
    ends = next(node for node in graph.graph.nodes if node.op == "output")
    parameters, inputs = set(), set()
    for value, desc in zip(ends.args[0], ends.meta["desc"], strict=True):
        if isinstance(value, fx.Node) and type(desc).__name__ == "GradAOTOutput":
            if type(desc.grad_of).__name__ == "ParamAOTInput":
                parameters.add(parameter_name(desc.grad_of.target))
            elif hasattr(desc.grad_of, "idx"):
                inputs.add(desc.grad_of.idx)
    compare(parameters, set(known.parameters))
    compare(set(map(input_name, inputs)), set(map(input_name, known.inputs)))


def compare(found: set[str], eager: set[str]) -> None:
    """Refuse two sets of names that differ.

    Raises:
        CaptureError: the first name that is in one alone.
    """
    for names, what in ((eager - found, "no gradient, and does"), (found - eager, "a gradient, and none")):
        if names:
            more = f" (and {len(names) - 1} more)" * (len(names) > 1)
            raise CaptureError(f"in the traced step {min(names)}{more} gets {what} in eager PyTorch: a Function of the model "
                               "does more in its backward than return gradients; call what it wraps")  # fmt: skip

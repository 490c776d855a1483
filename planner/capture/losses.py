"""The caller's own loss: its graph over the model's outputs, and what it sends gradients to."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ir.errors import CaptureError
from .nodes import output_nodes
from .standins import named_tensors
from .state import Snapshot
from .step import Leaf, Step
from .tracing import trace
from .writes import Made, WriteBack


def trace_loss(step: Step, graph: fx.GraphModule, loss: Callable[[Any], torch.Tensor], mode: FakeTensorMode) -> fx.GraphModule:
    """The joint graph of the caller's loss alone, over the model's outputs: what it costs between the two passes."""
    values = [node.meta["val"] for node in output_nodes(graph, "PlainAOTOutput")]

    class Loss(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            flat = [tensors[leaf.index] if isinstance(leaf, Leaf) else leaf for leaf in step.outputs]
            assert step.output_spec is not None
            with stored_for_loss(step, tensors):
                value = loss(pytree.tree_unflatten(flat, step.output_spec))
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise CaptureError(f"the loss function returns {shape}, not a scalar tensor: reduce it, as with .mean()")
            if not value.requires_grad:
                raise CaptureError("the loss function's result does not depend on what requires a gradient: leave out "
                                   ".detach() or no_grad(), or plan with train=False")  # fmt: skip
            return value

    inputs = []
    with mode:
        for index, value in enumerate(values):
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            plain = index in step.stored and index in step.plain
            inputs.append(copy.requires_grad_(value.is_floating_point() and not plain))
    with ExitStack() as stack:
        return trace(Loss(), inputs, mode, True, stack).graph_module


@contextmanager
def stored_for_loss(step: Step, tensors: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """While the loss is computed the model holds what its forward has stored."""
    before = Snapshot(step.found)
    known = dict(named_tensors(step.model))
    try:
        rows = [
            write for write in step.writes if all(not isinstance(leaf, Made) or leaf.kind != "input" for leaf in write.leaves)
        ]
        WriteBack(tuple(rows), [step.model]).store(
            lambda made: tensors[made.index] if made.kind == "output" else known[made.name])  # fmt: skip
        yield
    finally:
        before.restore()


def gradients_of(loss: fx.GraphModule) -> set[int]:
    """The inputs of a loss's graph to which it sends a gradient."""
    output = next(node for node in loss.graph.nodes if node.op == "output")
    pairs = zip(output.args[0], output.meta["desc"], strict=True)
    return {desc.grad_of.idx for node, desc in pairs if node is not None and type(desc).__name__ == "GradAOTOutput"}


def check_reached(graph: fx.GraphModule, loss: fx.GraphModule, plain: frozenset[int]) -> None:
    """Refuse a loss that is to send a gradient through an output to which none can come: it is the view of another.

    Args:
        graph: the model's joint graph.
        loss: the loss function's.
        plain: outputs through which the model itself lets no gradient pass.

    Raises:
        CaptureError: which output.
    """
    inputs = [node.meta["desc"] for node in graph.graph.find_nodes(op="placeholder")]
    fed = {getattr(desc.output, "idx", -1) for desc in inputs if type(desc).__name__ == "TangentAOTInput"}
    output = next(node for node in loss.graph.nodes if node.op == "output")
    for node, desc in zip(output.args[0], output.meta["desc"], strict=True):
        if node is not None and type(desc).__name__ == "GradAOTOutput" and desc.grad_of.idx not in fed | plain:
            raise CaptureError(f"the loss reads output {desc.grad_of.idx} of the model, which is a view of another output, or "
                               "a parameter: return a clone of it")  # fmt: skip

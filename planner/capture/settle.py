"""What a model stores at every call: proven by a second call from where the first one ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import fx, nn

from ..ir.errors import CaptureError
from .constants import Constants
from .nodes import output_nodes
from .reach import reach
from .reads import Fact, facts_read
from .standins import named_tensors
from .state import Snapshot
from .step import Step
from .writes import Calls, Made, Write, WriteBack, built_once, merged, needs_second

NUMBER = "DataDependentOutputException: aten._local_scalar_dense.default"


@contextmanager
def told_of(steps: list[Step]) -> Iterator[None]:
    """Say what torch's own errors do not: which parameter was exchanged too late, and that a number was asked for."""
    try:
        yield
    except CaptureError as error:
        assigned = [name for step in steps for name in step.assigned]
        if assigned and "modified by an inplace operation" in str(error):
            raise CaptureError(f"the model assigns to {assigned[0]}.data after it has computed with it, and its gradients "
                               "need the old contents: assign before") from error  # fmt: skip
        told = str(error)
        if told.endswith(NUMBER):
            raise CaptureError(f"{told.removesuffix(NUMBER)}the model takes a number out of a tensor, which depends on data: "
                               "keep it a tensor, or pass it in") from error  # fmt: skip
        raise


def settle_writes(
    step: Step, graph: fx.GraphModule, inputs: list[torch.Tensor], mode: Constants
) -> tuple[list[Write], list[Fact]]:
    """What forward stores at every call, and what it reads that it does not store.

    Raises:
        CaptureError: the call after the first would do something else.
    """
    writes, changes, found = step.writes, step.changes, step.found
    first = Snapshot(found)
    written = {(id(change.held.thing), change.key) for change in changes}
    reads = facts_read(step.log, found, written)
    if not needs_second(writes, changes, step.log.seen):
        return writes, reads
    stored, outputs = step.stored, output_nodes(graph, "PlainAOTOutput")
    try:
        once = calls_of(step, inputs)
        WriteBack(tuple(writes), [step.model]).store(lambda made: stand_in(step.model, made, outputs, inputs, mode))
        step.found = reach(step.model)
        try:
            twice = calls_of(step, inputs)
        except Exception as error:  # what the first call has stored is in the second one's way
            raise CaptureError(built_once(writes)) from error
        settled = merged(writes, step.writes)
        if not once.same_as(twice) or step.stored.keys() != stored.keys():
            raise CaptureError(built_once(writes))
    finally:
        first.restore()
        step.found = found
    step.writes, step.changes, step.stored = settled, changes, stored
    return settled, reads


def calls_of(step: Step, inputs: list[torch.Tensor]) -> Calls:
    """The operators that one more call runs, in the state that the model is in."""
    torch.clear_autocast_cache()  # beside the tracer autocast's cache works, and spares the second call its casts
    with step.hooks.intercepted(), Calls() as calls:
        step(*inputs)
    torch.clear_autocast_cache()
    return calls


def stand_in(model: nn.Module, made: Made, outputs: list[fx.Node], inputs: list[torch.Tensor], mode: Constants) -> torch.Tensor:
    """A tensor of the tracer's for one that a first call has stored."""
    if made.kind == "named":
        return dict(named_tensors(model))[made.name]
    like = inputs[made.index] if made.kind == "input" else outputs[made.index].meta["val"]
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def on_leaves(writes: list[Write], tensor_leaves: list[int]) -> list[Write]:
    """Writes whose inputs are numbered as leaves of the call."""
    return [replace(write, leaves=tuple(replace(leaf, index=tensor_leaves[leaf.index])
                    if isinstance(leaf, Made) and leaf.kind == "input" else leaf for leaf in write.leaves))
            for write in writes]  # fmt: skip

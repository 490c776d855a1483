"""A traced step that adds into the gradients that are there, each as soon as it is complete, as autograd does in eager mode.

A planned step is one node of autograd and returns its gradients together. Beside those of earlier steps (accumulation over
micro-batches, several calls before one backward pass) they would all lie a second time. Here `.grad` of each parameter is
resident, and an op adds to it where the gradient is complete; what was made for it is free then.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from torch import fx

from ..ir.plan import Kept
from ..ir.program import Buffer, Kind, Phase
from .graph import Traced
from .optimizers import make_op, rows_of
from .sized import family_of

if TYPE_CHECKING:
    from .capture import Captured

NAME = "accumulate"
PASSES = 3  # the gradient and `.grad` are read, and `.grad` is written


def accumulating(traced: Traced) -> Traced:
    """The same step with an op for each parameter that adds its gradient to what is there; small ones share ops.

    Args:
        traced: a training step whose gradients are returned.
    """
    program = traced.program
    pairs: dict[int, list[tuple[str, fx.Node]]] = {}
    left = []
    for place, node in traced.gradients:
        source = traced.sources[place]
        if source.kind == "parameter":
            pairs.setdefault(traced.owner[place], []).append((source.name, node))
        else:
            left.append((place, node))
    made = {buffer: at for at, op in enumerate(program.ops) for buffer in op.writes}
    sizes = {buffer: program.buffers[buffer].bytes for buffer in pairs}
    when = {buffer: max(made.get(traced.owner[node], -1) for _, node in row) for buffer, row in pairs.items()}
    known = Kept(NAME, 1, 0, False, PASSES)
    twin_of = {buffer: index for index, buffer in enumerate(pairs, len(program.buffers))}
    twins = [Buffer(name=f"gradient of {row[0][0]}", bytes=sizes[buffer], kind=Kind.STATE) for buffer, row in pairs.items()]
    last = [op for op in program.ops if op.phase is Phase.UPDATE]
    ops, updates = [op for op in program.ops if op.phase is not Phase.UPDATE], {}
    for row in rows_of(sizes, when):
        own = [twin_of[buffer] for buffer in row]
        reads = sorted({*own, *(traced.owner[node] for buffer in row for _, node in pairs[buffer])})
        name = f"gradient of {pairs[row[0]][0][0]}" + (f" and {len(row) - 1} more" if len(row) > 1 else "")
        named = {pairs[buffer][0][0]: sizes[buffer] for buffer in row}
        updates[len(ops)] = tuple(pair for buffer in row for pair in pairs[buffer])
        op = make_op(f"add to the {name}", known, Phase.BACKWARD, reads, own, named)
        ops.append(msgspec.structs.replace(op, target=NAME, key=op.key.replace(f"optimizer.{NAME}", NAME)))
    instead = {traced.owner[node] for row in pairs.values() for _, node in row}
    for op in last:  # the optimizer reads what has been added up, which is resident
        ops.append(msgspec.structs.replace(op, reads=tuple(buffer for buffer in op.reads if buffer not in instead)))
    held = {traced.owner[node] for node in traced.outputs if isinstance(node, fx.Node)}
    held |= {traced.owner[node] for _, node in left}
    held |= {traced.owner[node] for node, source in traced.sources.items() if source.kind == "tangent"}
    program = msgspec.structs.replace(
        program,
        buffers=(*program.buffers, *twins),
        ops=tuple(ops),
        outputs=tuple(buffer for buffer in program.outputs if buffer not in instead or buffer in held),
    )
    program.verify()
    nodes = (*traced.nodes, *[None] * len(updates))  # an optimizer's step, which has moved to the end, has none either
    return replace(traced, program=program, nodes=nodes, gradients=tuple(left), updates=updates, adds=True)


def added_up(captured: "Captured") -> "Captured":
    """What was captured, with a step that adds to the gradients that are there."""
    traced, sized = accumulating(captured.traced), captured.sized
    if sized is not None:
        sized = replace(sized, family=family_of(traced, sized.symbols, sized.loss))
    return replace(captured, traced=traced, program=traced.program, sized=sized)


def handed_over(traced: Traced) -> frozenset[str]:
    """Parameters whose gradients may be kept as they are made: each is a whole storage, which nothing else lies in."""
    owners: dict[int, int] = {}
    every = [node for row in traced.updates.values() for _, node in row] + [node for _, node in traced.gradients]
    for node in every:
        owners[traced.owner[node]] = owners.get(traced.owner[node], 0) + 1
    ends = [node for node in (*traced.outputs, *traced.sources) if isinstance(node, fx.Node)]
    taken = {traced.owner[node] for node in ends if node in traced.owner}
    return frozenset(
        name
        for row in traced.updates.values()
        for name, node in row
        if owners[traced.owner[node]] == 1
        and traced.owner[node] not in taken
        and node is traced.base[traced.owner[node]]
        and node.meta["val"].nbytes == node.meta["val"].untyped_storage().nbytes()
    )

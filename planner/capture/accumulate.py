"""A traced step that adds into the gradients that are there, each as soon as it is complete, as autograd does in eager mode.

A planned step is one node of autograd and returns its gradients together. Beside those of earlier steps (accumulation over
micro-batches, several calls before one backward pass) they would all lie a second time. Here `.grad` of each parameter is
resident, and an op adds to it where the gradient is complete; what was made for it is free then.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from torch import fx

from ..ir.plan import Kept
from ..ir.program import Buffer, Kind, Phase
from .graph import Traced
from .observers import is_observation
from .optimizers import make_op, rows_of
from .prune import without
from .restore import terms_of
from .sized import family_of

if TYPE_CHECKING:
    from .capture import Captured

NAME = "accumulate"
PASSES = 3  # the gradient and `.grad` are read, and `.grad` is written


def accumulating(traced: Traced, terms: bool = False) -> Traced:
    """The same step with an op for each parameter that adds its gradient to what is there; small ones share ops.

    Args:
        traced: a training step whose gradients are returned.
        terms: add each term of a gradient that is a sum by itself, as autograd does where several calls share a backward pass:
            ((b2 + b1) + a2) + a1 of two calls a and b in which a parameter is used twice. Where gradients of an earlier pass
            are there, the terms are added up first, in memory that is counted.
    """
    split = {node: terms_of(node) for _, node in traced.gradients if terms and is_sum(traced, node)}
    dead = {each for _, sums in split.values() for each in sums}
    pairs: dict[str, list[fx.Node]] = {}
    place_of: dict[str, fx.Node] = {}
    left = []
    for place, node in traced.gradients:
        source = traced.sources[place]
        if source.kind == "parameter":
            pairs[source.name] = split[node][0] if node in split else [node]
            place_of[source.name] = place
        else:
            left.append((place, node))
    traced = without(replace(traced, gradients=tuple(left)), dead)
    return with_ops(traced, {traced.owner[place_of[name]]: [(name, node) for node in row] for name, row in pairs.items()})


def is_sum(traced: Traced, node: fx.Node) -> bool:
    """Whether a gradient is a sum that nothing else reads: each part of it an op of its own."""
    terms, sums = terms_of(node)
    calls = set(traced.nodes)
    ends = {traced.owner.get(end) for end in (*traced.outputs, *traced.sources)}
    alone = len(node.users) == 1 and all(traced.owner[each] not in ends and each in calls for each in sums)
    return len(terms) > 1 and alone and all(term.meta["val"].dtype == node.meta["val"].dtype for term in terms)


def with_ops(traced: Traced, pairs: dict[int, list[tuple[str, fx.Node]]]) -> Traced:
    """The step with resident gradients, and the ops that add to them.

    Args:
        traced: the step, of whose gradients those that are returned are left.
        pairs: for each parameter's buffer its name and the terms of its gradient.
    """
    program, left = traced.program, traced.gradients
    made = {buffer: at for at, op in enumerate(program.ops) for buffer in op.writes}
    sizes = {buffer: program.buffers[buffer].bytes for buffer in pairs}
    when = {buffer: max(made.get(traced.owner[node], -1) for _, node in row) for buffer, row in pairs.items()}
    known = Kept(NAME, 1, 0, False, PASSES)
    twin_of = {buffer: index for index, buffer in enumerate(pairs, len(program.buffers))}
    twins = [Buffer(name=f"gradient of {row[0][0]}", bytes=sizes[buffer], kind=Kind.STATE) for buffer, row in pairs.items()]
    last = [op for op in program.ops if op.phase is Phase.UPDATE]
    ops, updates = [op for op in program.ops if op.phase is not Phase.UPDATE], {}
    several = [buffer for buffer, row in pairs.items() if len(row) > 1]
    twins += [Buffer(name=f"sum for {pairs[buffer][0][0]}", bytes=sizes[buffer], kind=Kind.STATE) for buffer in several]
    ops_for = [([buffer], (pair,)) for buffer in several for pair in pairs[buffer]]
    single = {buffer: size for buffer, size in sizes.items() if len(pairs[buffer]) == 1}
    ops_for += [(row, tuple(pairs[buffer][0] for buffer in row)) for row in rows_of(single, when)]
    order: dict[int, int] = {}  # parameter -> what its last op has written, of no bytes: terms are added in their order
    for row, added in ops_for:
        reads = {traced.owner[node] for _, node in added}
        reads |= {order[row[0]]} if row[0] in order else {twin_of[buffer] for buffer in row}
        name = f"gradient of {added[0][0]}" + (f" and {len(row) - 1} more" if len(row) > 1 else "")
        named = {pairs[buffer][0][0]: sizes[buffer] for buffer in row}
        updates[len(ops)] = added
        op = make_op(f"add to the {name}", known, Phase.BACKWARD, sorted(reads), [twin_of[buffer] for buffer in row], named)
        writes = ()
        if row[0] in several and added[0] is not pairs[row[0]][-1]:
            writes = (len(program.buffers) + len(twins),)
            order[row[0]] = writes[0]
            twins.append(Buffer(name=f"order of {added[0][0]}", bytes=0, kind=Kind.TEMPORARY))
        ops.append(msgspec.structs.replace(op, target=NAME, key=op.key.replace(f"optimizer.{NAME}", NAME), writes=writes))
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
    return replace(traced, program=program, nodes=nodes, updates=updates, adds=True)


def added_up(captured: "Captured", terms: bool = False) -> "Captured":
    """What was captured, with a step that adds to the gradients that are there; `terms` as for `accumulating`."""
    traced, sized = accumulating(captured.traced, terms), captured.sized
    if sized is not None:
        sized = replace(sized, family=family_of(traced, sized.symbols, sized.loss))
    return replace(captured, traced=traced, program=traced.program, sized=sized)


def handed_over(traced: Traced) -> frozenset[str]:
    """Parameters whose gradients may be kept as they are made: each is a whole storage, which nothing else lies in."""
    pairs = [pair for row in traced.updates.values() for pair in row]
    owners = Counter(traced.owner[node] for node in [*(node for _, node in pairs), *(node for _, node in traced.gradients)])
    ends = [node for node in (*traced.outputs, *traced.sources) if isinstance(node, fx.Node)]
    taken = {traced.owner[node] for node in ends if node in traced.owner}
    seen = [node for node in traced.nodes if node is not None and is_observation(node)]  # by hooks, which may keep it
    taken |= {traced.owner[shown] for node in seen for shown in node.all_input_nodes}

    def alone(node: fx.Node) -> bool:
        buffer, value = traced.owner[node], node.meta["val"]
        whole = node is traced.base[buffer] and value.nbytes == value.untyped_storage().nbytes()
        return owners[buffer] == 1 and buffer not in taken and whole

    return frozenset(name for name, _ in pairs) - frozenset(name for name, node in pairs if not alone(node))

"""A traced step without some of its ops, where nothing is left that reads what they make."""

from dataclasses import replace

import msgspec
from torch import fx

from ..ir.program import Op
from .graph import Traced


def without(traced: Traced, dead: set[fx.Node]) -> Traced:
    """The step without the calls of some nodes, and without the buffers that they make.

    Args:
        traced: the step, which no longer refers to what these make.
        dead: nodes of calls. What reads their results is dead too.
    """
    program = traced.program
    gone = {index for index, node in enumerate(traced.nodes) if node is not None and node in dead}
    lost = {buffer for index in gone for buffer in program.ops[index].writes}
    op_of = {old: new for new, old in enumerate(index for index in range(len(program.ops)) if index not in gone)}
    buffer_of = {old: new for new, old in enumerate(index for index in range(len(program.buffers)) if index not in lost)}

    def renumbered(op: Op) -> Op:
        pairs = [(new, old) for new, old in op.reuse if new not in lost and old not in lost]
        return msgspec.structs.replace(
            op,
            reads=tuple(buffer_of[buffer] for buffer in op.reads),
            writes=tuple(buffer_of[buffer] for buffer in op.writes),
            mutates=tuple(buffer_of[buffer] for buffer in op.mutates),
            reuse=tuple((buffer_of[new], buffer_of[old]) for new, old in pairs),
        )

    made = msgspec.structs.replace(
        program,
        buffers=tuple(buffer for index, buffer in enumerate(program.buffers) if index not in lost),
        ops=tuple(renumbered(op) for index, op in enumerate(program.ops) if index not in gone),
        outputs=tuple(buffer_of[buffer] for buffer in program.outputs if buffer not in lost),
    )
    made.verify()
    return replace(
        traced,
        program=made,
        nodes=tuple(node for index, node in enumerate(traced.nodes) if index not in gone),
        base={buffer_of[buffer]: node for buffer, node in traced.base.items() if buffer not in lost},
        owner={node: buffer_of[buffer] for node, buffer in traced.owner.items() if buffer not in lost},
        mutations={op_of[op]: pair for op, pair in traced.mutations.items()},
        in_place={
            (op_of[op], buffer_of[buffer]): form
            for (op, buffer), form in traced.in_place.items()
            if op not in gone and buffer not in lost
        },
        updates={op_of[op]: pairs for op, pairs in traced.updates.items()},
        states={buffer_of[buffer]: state for buffer, state in traced.states.items()},
    )

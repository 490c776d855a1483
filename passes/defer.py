"""What only the backward pass needs, run there: where that leaves fewer bytes between the passes.

Eager runs it in the forward pass: a mask that a loss keeps for its gradient, the gradients themselves that it makes chunk by
chunk and keeps in their place. A mask had better be made when it is wanted, from what is kept anyway; of the gradients the
logits of all chunks would have to be kept. So each group of ops that make values for one another moves as a whole or not at
all: where the inputs that it would keep alive are smaller than what it gives to the backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..planner.ir.program import Program


@dataclass(frozen=True)
class Defer:
    """Program -> an order of its ops in which the groups that had better wait run just before their first reader."""

    name = "defer"

    def __call__(self, program: Program) -> list[int]:
        """Op indices in time order."""
        read_late = {buffer for op in program.ops[program.boundary + 1 :] for buffer in op.reads} | set(program.outputs)
        late: set[int] = set()
        for group in groups(program, movable(program)):
            if kept(program, group, read_late) > needed(program, group, read_late):
                late.update(group)
        if not late:
            return list(range(len(program.ops)))
        order = [index for index in range(program.boundary + 1) if index not in late]
        done = set(order)

        def emit(first: int) -> None:
            """The op, after what it needs of the others."""
            stack = [first]
            while stack:
                makers = {program.producer[buffer] for buffer in program.ops[stack[-1]].reads} & late - done
                if makers:
                    stack += sorted(makers, reverse=True)
                    continue
                index = stack.pop()
                if index not in done:
                    done.add(index)
                    order.append(index)

        for index in [*range(program.boundary + 1, len(program.ops)), *sorted(late)]:
            if index not in done:
                emit(index)
        return order


def movable(program: Program) -> set[int]:
    """Forward ops that nothing before the end of the loss needs, and that may run at any time."""
    if program.boundary == len(program.ops):
        return set()
    wanted = set(program.ops[program.boundary].reads)
    found = set()
    for index in range(program.boundary - 1, -1, -1):
        op = program.ops[index]
        if op.random or op.mutates or not op.repeatable or wanted & set(op.writes):
            wanted.update(op.reads)
        else:
            found.add(index)
    return found


def groups(program: Program, ops: set[int]) -> list[list[int]]:
    """The ops in groups, of which none reads what another writes; ascending."""
    leader = {index: index for index in ops}

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for index in sorted(ops):
        for maker in {program.producer[buffer] for buffer in program.ops[index].reads} & ops:
            leader[find(index)] = find(maker)
    found: dict[int, list[int]] = {}
    for index in sorted(ops):
        found.setdefault(find(index), []).append(index)
    return list(found.values())


def size(program: Program, buffers: Iterable[int]) -> int:
    """Bytes of buffers."""
    return sum(program.buffers[buffer].bytes for buffer in buffers)


def kept(program: Program, group: Iterable[int], read_late: set[int]) -> int:
    """Bytes that lie between the passes if a group runs in the forward pass.

    Args:
        program: whose ops they are.
        group: the ops.
        read_late: buffers that are needed after the loss.
    """
    return size(program, {buffer for index in group for buffer in program.ops[index].writes} & read_late)


def needed(program: Program, group: Iterable[int], read_late: set[int]) -> int:
    """Bytes that lie there, beside what does anyway, if it runs in the backward pass. The arguments are those of `kept`."""
    read = {buffer for index in group for buffer in program.ops[index].reads if program.producer[buffer] >= 0}
    return size(program, read - {buffer for index in group for buffer in program.ops[index].writes} - read_late)

"""Operator order for peak memory: run at once what frees more than it takes.

List scheduling over the backward pass. Among the ops that are ready, one that leaves fewer bytes live than it found is
run first (of several the one that needs the fewest new bytes); where there is none, the traced order goes on. In a
linear layer's backward pass this computes the weight's gradient, which ends the life of the layer's input, before the
input's gradient, which needs new bytes. Independent ops change places; no sum changes its order, so the numbers are
the same.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..planner.ir.program import Phase, Program


@dataclass(frozen=True)
class Reorder:
    """Order -> the same with what comes after the loss rearranged, to be taken as the base order."""

    name = "reorder"

    def __call__(self, program: Program, order: Sequence[int] | None = None) -> list[int]:
        """Op indices in time order: the forward pass as it was, the backward pass rearranged.

        Args:
            program: whose ops are ordered.
            order: each op once; default: the program's own.
        """
        order = range(len(program.ops)) if order is None else order
        ops, made_by = program.ops, program.producer
        place = {index: at for at, index in enumerate(order)}
        loss = place.get(program.boundary, len(order))
        waiting = {index for index in order[loss + 1 :] if ops[index].phase is not Phase.UPDATE}
        if not waiting:
            return list(order)
        readers: dict[int, int] = {}
        for index in waiting:
            for buffer in ops[index].reads:
                readers[buffer] = readers.get(buffer, 0) + 1
        held = set(program.outputs)
        size = [buffer.bytes if op >= 0 else 0 for buffer, op in zip(program.buffers, made_by, strict=True)]
        pending = {index: {made_by[buffer] for buffer in ops[index].reads} & waiting for index in waiting}
        strange = {index for index in waiting if not ops[index].repeatable and not ops[index].target.startswith("aten.")}
        ordered = sorted(strange | {index for index in waiting if ops[index].random})
        for before, after in pairwise(ordered):  # other processes, and the stream of random numbers, count on their order
            pending[after].add(before)
        users: dict[int, list[int]] = {}
        for index, needs in pending.items():
            for need in needs:
                users.setdefault(need, []).append(index)

        def effect(index: int) -> tuple[int, int]:
            """Bytes that the op makes, and bytes fewer live after it than before it."""
            op = ops[index]
            dying = sum(size[buffer] for buffer in op.reads if readers[buffer] == 1 and buffer not in held)
            return (
                sum(size[buffer] for buffer in op.writes) + op.workspace,
                dying - sum(size[buffer] for buffer in op.writes if readers.get(buffer) or buffer in held),
            )

        def consider(index: int) -> None:
            """Note what running a ready op would free."""
            made, freed = effect(index)
            if freed > 0:
                freeing[index] = made, -freed, place[index]

        ready = sorted(place[index] for index in waiting if not pending[index])  # as places, and so is what is freeing
        freeing: dict[int, tuple[int, int, int]] = {}  # of the ready ops, those that free more than they make
        waits_for: dict[int, list[int]] = {}  # buffer -> ops that read it
        for index in waiting:
            for buffer in ops[index].reads:
                waits_for.setdefault(buffer, []).append(index)
        for at in ready:
            consider(order[at])

        def pick() -> Iterator[int]:
            while ready:
                at = min(freeing.values())[2] if freeing else ready[0]
                del ready[bisect_left(ready, at)]
                chosen = order[at]
                freeing.pop(chosen, None)
                pending[chosen] = {-1}  # no longer ready
                yield chosen
                for buffer in ops[chosen].reads:
                    readers[buffer] -= 1
                for user in users.get(chosen, ()):
                    pending[user].discard(chosen)
                    if not pending[user]:
                        insort(ready, place[user])
                        consider(user)
                for buffer in ops[chosen].reads:  # the last reader of a buffer is the one that frees it
                    if readers[buffer] == 1:
                        for user in waits_for[buffer]:
                            if not pending[user]:
                                consider(user)

        early, late = order[: loss + 1], [index for index in order[loss + 1 :] if index not in waiting]
        return [*early, *pick(), *late]

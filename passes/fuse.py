"""A program as an accelerator with a vector unit runs it: what is done to a result on its way out takes no storage.

An op joins the one before it if that alone makes what it reads (weights aside), if nobody else reads that, and if it
could be written in place: a convolution takes its normalisation and activation with it. COSMA's operators (arXiv
2311.18246) are of this kind: a ResNet-50 has 72 of them, not 175.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ..planner.ir.program import Buffer, Kind, Op, Program

WEIGHTS = (Kind.PARAMETER, Kind.CONSTANT)
# Elementwise, though torch does not say so: with fixed statistics a normalisation scales and shifts each channel.
STREAMING = ("aten._native_batch_norm_legit_no_training.default", "aten.hardswish.default")


@dataclass(frozen=True)
class Fused:
    """A program of groups.

    Attributes:
        program: an op for each group.
        groups: for each of its ops those of the original that it stands for, in order.
        origin: for each of its buffers the original one.
    """

    program: Program
    groups: tuple[tuple[int, ...], ...]
    origin: tuple[int, ...]


@dataclass(frozen=True)
class Fuse:
    """Inference program -> `Fused`.

    Attributes:
        weights: keep parameters and constants; without, ops read them from wherever they are, and they take no room.
        vector: join ops; without, each is its own group.
    """

    name = "fuse"
    weights: bool = True
    vector: bool = True

    def __call__(self, program: Program, sizes: Sequence[int] | None = None) -> Fused:
        """The groups.

        Args:
            program: an inference.
            sizes: bytes of each buffer, where they are not the program's own.
        """
        groups = self.join(program) if self.vector else [[index] for index in range(len(program.ops))]
        size = [buffer.bytes for buffer in program.buffers] if sizes is None else list(sizes)
        of_group = {index: group[0] for group in groups for index in group}
        readers = readers_of(program)
        inside = {
            buffer
            for group in groups
            for index in group[:-1]
            for buffer in program.ops[index].writes
            if buffer not in program.outputs and all(of_group[reader] == group[0] for reader in readers[buffer])
        }
        dropped = set() if self.weights else {b for b, buffer in enumerate(program.buffers) if buffer.kind in WEIGHTS}
        origin = tuple(b for b in range(len(program.buffers)) if b not in inside | dropped)
        new = {old: index for index, old in enumerate(origin)}
        ops = tuple(group_op(program, group, new) for group in groups)
        buffers = tuple(Buffer(program.buffers[old].name, size[old], program.buffers[old].kind) for old in origin)
        outputs = tuple(sorted(new[buffer] for buffer in program.outputs))
        fused = msgspec.structs.replace(program, buffers=buffers, ops=ops, outputs=outputs)
        fused.verify()
        return Fused(fused, tuple(map(tuple, groups)), origin)

    def join(self, program: Program) -> list[list[int]]:
        """Groups of ops, in base order of their last ones."""
        readers, given = readers_of(program), set(program.outputs)
        group: dict[int, list[int]] = {}
        for index, op in enumerate(program.ops):
            made = [buffer for buffer in op.reads if program.producer[buffer] >= 0]
            group[index] = [index]
            if len(made) != 1 or len(op.writes) != 1 or made[0] in given or readers[made[0]] != [index]:
                continue
            before = program.producer[made[0]]
            streams = (op.writes[0], made[0]) in op.reuse or op.target in STREAMING
            same = program.buffers[op.writes[0]].bytes == program.buffers[made[0]].bytes
            if streams and same and group[before][-1] == before:
                group[index] = group[before]
                group[index].append(index)
        return [members for index, members in group.items() if members[-1] == index]


def readers_of(program: Program) -> list[list[int]]:
    """For each buffer the ops that read it."""
    found: list[list[int]] = [[] for _ in program.buffers]
    for index, op in enumerate(program.ops):
        for buffer in op.reads:
            found[buffer].append(index)
    return found


def group_op(program: Program, group: Sequence[int], new: dict[int, int]) -> Op:
    """One op for several that follow each other."""
    ops = [program.ops[index] for index in group]
    written = {buffer for op in ops for buffer in op.writes}
    return msgspec.structs.replace(
        ops[0],
        name=ops[-1].name,
        key=ops[0].key if len(ops) == 1 else "+".join(op.key for op in ops),
        target="+".join(op.target for op in ops),
        reads=tuple(sorted({new[b] for op in ops for b in op.reads if b in new and b not in written})),
        writes=tuple(sorted(new[b] for b in written if b in new)),
        mutates=tuple(sorted({new[b] for op in ops for b in op.mutates if b in new})),
        reuse=(),
        repeatable=all(op.repeatable for op in ops),
        random=any(op.random for op in ops),
        flops=sum(op.flops for op in ops),
        traffic=sum(op.traffic for op in ops),
        seconds=sum(op.seconds for op in ops),
        workspace=0,
    )

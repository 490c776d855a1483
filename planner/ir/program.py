"""`Program`: one training step (or one inference) as operations over storages.

The grammar, on one screen:

    Program = Buffer* Op* outputs
    Buffer  = kind bytes                  one storage: every view of it is the same buffer
    Op      = target reads writes phase   one kernel call; views are not ops, for they cost nothing

A buffer without a producer is *resident*: it is live before the step and after it, and the caller owns it
(parameters, optimizer state, inputs). The order of `Program.ops` is a topological order and is the *base order*:
what runs when nothing is planned.
"""

import hashlib
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import networkx as nx

SUM = -1  # `Op.group` of the sums that autograd makes


class Kind(StrEnum):
    """What a buffer is to the user; pictures stack by it."""

    PARAMETER = "parameter"
    STATE = "state"  # optimizer state
    INPUT = "input"
    CONSTANT = "constant"  # buffers of the module, tensors lifted out of its code
    ACTIVATION = "activation"  # made by the forward pass and read by the backward pass
    TEMPORARY = "temporary"  # made and read in one pass
    GRADIENT = "gradient"  # of a parameter or an input that asks for one
    OUTPUT = "output"


class Phase(StrEnum):
    """The part of the step an op belongs to."""

    FORWARD = "forward"
    LOSS = "loss"  # the caller's own code between the passes: reads the outputs, writes the tangents
    BACKWARD = "backward"
    UPDATE = "update"  # the optimizer


class Buffer(msgspec.Struct, frozen=True):
    """One storage.

    Attributes:
        name: the tensor's name in the model where it has one, else the producing op's.
        bytes: the storage's size, rounded as the device's allocator rounds it.
        kind: what it is to the user.
    """

    name: str
    bytes: int
    kind: Kind


class Op(msgspec.Struct, frozen=True):
    """One kernel call.

    Attributes:
        name: unique in the program.
        target: the operator, such as `aten.mm.default`.
        key: everything that decides its cost: target, literals, and the shapes, strides and types of its tensors.
        phase: the part of the step.
        reads: buffers whose contents decide the result.
        writes: buffers it makes. They come into being when it starts.
        mutates: resident buffers it changes for good (BatchNorm's statistics).
        reuse: pairs (written buffer, read buffer): the op can write the first in place of the second.
        repeatable: running it again with the same reads gives the same writes and nothing else happens.
        random: it draws random numbers; a repetition must draw the same ones, which is the backend's duty.
        flops: floating-point operations.
        traffic: bytes read and written.
        seconds: time on the machine planned for; 0.0 until a cost model has filled it in.
        workspace: bytes the kernel allocates beside its outputs and frees before it ends.
        where: the module that called it, such as `model.layers.0.mlp`; empty where unknown.
        group: ops of the backward pass that one autograd node runs share a number; 0 where none is known, SUM for a sum of
            gradients that autograd makes between nodes.
    """

    name: str
    target: str
    key: str
    phase: Phase
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    mutates: tuple[int, ...] = ()
    reuse: tuple[tuple[int, int], ...] = ()
    repeatable: bool = True
    random: bool = False
    flops: float = 0.0
    traffic: int = 0
    seconds: float = 0.0
    workspace: int = 0
    where: str = ""
    group: int = 0


class Program(msgspec.Struct, frozen=True, dict=True):
    """A step: `ops` in base order over `buffers`, which ops and outputs name by index.

    Attributes:
        name: for people.
        buffers: every storage of the step.
        ops: every kernel call of the step, in an order that works.
        outputs: buffers that must be live when the step ends, besides the resident ones.
        device: the type of device it was captured for, `cpu` or `cuda`.
    """

    name: str
    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    device: str = "cpu"

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """For each buffer the op that makes it, or -1 for a resident one."""
        made = [-1] * len(self.buffers)
        for index, op in enumerate(self.ops):
            for buffer in op.writes:
                made[buffer] = index
        return tuple(made)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes live throughout: parameters, optimizer state, inputs, constants."""
        return sum(buffer.bytes for buffer, op in zip(self.buffers, self.producer, strict=True) if op < 0)

    @cached_property
    def boundary(self) -> int:
        """The index of the loss op, which ends the forward pass; `len(ops)` for an inference."""
        return next((index for index, op in enumerate(self.ops) if op.phase is Phase.LOSS), len(self.ops))

    @cached_property
    def digest(self) -> str:
        """A hash of the structure: what must agree for a schedule to mean the same. Costs are left out."""
        sha = hashlib.sha256()
        for buffer in self.buffers:
            sha.update(f"{buffer.bytes},{buffer.kind};".encode())
        for op in self.ops:
            facts = (op.key, op.phase, op.reads, op.writes, op.mutates, op.reuse, op.repeatable, op.random)
            sha.update(repr(facts).encode())
        sha.update(repr((self.outputs, self.device)).encode())
        return sha.hexdigest()

    def verify(self) -> None:
        """Check what every pass may rely on.

        Raises:
            ValueError: an index out of range, a figure that cannot be, a buffer written twice, read before it is written, or
                written in place of one that the op does not read.
        """
        count = len(self.buffers)
        for buffer in self.buffers:
            if buffer.bytes < 0:
                raise ValueError(f"{buffer.name} has {buffer.bytes} bytes")
        for op in self.ops:
            for buffer in (*op.reads, *op.writes, *op.mutates, *(b for pair in op.reuse for b in pair)):
                if not 0 <= buffer < count:
                    raise ValueError(f"{op.name} names buffer {buffer} of {count}")
            figures = {"workspace": op.workspace, "seconds": op.seconds, "flops": op.flops, "traffic": op.traffic}
            for what, figure in figures.items():
                if not 0 <= figure < float("inf"):
                    raise ValueError(f"{op.name} has {what} {figure}")
            if any(new not in op.writes or old not in op.reads for new, old in op.reuse):
                raise ValueError(f"{op.name} cannot write in place what it does not write, or of what it does not read")
        known = {index for index, op in enumerate(self.producer) if op < 0}
        for op in self.ops:
            missing = set(op.reads) - known
            if missing:
                raise ValueError(f"{op.name} reads {self.buffers[min(missing)].name} before it is written")
            if known & set(op.writes):
                raise ValueError(f"{op.name} writes {self.buffers[min(known & set(op.writes))].name} a second time")
            known.update(op.writes)
        if set(self.outputs) - known:
            raise ValueError(f"output {min(set(self.outputs) - known)} is never written")

    def to_networkx(self) -> "nx.DiGraph":
        """The ops as a graph of networkx, for its algorithms: critical paths, cuts, drawings.

        Nodes are indices of ops, with `name`, `target`, `phase`, `flops` and `seconds`. An edge leads from an op to one that
        reads what it makes, with the `buffers` read, as indices, and their `bytes`. Resident buffers have no producer and so no
        edge; what an op changes for good (`Op.mutates`) orders nothing here.

        Example:
            >>> from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
            >>> buffers = (Buffer("w", 64, Kind.PARAMETER), Buffer("a", 16, Kind.ACTIVATION), Buffer("b", 8, Kind.OUTPUT))
            >>> first = Op("mm", "aten.mm.default", "mm", Phase.FORWARD, reads=(0,), writes=(1,), seconds=3e-6)
            >>> last = Op("sum", "aten.sum.default", "sum", Phase.FORWARD, reads=(1,), writes=(2,), seconds=1e-6)
            >>> graph = Program("net", buffers, (first, last), outputs=(2,)).to_networkx()
            >>> graph.nodes[0]["target"], graph.edges[0, 1]
            ('aten.mm.default', {'buffers': (1,), 'bytes': 16})
        """
        import networkx as nx

        graph: nx.DiGraph = nx.DiGraph(name=self.name)
        for index, op in enumerate(self.ops):
            graph.add_node(index, name=op.name, target=op.target, phase=op.phase.value, flops=op.flops, seconds=op.seconds)
        for index, op in enumerate(self.ops):
            read: dict[int, list[int]] = {}
            for buffer in dict.fromkeys(op.reads):
                if self.producer[buffer] >= 0:
                    read.setdefault(self.producer[buffer], []).append(buffer)
            for producer, buffers in read.items():
                size = sum(self.buffers[buffer].bytes for buffer in buffers)
                graph.add_edge(producer, index, buffers=tuple(buffers), bytes=size)
        return graph

    def __str__(self) -> str:
        from .text import show_program

        return show_program(self)

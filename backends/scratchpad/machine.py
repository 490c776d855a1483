"""A mapping as a program for a scratchpad machine, and a machine that runs it on exactly that many bytes.

    LOAD buffer -> address     start a copy from the memory behind
    STORE buffer <- address    start a copy to it
    WAIT buffer                until that copy has ended
    EXEC op operands -> results, all by address

The machine's scratchpad is one storage of bytes; operands and results are views of it. An op and what is joined to it
run as eager PyTorch's kernels, the last one's result goes to its address. A copy arrives when it is waited for, and until
then its target holds poison, so that a program that reads too early or overwrites too early gives wrong numbers.
"""

import json
from collections.abc import Mapping as Table
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ...planner.capture.capture import Captured
from ...planner.capture.nodes import is_pick
from ...planner.ir.errors import MemplanError
from ...planner.ir.schedule import Free, Placement, Run, Start, Wait
from ...planner.pipeline.mapping import Mapping
from ..eager.checks import Checks
from ..tiers.moving import storage_over

POISON = 0xFF  # in every floating-point type not a number


class Operand(msgspec.Struct, frozen=True):
    """A buffer in the scratchpad: its name, its bytes, and where they begin."""

    buffer: int
    name: str
    bytes: int
    address: int


class Copy(msgspec.Struct, frozen=True):
    """LOAD or STORE: `away` is an address in the spill area of the memory behind, or None for what is at home there."""

    what: str
    operand: Operand
    away: int | None


class Await(msgspec.Struct, frozen=True):
    """WAIT for the copy of a buffer: `what` is the kind of copy."""

    what: str
    buffer: int
    name: str


class Exec(msgspec.Struct, frozen=True):
    """EXEC: op `index` of the mapped program."""

    index: int
    name: str
    kernel: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]


@dataclass(frozen=True)
class Assembly:
    """A program for the machine.

    Attributes:
        name: of what was mapped.
        scratchpad: bytes.
        spill: bytes of the spill area in the memory behind.
        code: instructions in order.
    """

    name: str
    scratchpad: int
    spill: int
    code: tuple[Copy | Await | Exec, ...]

    def to_json(self) -> str:
        """One object: see the fields."""
        rows = [{"do": type(step).__name__.lower(), **msgspec.to_builtins(step)} for step in self.code]
        return json.dumps({"name": self.name, "scratchpad": self.scratchpad, "spill": self.spill, "code": rows}, indent=1)

    def __str__(self) -> str:
        lines = [f"; {self.name}: scratchpad {self.scratchpad} bytes, spill area {self.spill} bytes"]
        for step in self.code:
            match step:
                case Copy(what, operand, away):
                    there = operand.name if away is None else f"spill+{away:#x}"
                    arrow = "->" if what == "LOAD" else "<-"
                    lines.append(f"{what:<5} {there} {arrow} {operand.address:#x} {operand.bytes}")
                case Await(what, _, name):
                    lines.append(f"WAIT  {what} {name}")
                case Exec(_, name, kernel, operands, results):
                    read, made = (", ".join(f"{each.name}@{each.address:#x}" for each in side) for side in (operands, results))
                    lines.append(f"EXEC  {name} ({kernel}) {read} => {made}")
        return "\n".join(lines) + "\n"


def assemble(mapping: Mapping) -> Assembly:
    """The instructions of a mapping's schedule, with addresses."""
    program, machine, schedule = mapping.fused.program, mapping.machine, mapping.schedule
    places: dict[tuple[int, int, int], Placement] = {(p.buffer, p.tier, p.lower): p for p in schedule.placements}
    here: dict[int, int] = {}
    there: dict[int, int] = {}
    code: list[Copy | Await | Exec] = []

    def operand(buffer: int) -> Operand:
        return Operand(buffer, program.buffers[buffer].name, program.buffers[buffer].bytes, here[buffer])

    for at, step in enumerate(schedule.instructions):
        if isinstance(step, Start):
            into = machine.tier_index(machine.links[step.link].target)
            place = places.get((step.buffer, into, at))
            if into == 0 and place is not None:
                here[step.buffer] = place.offset
            elif place is not None:
                there[step.buffer] = place.offset
            code.append(Copy("STORE" if into else "LOAD", operand(step.buffer), there.get(step.buffer)))
        elif isinstance(step, Wait):
            into = machine.tier_index(machine.links[step.link].target)
            code.append(Await("STORE" if into else "LOAD", step.buffer, program.buffers[step.buffer].name))
        elif isinstance(step, Run):
            op = program.ops[step.op]
            for buffer in op.writes:
                here[buffer] = places[buffer, 0, at].offset
            read, made = (tuple(operand(buffer) for buffer in side) for side in (op.reads, op.writes))
            code.append(Exec(step.op, op.name, op.target, read, made))
        elif isinstance(step, Free) and not step.tier:
            here.pop(step.buffer, None)
    sizes = [place.offset + program.buffers[place.buffer].bytes for place in schedule.placements if place.tier]
    return Assembly(program.name, mapping.capacity, max(sizes, default=0), tuple(code))


@dataclass
class Counted:
    """What a run of the machine came to.

    Attributes:
        loaded: bytes copied into the scratchpad.
        stored: bytes copied out of it.
        time: seconds, by the machine's figures: one queue of copies each way beside the unit.
        busy: seconds of them that the unit computed.
    """

    loaded: int = 0
    stored: int = 0
    time: float = 0.0
    busy: float = 0.0


@dataclass
class Scratchpad:
    """A machine with a program in it.

    Attributes:
        model: whose parameters the memory behind holds; what is done to it from here on is refused by a run, except that
            parameters may get other values.
        captured: the inference that was mapped.
        mapping: of it.
        counted: what the last run came to.
    """

    model: nn.Module
    captured: Captured
    mapping: Mapping
    counted: Counted = field(default_factory=Counted)

    def __post_init__(self) -> None:
        self.calls = Checks(self.model, self.captured, tuple(self.captured.traced.sources.values()), lays=True)
        self.traced = self.captured.traced
        self.base = {new: self.traced.base[old] for new, old in enumerate(self.mapping.fused.origin)}
        self.index = {old: new for new, old in enumerate(self.mapping.fused.origin)}

    @cached_property
    def assembly(self) -> Assembly:
        """The program.

        Raises:
            MemplanError: the mapping is for smaller elements than the model's.
        """
        for buffer, node in self.base.items():
            if self.mapping.fused.program.buffers[buffer].bytes < node.meta["val"].untyped_storage().nbytes():
                raise MemplanError(
                    "this mapping is for elements of fewer bits than the model's: it can be planned and shown, and not run"
                )
        return assemble(self.mapping)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed in the scratchpad.

        Raises:
            PlanMismatch: the call is not the one that was mapped, or the model has changed since; the message names what.
        """
        given = [value.detach() for value in self.calls.given(args, kwargs)]
        machine = _Machine(self, dict(zip(self.traced.sources, given, strict=True)))
        with torch.no_grad():
            outputs = machine.execute()
        self.counted = machine.counted
        flat = [outputs[leaf] if isinstance(leaf, int) else leaf[0] for leaf in self.captured.outputs]
        return pytree.tree_unflatten(flat, self.captured.output_spec)


class _Machine:
    """One run: the scratchpad, the memory behind it, and the clock."""

    def __init__(self, owner: Scratchpad, tensors: Table[fx.Node, torch.Tensor]):
        self.owner, self.tensors = owner, tensors
        self.program, self.links = owner.mapping.fused.program, owner.mapping.machine.links
        self.spm = torch.full((owner.assembly.scratchpad,), POISON, dtype=torch.uint8)
        self.spill = torch.full((owner.assembly.spill,), POISON, dtype=torch.uint8)
        self.results: dict[int, torch.Tensor] = {}  # outputs, at home in the memory behind
        self.address: dict[int, int] = {}
        self.flying: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, float]] = {}
        self.free = [0.0] * len(self.links)
        self.counted = Counted()
        first, second = (tier.name for tier in owner.mapping.machine.tiers[:2])
        ways = {"LOAD": (second, first), "STORE": (first, second)}
        self.link = {
            what: max((at for at, link in enumerate(self.links) if (link.source, link.target) == ends),
                      key=lambda at: self.links[at].bandwidth)
            for what, ends in ways.items()
        }  # fmt: skip

    def execute(self) -> list[Any]:
        """Run the program. Returns the traced outputs."""
        for step in self.owner.assembly.code:
            match step:
                case Copy():
                    self.start(step)
                case Await():
                    self.wait(step)
                case Exec():
                    self.exec(step)
        self.address.clear()  # what is asked for now lies in the memory behind
        held = {self.owner.base[buffer]: value for buffer, value in self.results.items()}
        held |= {node: self.given(node) for node in self.owner.traced.sources}
        return [self.value(node, dict(held)) for node in self.owner.traced.outputs]

    def start(self, step: Copy) -> None:
        """Put a copy into its queue."""
        operand = step.operand
        inside = self.spm[operand.address : operand.address + operand.bytes]
        outside = self.outside(step)
        source, target = (outside, inside) if step.what == "LOAD" else (inside, outside)
        target.fill_(POISON)
        self.address[operand.buffer] = operand.address
        link = self.link[step.what]
        self.free[link] = self.owner.mapping.machine.arrival(link, operand.bytes, self.counted.time, self.free)
        self.counted.time += self.links[link].load * operand.bytes / self.links[link].bandwidth
        self.flying[step.what, operand.buffer] = source, target, self.free[link]

    def outside(self, step: Copy) -> torch.Tensor:
        """Where a copy begins or ends in the memory behind, as bytes."""
        operand = step.operand
        if step.away is not None:
            place = self.spill[step.away : step.away + operand.bytes]
            if operand.buffer in self.program.outputs:
                self.results[operand.buffer] = typed(place, 0, self.owner.base[operand.buffer])
            return place
        node = self.owner.base[operand.buffer]
        value = self.given(node)
        whole = value.detach().contiguous() if value.untyped_storage().nbytes() != operand.bytes else value.detach()
        laid = torch.empty(operand.bytes, dtype=torch.uint8)  # in the layout that was traced, whatever the caller's is
        typed(laid, 0, node).copy_(whole)
        return laid

    def wait(self, step: Await) -> None:
        """A copy has ended: its bytes are there."""
        source, target, ends = self.flying.pop((step.what, step.buffer))
        target.copy_(source)
        self.counted.time = max(self.counted.time, ends)
        if step.what == "LOAD":
            self.counted.loaded += target.numel()
        else:
            self.counted.stored += target.numel()

    def exec(self, step: Exec) -> None:
        """Run an op and what is joined to it."""
        self.address |= {each.buffer: each.address for each in (*step.operands, *step.results)}
        known: dict[fx.Node, Any] = {}
        for index in self.owner.mapping.fused.groups[step.index]:
            node = self.owner.traced.nodes[index]
            assert node is not None
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: self.value(arg, known))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for result in step.results:
            node = self.owner.base[result.buffer]
            self.view(result.buffer).copy_(self.value(node, known))
        seconds = self.program.ops[step.index].seconds
        self.counted.time += seconds
        self.counted.busy += seconds

    def value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's tensor: computed in this op, in the scratchpad, a view of such, or one that needs no room there."""
        if node in known:
            return known[node]
        traced, owner = self.owner.traced, self.owner
        if is_pick(node) and node.args[0] in known:
            known[node] = known[node.args[0]][node.args[1]]  # type: ignore[index]
            return known[node]
        buffer = owner.index.get(traced.owner[node]) if node in traced.owner else None
        if buffer is not None and owner.base[buffer] is node:
            return self.view(buffer)
        if node in traced.sources:
            return self.given(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: self.value(arg, known))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def view(self, buffer: int) -> torch.Tensor:
        """A buffer's first tensor, in the scratchpad."""
        return typed(self.spm, self.address[buffer], self.owner.base[buffer])

    def given(self, node: fx.Node) -> torch.Tensor:
        """What the memory behind holds from the start."""
        return self.tensors[node]


def typed(pool: torch.Tensor, address: int, node: fx.Node) -> torch.Tensor:
    """Bytes at an address as a node's tensor."""
    value = node.meta["val"]
    begin = pool.storage_offset() + address
    if begin % value.element_size():
        raise MemplanError(f"{node.name} lies at {begin}, which is no multiple of its {value.element_size()} bytes an element")
    storage = storage_over(pool, address, value.untyped_storage().nbytes())
    return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())

"""A schedule with addresses -> functions that run in one arena: no tensor of the step's own asks the allocator.

The arena is one ordinary torch storage. Each life of a buffer has a tensor over it, made when the code is written, and
so has each view that is read; what a step does is call operators with those tensors. An operator with an `out=` form of
its own writes there; where torch only has a generated form (which allocates and copies inside) or none, the result is
copied into its place and its own memory is a *transient*, counted and reported.
"""

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from ...planner.capture.graph import Traced
from ...planner.capture.nodes import is_call, is_pick
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine
from ...planner.ir.program import Kind, Program
from ...planner.ir.schedule import Run, Schedule
from ..tiers.moving import storage_over
from .accumulation import Accumulation
from .codegen import Generated, Writer
from .out_forms import SPECIAL, find_operator, is_half, out_form, out_names, results_of
from .token import Token, Turn
from .updates import Updates

OCCUPIED = "this planned step's arena holds the tensors of a forward pass whose backward pass has not run: "\
           "run it first, or drop its outputs, or apply the plan without addresses"  # fmt: skip
SEEDED, SEEDS = torch.ops.aten._scaled_dot_product_efficient_attention.default, 2  # its results from this one on are seeds


@dataclass
class Arena:
    """The memory of a planned step.

    Attributes:
        tensor: its bytes.
        transients: op -> bytes of results that were allocated and then copied into the arena.
        turn: it holds the tensors of one step at a time.
        lent: the names of parameters, and the storages of their last gradients, which lie here.
    """

    tensor: torch.Tensor
    transients: dict[str, int] = field(default_factory=dict)
    turn: Turn = field(default_factory=lambda: Turn(OCCUPIED))
    lent: list[tuple[str, StorageWeakRef]] = field(default_factory=list)

    def claim(self) -> Token:
        """Take it for one step.

        Raises:
            MemplanError: the tensors of another step are in it, or gradients that somebody still holds.
        """
        token = self.turn.claim()
        if not all(storage.expired() for _, storage in self.lent):
            gc.collect()
            held = [name for name, storage in self.lent if not storage.expired()]
            if held:
                raise MemplanError(
                    f"the gradient of {held[0]} ({len(held)} in all) lies in the arena and is still held: call "
                    "optimizer.zero_grad() before the next forward pass, or copy what is to be kept, or plan without "
                    "lend_gradients, to accumulate gradients for instance"
                )
        self.lent.clear()
        return token

    def lend(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A gradient in the arena as a tensor with a storage of its own, so that one can tell when nobody holds it."""
        place = value.untyped_storage()
        storage = storage_over(self.tensor, place.data_ptr() - self.tensor.data_ptr(), place.nbytes())
        self.lent.append((name, StorageWeakRef(storage)))
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        return made.set_(storage, value.storage_offset(), value.shape, value.stride())

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.tensor.numel()


def lendable(traced: Traced) -> tuple[int, ...]:
    """Gradients that may lie in an arena: each of one parameter alone, and made by a kernel that can write it there."""
    program = traced.program
    count = Counter(traced.owner[node] for _, node in traced.gradients)
    shown = {traced.owner.get(node) for node in traced.outputs}
    own = {
        buffer
        for buffer in program.outputs
        if program.buffers[buffer].kind is Kind.GRADIENT and program.producer[buffer] >= 0 and count[buffer] == 1
    } - shown
    passing = {buffer for buffers in find_passing(program, own) for buffer in buffers}
    return tuple(sorted(own - passing))


def with_transients(program: Program, outside: Iterable[int] = (), lent: Iterable[int] = ()) -> Program:
    """The program with the memory that results pass through on their way into an arena counted as workspace.

    Args:
        program: as it runs without addresses.
        outside: buffers that are not copied, but stay where they are made.
        lent: outputs that lie in the arena.
    """
    stays, given, ops = set(outside), set(program.outputs) - set(lent), []
    for op, passing in zip(program.ops, find_passing(program, lent), strict=True):
        written_out = find_operator(op.target) in SPECIAL and not passing and not given & set(op.writes)
        own = 0 if written_out else op.workspace
        passed = sum(program.buffers[buffer].bytes for buffer in passing if buffer not in stays)
        ops.append(msgspec.structs.replace(op, workspace=own + passed))
    return msgspec.structs.replace(program, ops=tuple(ops))


def find_passing(program: Program, lent: Iterable[int] = ()) -> list[tuple[int, ...]]:
    """For each op the buffers that it can only make in memory of its own, from where they are copied into an arena."""
    given, found = set(program.outputs) - set(lent), []
    for op in program.ops:
        inside = tuple(buffer for buffer in op.writes if buffer not in given)
        target = find_operator(op.target)
        direct = target is None or results_of(target, program.device, is_half(op)) == len(op.writes) == len(inside)
        found.append(() if direct else inside)
    return found


def generate_static(
    traced: Traced, schedule: Schedule, machine: Machine | None = None, updates: Updates | Accumulation | None = None
) -> Generated:
    """Write and compile the functions that carry out a schedule with placements, and make their arena."""
    return ArenaWriter(traced, schedule, machine, updates).write()


class ArenaWriter(Writer):
    """Writes functions whose variables are only what the caller owns or is given."""

    def __init__(
        self, traced: Traced, schedule: Schedule, machine: Machine | None = None, updates: Updates | Accumulation | None = None
    ):
        super().__init__(traced, schedule, machine, updates)
        here = [place for place in schedule.placements if place.tier == 0]
        self.places = {(place.buffer, place.lower): place.offset for place in here}
        end = max((place.offset + self.program.buffers[place.buffer].bytes for place in here), default=0)
        self.arena = Arena(torch.empty(end, dtype=torch.uint8, device=self.program.device))
        self.given = set(self.program.outputs) - set(schedule.lent)
        self.static: dict[fx.Node, Any] = {}  # nodes whose tensors lie in the arena now; tuples of views among them
        self.tensor_names: dict[tuple[Any, ...], str] = {}
        self.at = -1

    def write(self) -> Generated:
        """The two functions, compiled, with their arena."""
        made = super().write()
        return Generated(**{**made.__dict__, "arena": self.arena})

    def is_lent(self, node: fx.Node) -> bool:
        """Whether a gradient lies in the arena."""
        return node in self.static

    def instruction(self, step: Any) -> None:
        """The lines of one instruction."""
        self.at += 1
        super().instruction(step)

    def taken(self, step: Run) -> int | None:
        """The buffer that a run writes over: none where the result is the caller's, and so lies outside the arena."""
        taken = super().taken(step)
        return None if taken is None or step.reuse[0][0] in self.given else taken

    def make(self, step: Run, node: fx.Node, target: Any, given: list[str], taken: int | None) -> None:
        """The line of a call that writes into the arena."""
        value = node.meta["val"]
        call = f"{self.constant(target, node.name)}({', '.join(given)})"
        if taken is not None and not self.has_place(node):
            super().make(step, node, target, given, taken)
        elif taken is not None:
            self.line(call)
            self.drop(taken)
            self.hold(node)
        elif isinstance(value, torch.Tensor):
            if not self.has_place(node):
                super().make(step, node, target, given, taken)
                for _, old in step.reuse:
                    self.drop(old)
                return
            place = self.tensor_name(self.placed(node))
            if self.results(step, target) == 1:
                self.line(self.call_into(target, node, given, [place]))
            else:
                self.line(f"{place}.copy_({call})")
                self.passing(step, [node])
            if step.keep:
                self.hold(node)
        else:
            self.make_several(step, node, target, given)

    def make_several(self, step: Run, node: fx.Node, target: Any, given: list[str]) -> None:
        """The lines of a call with several results."""
        owner = self.traced.owner
        picks = [pick for pick in node.users if is_pick(pick) and pick in owner]
        inside = {int(pick.args[1]): pick for pick in picks if self.has_place(pick)}  # type: ignore[arg-type]
        kept = [pick for pick in picks if owner[pick] in step.keep]
        results = self.results(step, target)
        if results and sorted(inside) == list(range(results)):
            places = [self.tensor_name(self.placed(inside[index])) for index in range(results)]
            self.line(self.call_into(target, node, given, places))
        else:
            self.line(f"t = {self.constant(target, node.name)}({', '.join(given)})")
            for pick in kept:
                if pick.args[1] not in inside:
                    if pick not in self.scope.alive:
                        self.keep(pick, f"t[{pick.args[1]}]")
                elif pick is inside[pick.args[1]]:  # type: ignore[index]
                    self.line(f"{self.tensor_name(self.placed(pick))}.copy_(t[{pick.args[1]}])")
            self.line("del t")
            self.passing(step, list(inside.values()))
        for pick in kept:
            if pick.args[1] in inside:
                self.hold(pick)

    def arrive(self, node: fx.Node) -> None:
        """The place in the arena of a value that is about to be copied in."""
        if (self.traced.owner[node], self.at) in self.places:
            self.hold(node)
        else:
            super().arrive(node)

    def storage_of(self, node: fx.Node) -> str:
        """A tensor that stands for the bytes of a value's buffer: a piece of the arena, where it lies there."""
        if node not in self.static:
            return super().storage_of(node)
        made = torch.empty(0, dtype=torch.uint8, device=self.arena.tensor.device)
        return self.tensor_name(made.set_(self.static[node].untyped_storage()))

    def results(self, step: Run, target: Any) -> int:
        """How many results a run can write into the arena by itself."""
        return results_of(target, self.program.device, is_half(self.program.ops[step.op]))

    def has_place(self, node: fx.Node) -> bool:
        """Whether a result lies in the arena: not if it is the caller's or lies outside, nor if tracing saw it empty.

        Some kernels (the CPU's LSTM) return scratch space whose size only they know, and which tracing sees as empty. The
        seed and offset of a GPU's efficient attention are numbers in the CPU's memory, whatever tracing says.
        """
        placed = (self.traced.owner[node], self.at) in self.places and node.meta["val"].numel() > 0
        return placed and not (is_pick(node) and node.args[0].target is SEEDED and node.args[1] >= SEEDS)  # type: ignore

    def call_into(self, target: Any, node: fx.Node, given: list[str], places: list[str]) -> str:
        """A call that writes its results into tensors of the arena."""
        form = out_form(target)
        if form is None:
            return f"{self.constant(SPECIAL[target], node.name)}([{', '.join(places)}], {', '.join(given)})"
        outs = [f"{name}={place}" for name, place in zip(out_names(form), places, strict=True)]
        return f"{self.constant(form, node.name)}({', '.join([*given, *outs])})"

    def passing(self, step: Run, nodes: list[fx.Node]) -> None:
        """Count results that pass through memory of their own."""
        size = sum(self.program.buffers[self.traced.owner[node]].bytes for node in nodes)
        if not size:
            return
        name = self.program.ops[step.op].name
        self.arena.transients[name] = max(self.arena.transients.get(name, 0), size)

    def placed(self, node: fx.Node) -> torch.Tensor:
        """A tensor over the address of the life that begins now, laid out as the node's value."""
        like, offset = node.meta["val"], self.places[self.traced.owner[node], self.at]
        storage = storage_over(self.arena.tensor, offset, like.untyped_storage().nbytes())
        made = torch.empty(0, dtype=like.dtype, device=self.arena.tensor.device)
        return made.set_(storage, like.storage_offset(), like.shape, like.stride())

    def hold(self, node: fx.Node) -> None:
        """From here on the node's value lies at the address of the life that begins now."""
        self.bind_static(node, self.placed(node))

    def bind_static(self, node: fx.Node, value: Any) -> None:
        """From here on a node's value is a tensor, or several, that was made before the step."""
        self.static[node] = value
        self.scope.alive[node] = self.tensor_name(value) if isinstance(value, torch.Tensor) else ""
        first = node if node in self.traced.owner else next(pick for pick in node.users if pick in self.traced.owner)
        self.scope.of_buffer.setdefault(self.traced.owner[first], []).append(node)

    def tensor_name(self, value: torch.Tensor) -> str:
        """The global that holds a tensor over the arena."""
        bits = value.is_conj(), value.is_neg()  # views of the same bytes that read otherwise
        key = (value.dtype, value.data_ptr(), value.untyped_storage().nbytes(), tuple(value.shape), value.stride(), *bits)
        if key not in self.tensor_names:
            self.tensor_names[key] = f"a{len(self.tensor_names)}"
            self.constants[self.tensor_names[key]] = value
        return self.tensor_names[key]

    def drop(self, buffer: int, but: str = "") -> None:
        """Forget a buffer; only variables need a line."""
        for node in self.scope.of_buffer.get(buffer, []):
            if self.static.pop(node, None) is not None:
                self.scope.alive.pop(node, None)
        super().drop(buffer, but)

    def read(self, node: Any) -> str:
        """The tensor of a node's value; views of what lies in the arena are made now, once for all steps."""
        if isinstance(node, fx.Node) and node not in self.scope.alive and (is_pick(node) or is_call(node)):
            for needed in node.all_input_nodes:
                self.read(needed)
            if all(needed in self.static for needed in node.all_input_nodes) and node.all_input_nodes:
                with torch.no_grad():
                    args, kwargs = fx.map_arg((node.args, node.kwargs), self.static.__getitem__)
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                self.bind_static(node, value)
        if node in self.static:
            return self.scope.alive[node]
        return super().read(node)

    def crossing(self, rest: tuple[Any, ...]) -> list[fx.Node]:
        """What the backward function is handed: nothing that lies in the arena."""
        return [node for node in super().crossing(rest) if node not in self.static]

    def cross(self, saved: list[fx.Node]) -> None:
        """The backward function begins with what was saved, and with the arena as the forward pass left it."""
        super().cross(saved)
        for node, value in list(self.static.items()):
            self.bind_static(node, value)

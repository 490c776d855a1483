"""One trace of a piece for every size of its inputs, where Dynamo hands it over with symbols for them.

Dynamo's symbols say which dimensions vary and which are equal. The trace has symbols of its own for them, with a book of its
own of what was asked of sizes (`planner.capture.guards`), and is not believed: it is compared with a trace of another shape, op
for op. Then each size has a program computed from expressions, and of the schedules that are known the fastest that the referee
accepts there in the budget; the code reads its sizes from its inputs, and AOTAutograd's wiring serves all of it.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import fx

from ...planner.capture.guards import Holds
from ...planner.capture.questions import inputs_of
from ...planner.capture.sizedcheck import ends_differ, program_differs
from ...planner.capture.sizedconstants import SizedConstants
from ...planner.capture.standins import fake
from ...planner.capture.symbols import SMALLEST, Dynamic, Symbols
from ...planner.cost.table import Table
from ...planner.ir.errors import CaptureError
from ...planner.ir.family import Sizes, rebound
from ...planner.ir.plan import Side
from ...planner.ir.program import Kind, Program
from ...planner.ir.schedule import Schedule
from ...planner.pipeline.member import Member
from ...planner.pipeline.planner import Planner
from ...planner.pipeline.sized import WAYS, Ways
from ..eager.codegen import Generated
from ..eager.sizedcode import SizedWriter

if TYPE_CHECKING:
    from .compilation import Code
    from .partition import Joint


class Varying:
    """Which sizes of a piece's arguments vary, as Dynamo has it.

    Attributes:
        dims: for each argument that is a tensor of which some vary, the dimensions and the names of their sizes.
        numbers: for each argument that is a size its name.
    """

    def __init__(self, graph: fx.Graph):
        self.dims: dict[int, dict[int, str]] = {}
        self.numbers: dict[int, str] = {}
        self.usable = True
        for place, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt):
                self.numbers[place] = str(value.node.expr)
            elif isinstance(value, torch.Tensor):
                named = {dim: size.node.expr for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
                self.usable &= all(expr.is_Symbol for expr in named.values())
                if named:
                    self.dims[place] = {dim: str(expr) for dim, expr in named.items()}
        self.names = tuple(dict.fromkeys(name for named in self.dims.values() for name in named.values()))
        self.usable &= bool(self.dims) and set(self.numbers.values()) <= set(self.names)

    def sizes(self, args: Sequence[Any]) -> Sizes | None:
        """The sizes of a call; None where they cannot vary: one is too small, or Dynamo's expressions are no plain sizes."""
        if not self.usable:
            return None
        found = {name: args[place].shape[dim] for place, named in self.dims.items() for dim, name in named.items()}
        sizes = tuple(int(found[name]) for name in self.names)
        return sizes if min(sizes) >= SMALLEST else None

    def form(self, likeness: Sequence[Any]) -> tuple[Any, ...]:
        """What calls of all sizes have in common, from their likeness (`identity.likeness`)."""
        found = []
        for place, known in enumerate(likeness):
            if place in self.numbers:
                continue
            named = self.dims.get(place)
            if named is not None:
                shape, stride, *rest = known
                known = tuple(size for dim, size in enumerate(shape) if dim not in named), layout(shape, stride), *rest
            found.append(known)
        return tuple(found)

    def alone(self, likeness: Sequence[Any]) -> bool:
        """Whether no tensor of which a size varies shares its memory with another."""
        shared = {known[-2][0] for known in likeness if isinstance(known, tuple) and known[-2] is not None}
        return all(likeness[place][-2] is None and place not in shared for place in self.dims)

    def symbols(self, args: Sequence[Any], sources: Sequence[str]) -> Symbols:
        """Symbols for the sizes of a call."""
        dims: Dynamic = {**self.dims}
        return Symbols(dims, list(args), list(sources))

    def stand_ins(self, symbols: Symbols, args: Sequence[Any], sources: Sequence[str], mode: SizedConstants) -> list[Any]:
        """A call's arguments with symbols for the sizes that vary."""
        found: list[Any] = []
        for place, value in enumerate(args):
            if place in self.numbers:
                found.append(symbols.sizes[self.numbers[place]])
            elif place in self.dims:
                found.append(symbols.stand_in(mode, place, value, sources[place], value.device.type))
            else:
                found.append(fake(mode, value, value.device.type) if isinstance(value, torch.Tensor) else value)
        return found


def layout(shape: Sequence[int], stride: Sequence[int]) -> tuple[Any, ...]:
    """How a tensor of any size lies in memory: the order of its dimensions; its strides too, where it does not fill it."""
    order = tuple(sorted(range(len(stride)), key=lambda dim: (stride[dim], -dim)))
    step = 1
    for dim in order:
        if shape[dim] != 1 and stride[dim] != step:
            return order, tuple(stride)
        step *= shape[dim]
    return (order,)


class SizedTrace:
    """A piece traced for every size.

    Attributes:
        code: of the trace, which those of each size are made from.
        symbols: the sizes.
        holds: whether the trace serves given ones.
        ways: its schedules.
    """

    def __init__(
        self, code: "Code", joint: "Joint", planner: Planner, symbols: Symbols, mode: SizedConstants, table: Table | None,
    ):  # fmt: skip
        """Take a trace.

        Args:
            code: what AOTAutograd made.
            joint: the graph.
            planner: of the program at the sizes of the example.
            symbols: the sizes.
            mode: what it was traced with.
            table: of costs that were measured.

        Raises:
            CaptureError: the model asks about values of its inputs, or its program is no family.
        """
        if inputs_of(mode.questions.different):
            raise CaptureError("the model asks about values of its inputs")
        self.code, self.joint, self.symbols = code, joint, symbols
        self.holds = Holds(symbols, mode.questions.different)

        def write(schedule: Schedule) -> Generated:
            return SizedWriter(joint.traced, symbols, schedule, joint.leaves).write()

        assert joint.family is not None
        self.ways = Ways(planner, joint.family, table, write)
        symbols.let_go()

    def confirm(self, other: "Code", sizes: Sizes) -> None:
        """Compare the trace with that of another shape, of these sizes.

        Raises:
            CaptureError: they differ.
        """
        wrong = "its conditions do not hold" if not self.holds(sizes) else ""
        wrong = wrong or program_differs(self.ways.family, sizes, filled(other.backward.traced.program, self.ways, sizes))
        wrong = wrong or ends_differ(self.joint.traced, other.backward.traced, self.symbols, sizes)
        if wrong:
            raise CaptureError(f"a trace with sizes that vary is another one at {sizes}: {wrong}")

    def start(self, time_limit: float) -> None:
        """Take the schedule that keeps everything, and the smallest found in so many seconds."""
        planner = self.ways.planner
        planner.deadline = time.monotonic() + time_limit
        self.ways.add(planner.kept.schedule)
        self.ways.add(planner.quick_floor.schedule)

    def planner(self, sizes: Sizes) -> Member:
        """What plans for some sizes."""
        return Member(self.ways, sizes)

    def code_for(self, planner: Planner, side: Side) -> "Code":
        """What runs a call of the sizes that a planner is for."""
        way = self.ways.add(rebound(side.schedule, planner.program, self.ways.program))
        while len(self.ways.ways) > WAYS:  # the one that keeps everything is the first, and stays
            self.ways.ways.pop(1 if self.ways.ways[1] is not way else 2)
        return self.code.at_sizes(planner, side, way.code, self)


def filled(program: Program, ways: Ways, sizes: Sizes) -> Program:
    """A program whose inputs fill their memory, as those of a trace for every size do: rows of a larger tensor do not."""
    replace = msgspec.structs.replace
    wanted = ways.family.at(sizes).buffers
    if len(wanted) != len(program.buffers):
        return program
    pairs = zip(program.buffers, wanted, strict=True)
    buffers = tuple(replace(one, bytes=other.bytes) if one.kind is Kind.INPUT else one for one, other in pairs)
    return replace(program, buffers=buffers)


__all__ = ["SizedTrace", "Varying"]

"""The `torch.compile` door: `torch.compile(model, backend="memplan", options={"budget": "16GiB"})`.

Dynamo cuts a model at its graph breaks and hands over the pieces one by one. A piece is traced and planned when it is
first called, with the real arguments before us: so sizes are known, storages can be told apart, and every new shape
gets a plan of its own. AOTAutograd wires it up (aliases, mutated inputs); the partition is a memplan schedule.

What runs depends on the option `inner`:

    eager       the generated code that `Plan.apply` runs: eager's kernels, the schedule to the letter, the same numbers
    inductor    two graphs in the schedule's order, recomputation written out, compiled by Inductor. What is saved and
                what is recomputed is the plan's; temporaries inside are Inductor's, random ops are never repeated, and
                the peak is a prediction without a guarantee

Pieces share one budget, kept in a `Ledger` (see there for the rule) that belongs to the `options` object of one
`torch.compile` call. What a piece may take:

    it ends the model's call    all that is left
    more may follow             keeps everything if that takes at most half of what is left, else as little as it can
    second step and later       all pieces are known: between their least and their most, by one common share, the
                                largest found that satisfies the rule

With "offload" among the option `allow`, and inner="eager", activations may also lie in the tiers behind the device; each
piece has space of its own there.

A run that cannot be made to fit raises `BudgetError` naming the piece, and the pieces before it take as little as they
can from then on. Guaranteed, for inner="eager": the referee's peak of each run, plus what it knows the others to hold,
is within the budget. Not known here, and not counted: parameters that no piece has seen yet, optimizer state, gradients
left from an earlier step, and what the code between pieces allocates (the loss, if it is computed outside). A budget in
percent is each piece's own: that share of its unplanned peak, whatever the others hold. After
`torch._dynamo.config.recompile_limit` recompilations Dynamo runs the model without us.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import _guards, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from ..planner.cost import Table, apply_costs
from ..planner.errors import BudgetError, MemplanError
from ..planner.local import device_key
from ..planner.machine import Machine
from ..planner.native import native_kernels
from ..planner.pipeline import Planner
from ..planner.plan import Side
from ..planner.program import Program
from ..planner.units import parse_bytes, show_bytes
from .codegen import Generated, generate
from .ledger import Ledger, Options, Room, Visit, burden, held_bytes, ledger_of, left_bytes, small_schedules, storages
from .partition import Argument, Joint, describe, emit, pack, token_of, unpack, visits_of

EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")
NOT_USERS = tuple(str(Path(file).resolve().parent) + os.sep for file in (str(torch.__file__), __file__))
NAME = re.compile(r"(?:_modules|_parameters|_buffers)\['([^']+)'\]")


def memplan(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls for each piece of a model.

    Args:
        gm: the piece.
        example_inputs: not looked at: the piece is planned at its first call.
        options: see `Options`. One object is one budget.

    Raises:
        MemplanError: an option that is unknown or makes no sense. A call of the result raises `BudgetError` or
            `CaptureError`.
    """
    return torch._dynamo.disable(Piece(gm, ledger_of(options)), reason="memplan has planned it")


# Pieces


class Piece:
    """A part of a model between two graph breaks, and the code made for each shape it was called with."""

    def __init__(self, gm: fx.GraphModule, ledger: Ledger):
        ledger.pieces += 1
        reason = getattr(gm, "compile_subgraph_reason", None)
        self.gm = gm
        self.ledger = ledger
        self.breaks = bool(getattr(reason, "graph_break", False))
        self.name = f"piece {ledger.pieces}{where_it_ends(reason)}"
        self.lifted = [*gm.parameters(), *gm.buffers()]
        self.sources = [Argument(*kind_and_name(tensor_source(node))) for node in gm.graph.nodes if node.op == "placeholder"]
        self.codes: dict[Any, Code] = {}

    def __call__(self, *args: Any) -> Any:
        """Run, planning first where there is no plan for such arguments, or where it does not fit what is left."""
        ledger = self.ledger
        tensors = [value for value in (*self.lifted, *args) if isinstance(value, torch.Tensor)]
        device = next((value.device.type for value in tensors if value.device.type != "cpu"), "cpu")
        machine = ledger.machine(device)
        inputs = storages(tensors, machine.tiers[0].rounding)
        ledger.enter()
        budget = ledger.budget(machine)
        room = ledger.room(inputs, budget) if budget is not None else None
        key = (torch.is_grad_enabled(), tuple(facts(value) for value in args))
        code = self.codes.get(key)
        if code is None:
            last = self.is_last()
            code = Code.make(self, args, machine, lambda planner: self.choose(planner, room, last), None)
        elif code.wanted is not code.side and (room is None or code.wanted.peak <= room.now):
            wanted = code.wanted
            code = Code.make(self, args, machine, lambda planner: wanted, code.planner)
        elif room is not None and (code.side.peak > room.now or code.left > room.later):
            last = self.is_last()
            code = Code.make(self, args, machine, lambda planner: self.choose(planner, room, last), code.planner)
        self.codes[key] = code
        visit = Visit(code, inputs)
        kept = [value.untyped_storage() for value in tensors if isinstance(value, nn.Parameter)]
        ledger.parameters |= {place._cdata: (StorageWeakRef(place), inputs[place._cdata]) for place in kept}
        result = code.run(args, visit)
        ledger.step.append(visit)
        if visit.holding:
            ledger.holding.append(visit)
        return result

    def is_last(self) -> bool:
        """Whether the model's call ends with this piece, as far as Dynamo and the stack of calls tell."""
        return not self.breaks and not self.ledger.cautious and ends_the_call()

    def choose(self, planner: Planner, room: Room | None, last: bool) -> Side:
        """The schedule for a run: see the module's rule.

        Raises:
            BudgetError: none fits what is left of the budget.
        """
        planner.deadline = time.monotonic() + self.ledger.options.time_limit
        if room is None:
            capacity = planner.machine.tiers[0].capacity
            return planner.solve(min(parse_bytes(self.ledger.options.budget or 0, of=planner.unplanned.peak), capacity)).side
        resident = planner.program.resident_bytes
        try:
            short = left_bytes(planner.program) - room.later
            if short > 0:
                raise BudgetError(f"the gradients of {self.name} do not fit beside what the pieces before it need: "
                                  f"{short} bytes are missing", room.now + short)  # fmt: skip
            if last:
                return planner.solve(room.now).side
            if planner.kept.peak <= resident + (room.now - resident) // 2:
                return planner.kept
            fitting = [side for side in small_schedules(planner) if side.peak <= room.now]
            if not fitting:
                raise planner.refuse(room.now, planner.floor)
            return min(fitting, key=lambda side: burden(planner.program, side))
        except BudgetError as error:
            if not room.held:
                raise
            self.ledger.refuse()
            minimum = None if error.minimum is None else error.minimum + room.held
            held = f"{show_bytes(room.held)} ({room.held} bytes)"
            raise BudgetError(f"{error}; other pieces of the model hold {held} of the budget "
                              "and take as little as they can from the next call on", minimum) from None  # fmt: skip


def ends_the_call() -> bool:
    """Whether the frame that runs is the compiled function's own, or a continuation of it after a graph break.

    Where Dynamo gives a frame up, it compiles the functions called from it one by one, and none of them is the last.
    """
    frame = sys._getframe(1)
    user: list[str] = []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith(EVAL_FRAME) and user:
            break
        if not path.startswith(NOT_USERS):
            user.append(frame.f_code.co_name)
        frame = frame.f_back
    return all(name.startswith("torch_dynamo_resume_in_") for name in user[:-1])


def where_it_ends(reason: Any) -> str:
    """` (up to file:line)`, where Dynamo says so."""
    frames = getattr(reason, "user_stack", None) or []
    return f" (up to {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""


def tensor_source(node: fx.Node) -> str:
    """The expression that an input of Dynamo's graph comes from."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def kind_and_name(source: str) -> tuple[str, str]:
    """From an expression such as `L['self']._modules['head']._parameters['weight']` to what it is and its name."""
    name = ".".join(NAME.findall(source))
    if "_parameters[" in source:
        return "parameter", name
    return ("buffer", name) if "_buffers[" in source else ("input", source)


def facts(value: Any) -> Any:
    """What a plan depends on in an argument."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


# Code


@dataclass(eq=False)
class Code:
    """A piece planned and compiled for one set of shapes.

    Attributes:
        planner: for other schedules of the same program.
        side: the schedule that runs.
        wanted: the one that is to run from the next call on.
        callable: what AOTAutograd made.
        visit: the run under way, to be told what it returned and saved.
    """

    planner: Planner
    side: Side
    wanted: Side
    callable: Callable[..., Any]
    visit: Visit | None = None

    @staticmethod
    def make(
        piece: Piece, args: Sequence[Any], machine: Machine, choose: Callable[[Planner], Side], known: Planner | None
    ) -> "Code":
        """Trace, plan and compile a piece for these arguments."""
        return _Compilation(piece, machine, choose, known).compile(args)

    @property
    def program(self) -> Program:
        """What was planned."""
        return self.planner.program

    @property
    def own(self) -> int:
        """Bytes at the peak, parameters and inputs left out."""
        return self.side.peak - self.program.resident_bytes

    @property
    def held(self) -> int:
        """Bytes held while other pieces run."""
        return held_bytes(self.program, self.side.schedule)

    @property
    def left(self) -> int:
        """Bytes left behind by the backward pass."""
        return left_bytes(self.program)

    def at_share(self, share: float) -> Side:
        """A schedule with a peak that share of the way from the least to the most; the least where none is found."""
        most = self.planner.kept
        if share >= 1.0:
            return most
        least = min(small_schedules(self.planner), key=lambda side: burden(self.program, side))
        if share <= 0.0 or least.peak >= most.peak:
            return least
        try:
            return self.planner.solve(int(least.peak + share * (most.peak - least.peak))).side
        except BudgetError:
            return least

    def run(self, args: Sequence[Any], visit: Visit) -> Any:
        """Call it, filling in the visit."""
        self.visit = visit
        try:
            return self.callable(*args)
        finally:
            self.visit = None

    def returned(self, outputs: Sequence[Any], saved: Sequence[Any]) -> None:
        """The forward pass has ended."""
        if self.visit is None:
            return
        rounding = self.planner.machine.tiers[0].rounding
        self.visit.outputs = storages([value for value in outputs if isinstance(value, torch.Tensor)], rounding)
        made = [value.untyped_storage() for value in saved if isinstance(value, torch.Tensor)]
        made = [
            storage for storage in made if storage._cdata not in self.visit.inputs and storage._cdata not in self.visit.outputs
        ]
        if made:
            self.visit.saved = StorageWeakRef(max(made, key=lambda storage: storage.nbytes()))


class _Compilation:
    """One pass through AOTAutograd: its callbacks share what the partition has found."""

    def __init__(self, piece: Piece, machine: Machine, choose: Callable[[Planner], Side], known: Planner | None):
        self.piece = piece
        self.machine = machine
        self.choose = choose
        self.known = known
        self.inductor = piece.ledger.options.inner == "inductor"
        self.code: Code | None = None
        self.joint: Joint | None = None
        self.generated: Generated | None = None

    def compile(self, args: Sequence[Any]) -> Code:
        """The piece, planned and compiled."""
        with surroundings(self.inductor):
            made = aot_module_simplified(
                self.piece.gm,
                list(args),
                fw_compiler=self.compile_forward,
                bw_compiler=self.compile_backward,
                inference_compiler=self.compile_inference,
                partition_fn=self.partition,
                decompositions=decompositions(self.inductor),
            )
        if self.code is None:
            raise MemplanError(f"AOTAutograd compiled {self.piece.name} without asking for a partition")
        self.code.callable = made
        return self.code

    def plan(self, graph: fx.GraphModule, forward_outputs: int) -> None:
        """Choose a schedule for a graph and write its code."""
        piece = self.piece
        lifted = [Argument("parameter" if isinstance(value, nn.Parameter) else "buffer", "") for value in piece.lifted]
        self.joint = describe(graph, [*lifted, *piece.sources], forward_outputs, piece.name, self.machine.device)
        program = self.joint.traced.program
        if self.inductor:  # its random numbers come from seeds of its own, and it decides what is written in place
            ops = tuple(msgspec.structs.replace(op, reuse=(), repeatable=op.repeatable and not op.random) for op in program.ops)
            program = msgspec.structs.replace(program, ops=ops)
        table = Table(device_key(self.machine.device)) if self.machine.name.startswith("local") else None
        program = apply_costs(program, self.machine, table)
        if self.known is not None and self.known.program.digest == program.digest:
            planner = self.known
        else:
            levers = piece.ledger.options.levers
            planner = Planner(
                program,
                self.machine,
                recompute="recompute" in levers,
                reorder="reorder" in levers,
                offload="offload" in levers,
                seed=piece.ledger.options.seed,
            )
        side = self.choose(planner)
        with _disable_current_modes():  # space in other tiers is real
            self.generated = generate(self.joint.traced, side.schedule, self.machine)
        self.code = Code(planner, side, side, no_code)

    def partition(
        self, graph: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **rest: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's question: what is forward, what is backward, and what is saved between them?"""
        self.plan(graph, num_fwd_outputs)
        assert self.joint is not None
        assert self.code is not None
        assert self.generated is not None
        return emit(self.joint, self.code.side.schedule, self.generated, self.machine)

    def compile_forward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The forward pass: a list of inputs, which is emptied, to outputs and what is saved."""
        assert self.code is not None
        assert self.joint is not None
        code, count = self.code, len(self.joint.returns)
        inner = self.inner(gm, example_inputs, count, False) if self.inductor else self.eager_forward()

        def forward(args: list[Any]) -> Any:
            results = inner(args)
            code.returned(results[:count], results[count:])
            return results

        return boxed(forward)

    def compile_backward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backward pass: a list of saved tensors and tangents, which is emptied, to gradients."""
        if self.inductor:
            with surroundings(True):
                return torch._dynamo.disable(self.inner(gm, example_inputs, 0, True), reason="memplan has planned it")
        return torch._dynamo.disable(boxed(self.eager_backward()), reason="memplan has planned it")

    def compile_inference(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A pass that nothing follows."""
        ends = next(iter(gm.graph.find_nodes(op="output")))
        self.plan(gm, len(ends.args[0]))
        assert self.joint is not None
        if not self.inductor:
            return boxed(self.eager_forward())
        return self.inner(gm, example_inputs, len(self.joint.returns), False, inference=True)

    def eager_forward(self) -> Callable[[list[Any]], list[Any]]:
        """Generated code under AOTAutograd's convention."""
        assert self.generated is not None
        assert self.joint is not None
        code, returns = self.generated, self.joint.returns
        plain, ends = len(code.saved), len(code.saved) + code.states
        positions = iter(range(len(code.arguments)))
        fixed = [(None if source.kind == "constant" else next(positions), source.value) for source in code.arguments]

        def forward(args: list[Any]) -> list[Any]:
            given = [value if place is None else args[place] for place, value in fixed]
            args.clear()
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                made, saved = code.forward(given)
            tensors = iter(made)
            outputs = [next(tensors) if isinstance(value, fx.Node) else value for value in returns]
            states, visits = saved[plain:ends], saved[ends:]
            return [*outputs, *saved[:plain], *(pack(state) for state in states), *([token_of(visits)] if visits else [])]

        return forward

    def eager_backward(self) -> Callable[[list[Any]], list[Any]]:
        """Generated code under AOTAutograd's convention."""
        assert self.generated is not None
        code = self.generated
        constants = [position for position, source in enumerate(code.arguments) if source.kind == "constant"]
        inputs = len(code.arguments) - len(constants)
        places = [place - sum(constant < place for constant in constants) for place in code.gradients]
        plain, ends = len(code.saved), len(code.saved) + code.states

        def backward(args: list[Any]) -> list[Any]:
            visits = visits_of(args[ends]) if code.tiers else []
            saved: list[Any] = [*args[:plain], *(unpack(state) for state in args[plain:ends]), *visits]
            tangents = args[ends + bool(code.tiers) :]
            args.clear()
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                found = code.backward(saved, tangents)
            result: list[Any] = [None] * inputs
            for place, gradient in zip(places, found, strict=True):
                result[place] = gradient
            return result

        return backward

    def inner(self, graph: fx.GraphModule, inputs: Sequence[Any], visible: int, backward: bool, inference: bool = False) -> Any:
        """A graph compiled by Inductor; the first outputs keep the strides that the caller expects."""
        from torch._inductor.compile_fx import compile_fx_inner

        ends = next(iter(graph.graph.find_nodes(op="output")))
        ends.meta["user_visible_output_idxs"] = list(range(visible))
        return compile_fx_inner(graph, list(inputs), is_backward=backward, is_inference=inference)


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a function as one that empties its list of arguments, so that AOTAutograd holds nothing either."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def no_code(*args: Any) -> Any:
    """Stands in until AOTAutograd has returned."""
    raise MemplanError("the piece is still being compiled")


def decompositions(inductor: bool) -> dict[Any, Any]:
    """Ops to take apart while tracing: none where eager's kernels run, Inductor's own where it compiles."""
    if not inductor:
        return {}
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


@contextmanager
def surroundings(inductor: bool) -> Iterator[None]:
    """Eager's kernels in one piece; or what Inductor looks for: a fake mode, and a context to report strides to."""
    with ExitStack() as stack:
        if not inductor:
            stack.enter_context(native_kernels())
        if inductor and _guards.TracingContext.try_get() is None:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(_guards.tracing(_guards.TracingContext(mode)))
        yield


__all__ = ["Ledger", "Options", "Piece", "memplan"]

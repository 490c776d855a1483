"""One piece of a model -> code: AOTAutograd traces it, memplan plans it, and generated code or Inductor runs it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import _guards, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import graph_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from ...passes.liveness import held_bytes
from ...planner.capture.casts import cached_casts
from ...planner.capture.constants import Constants, own_results
from ...planner.capture.graph import Traced
from ...planner.capture.native import native_kernels
from ...planner.capture.sizedconstants import SizedConstants
from ...planner.capture.tracing import in_words
from ...planner.cost.local import device_key
from ...planner.cost.table import Table, apply_costs
from ...planner.ir.errors import BudgetError, MemplanError
from ...planner.ir.family import Sizes
from ...planner.ir.machine import Machine
from ...planner.ir.plan import Side
from ...planner.ir.program import Program
from ...planner.pipeline.planner import Planner
from ..eager.codegen import Generated, generate
from ..eager.recast import Backward
from ..eager.retained import copied
from ..eager.sizedcode import SizedWriter
from ..eager.witness import keeps_graph
from .identity import Arguments
from .ledger import Visit, storages
from .partition import Joint, carried_by, describe, emit, pack, token_of, unpack
from .sized import SizedTrace
from .small import smallest
from .weight import Weight, weigh

if TYPE_CHECKING:
    from .door import Piece


@dataclass(eq=False)
class Code:
    """A piece planned and compiled for one set of shapes.

    Attributes:
        planner: for other schedules of the same program.
        side: the schedule that runs.
        wanted: the one that is to run from the next call on.
        callable: what AOTAutograd made.
        backward: asked whether it may run under autocast.
        piece: the number of the piece.
        gradients: bytes of its parameters' gradients.
        generated: functions that carry the schedule out.
        running: what `callable` is told of the run under way.
        trace: that of every size, if it is of one.
        visit: the run under way, to be told what it returned and saved.
    """

    planner: Planner
    side: Side
    wanted: Side
    callable: Callable[..., Any]
    backward: Backward
    piece: int
    gradients: int
    generated: Generated
    running: "Running"
    trace: SizedTrace | None = None
    visit: Visit | None = None

    @staticmethod
    def make(
        piece: "Piece",
        args: Sequence[Any],
        machine: Machine,
        choose: Callable[[Planner], Side],
        known: Planner | None,
        ends: bool,
    ) -> "Code":
        """Trace, plan and compile a piece for these arguments; `ends` if the model's call ends with it."""
        piece.ledger.made += 1
        return _Compilation(piece, machine, choose, known, ends).compile(args)

    @staticmethod
    def of_every_size(
        piece: "Piece",
        args: Sequence[Any],
        machine: Machine,
        other: "Code",
        sizes: Sizes,
        ends: bool,
    ) -> SizedTrace:
        """Trace a piece with symbols for the sizes that vary, and compare it with its trace of other sizes.

        Raises:
            CaptureError: sizes cannot vary in it.
        """
        piece.ledger.made += 1
        symbols = piece.varying.symbols(args, piece.sources)
        mode = SizedConstants(symbols)
        given = piece.varying.stand_ins(symbols, args, piece.sources, mode)
        made = _Compilation(piece, machine, lambda planner: planner.kept, None, ends, mode)
        code = made.compile(args, given)
        assert made.joint is not None
        trace = SizedTrace(code, made.joint, code.planner, symbols, mode, table_of(machine))
        trace.confirm(other, sizes)
        trace.start(piece.ledger.options.time_limit)
        return trace

    def at_sizes(self, planner: Planner, side: Side, generated: Generated, trace: SizedTrace) -> "Code":
        """The same wiring with the code of a schedule, for some sizes."""
        return dataclasses.replace(self, planner=planner, side=side, wanted=side, generated=generated, trace=trace, visit=None)

    @property
    def program(self) -> Program:
        """What was planned."""
        return self.planner.program

    @property
    def held(self) -> int:
        """Bytes held while other pieces run."""
        return held_bytes(self.program, self.side.schedule)

    @property
    def weight(self) -> Weight:
        """What a run weighs."""
        return self.weighed(self.side)

    def weighed(self, side: Side) -> Weight:
        """What a run of another schedule weighs."""
        return weigh(self.piece, side, self.gradients)

    def at_share(self, share: float) -> Side:
        """A schedule with a peak that share of the way from the least to the most; the least where none is found."""
        most = self.planner.kept
        if share >= 1.0:
            return most
        least = smallest(self.planner)
        if share <= 0.0 or least.peak >= most.peak:
            return least
        try:
            return self.planner.solve(int(least.peak + share * (most.peak - least.peak))).found
        except BudgetError:
            return least

    def run(self, args: Sequence[Any], visit: Visit) -> Any:
        """Call it, filling in the visit."""
        self.visit, self.running.code = visit, self
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


class Running:
    """Which code of a trace is under way.

    Attributes:
        code: that was called last.
    """

    code: Code | None = None


class _Compilation:
    """One pass through AOTAutograd: its callbacks share what the partition has found."""

    def __init__(
        self,
        piece: "Piece",
        machine: Machine,
        choose: Callable[[Planner], Side],
        known: Planner | None,
        ends: bool,
        sized: SizedConstants | None = None,
    ):
        self.piece = piece
        self.machine = machine
        self.choose = choose
        self.known = known
        self.ends = ends
        self.inductor = piece.ledger.options.inner == "inductor"
        self.mode = sized or (None if self.inductor else Constants())
        self.symbols = None if sized is None else sized.symbols
        self.running = Running()
        self.arguments: Arguments | None = None
        self.code: Code | None = None
        self.joint: Joint | None = None
        self.generated: Generated | None = None

    def compile(self, args: Sequence[Any], stand_ins: Sequence[Any] | None = None) -> Code:
        """The piece, planned and compiled.

        Args:
            args: of a call.
            stand_ins: for these, with symbols for sizes that vary.

        Raises:
            CaptureError: AOTAutograd, or Inductor, cannot.
            BudgetError: no schedule fits.
        """
        self.arguments = self.piece.arguments(args)
        graph = self.piece.graph(args)
        traced: Any = graph if self.mode is None else _Called(graph, self.mode)
        with in_words(f"compile {self.piece.name}"), surroundings(self.inductor, self.mode), own_sources():
            made = aot_module_simplified(
                traced,
                list(args if stand_ins is None else stand_ins),
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
        assert self.arguments is not None
        region_of = no_region if self.mode is None else self.mode.region_of
        outside = self.ends and not returns_loss(graph, forward_outputs)
        self.joint = describe(graph, self.arguments, forward_outputs, piece.name, self.machine.device, region_of, outside,
                              self.symbols)  # fmt: skip
        program = self.joint.traced.program
        if self.inductor:  # its random numbers come from seeds of its own, and it decides what is written in place
            ops = tuple(msgspec.structs.replace(op, reuse=(), repeatable=op.repeatable and not op.random) for op in program.ops)
            program = msgspec.structs.replace(program, ops=ops)
        program = apply_costs(program, self.machine, table_of(self.machine))
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
            self.generated = self.write(side)
        backward, gradients = Backward(self.joint.traced), gradient_bytes(self.joint.traced)
        self.code = Code(planner, side, side, no_code, backward, piece.number, gradients, self.generated, self.running)

    def write(self, side: Side) -> Generated:
        """Code of a schedule."""
        assert self.joint is not None
        if self.symbols is None:
            return generate(self.joint.traced, side.schedule, self.machine)
        return SizedWriter(self.joint.traced, self.symbols, side.schedule, self.joint.leaves).write()

    def partition(
        self, graph: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **rest: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's question: what is forward, what is backward, and what is saved between them?"""
        self.plan(graph, num_fwd_outputs)
        assert self.joint is not None
        assert self.code is not None
        assert self.generated is not None
        forward, backward = emit(self.joint, self.code.side.schedule, self.generated, self.machine)
        if not self.inductor:
            keep_saved(forward, num_fwd_outputs)
        return forward, backward

    def compile_forward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The forward pass: a list of inputs, which is emptied, to outputs and what is saved."""
        assert self.joint is not None
        running, count = self.running, len(self.joint.returns)
        inner = self.inner(gm, example_inputs, count, False) if self.inductor else self.eager_forward()

        def forward(args: list[Any]) -> Any:
            code, results = running.code, inner(args)
            assert code is not None
            code.returned(results[:count], results[count:])
            return results

        return boxed(forward)

    def compile_backward(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backward pass: a list of saved tensors and tangents, which is emptied, to gradients."""
        if self.inductor:
            with surroundings(True):
                return torch._dynamo.disable(self.inner(gm, example_inputs, 0, True), reason="memplan has planned it")
        graph_module._loader.eval_cache.pop(type(gm).forward.__code__.co_filename, None)  # AOTAutograd's copy, which never runs
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
        running, returns, carries = self.running, self.joint.returns, self.carries
        places = iter(self.joint.places)
        fixed = [(None if source.kind == "constant" else next(places), source.value) for source in self.generated.arguments]

        def forward(args: list[Any]) -> list[Any]:
            assert running.code is not None
            code = running.code.generated
            plain, ends = len(code.saved), len(code.saved) + code.states
            given = [value if place is None else args[place] for place, value in fixed]
            args.clear()
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                made, saved = code.forward(given)
            tensors = iter(made)
            outputs = [next(tensors) if isinstance(value, fx.Node) else value for value in returns]
            states = [pack(state) for state in saved[plain:ends]]
            return [*outputs, *saved[:plain], *states, *([token_of(code, saved[ends:])] if carries else [])]

        return forward

    @property
    def carries(self) -> bool:
        """Whether code has more for its backward pass than autograd can save: visits to the tiers, or sizes."""
        assert self.generated is not None
        return self.generated.backward is not None and (bool(self.generated.tiers) or self.symbols is not None)

    def eager_backward(self) -> Callable[[list[Any]], list[Any]]:
        """Generated code under AOTAutograd's convention."""
        assert self.generated is not None
        assert self.joint is not None
        first, traced, carries, inputs = self.generated, self.joint.traced, self.carries, self.joint.inputs
        taken = iter(self.joint.places)
        place_of = [-1 if source.kind == "constant" else next(taken) for source in first.arguments]
        places = [place_of[argument] for argument in first.gradients]
        tangents = sum(source.kind == "tangent" for source in traced.sources.values())

        def backward(args: list[Any]) -> list[Any]:
            cut = len(args) - tangents
            kept, given = args[:cut], args[cut:]
            args.clear()
            code, carried = carried_by(kept.pop()) if carries else (first, [])
            plain, ends = len(code.saved), len(code.saved) + code.states
            saved: list[Any] = [*kept[:plain], *(unpack(state) for state in kept[plain:ends]), *carried]
            kept.clear()
            if keeps_graph():
                saved = copied(traced, code, saved)
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                found = code.backward(saved, given)
            result: list[Any] = [None] * inputs
            for place, gradient in zip(places, found, strict=True):
                result[place] = gradient
            return result

        return backward

    def inner(self, graph: fx.GraphModule, inputs: Sequence[Any], visible: int, backward: bool, inference: bool = False) -> Any:
        """A graph compiled by Inductor; the first outputs keep the strides that the caller expects."""
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.fx_passes.replace_random import replace_random_passes
        from torch._inductor.virtualized import V

        ends = next(iter(graph.graph.find_nodes(op="output")))
        ends.meta["user_visible_output_idxs"] = list(range(visible))
        with V.set_fake_mode(_guards.detect_fake_mode(list(inputs))):
            replace_random_passes(graph)  # random numbers from seeds: Inductor knows no other
        return compile_fx_inner(graph, list(inputs), is_backward=backward, is_inference=inference)


class _Called(nn.Module):
    """A piece as it is traced for eager's kernels: told which of its casts are autocast's."""

    def __init__(self, piece: fx.GraphModule, mode: Constants):
        super().__init__()
        self.piece = piece
        self.mode = mode
        self.caches = torch.is_grad_enabled() and torch.is_autocast_cache_enabled()

    def forward(self, *args: Any) -> Any:
        with cached_casts(self.mode, self.caches):
            return self.piece(*args)


def returns_loss(graph: fx.GraphModule, count: int) -> bool:
    """Whether one of the first outputs is a scalar, which is taken for the loss: nothing of it is computed outside."""
    ends = next(iter(graph.graph.find_nodes(op="output")))
    values = [value.meta["val"] for value in ends.args[0][:count] if isinstance(value, fx.Node)]
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 0 for value in values)


def keep_saved(forward: fx.GraphModule, count: int) -> None:
    """Have AOTAutograd give away none of what is saved, which follows the first outputs: a graph may be kept for another pass.

    It takes for a buffer that the backward pass may write over what is known to be no input or output, by its fake value.
    """
    for node in next(iter(forward.graph.find_nodes(op="output"))).args[0][count:]:
        if node.op != "placeholder":
            node.meta.pop("val", None)


def gradient_bytes(traced: Traced) -> int:
    """Bytes of the gradients of parameters."""
    found = {traced.owner[node] for place, node in traced.gradients if traced.sources[place].kind == "parameter"}
    return sum(traced.program.buffers[buffer].bytes for buffer in found)


def table_of(machine: Machine) -> Table | None:
    """What has been measured on a machine, if it is the one at hand."""
    return Table(device_key(machine.device)) if machine.name.startswith("local") else None


def no_region(cast: fx.Node) -> None:
    """Inductor's arithmetic is its own, and nobody keeps its casts."""


@contextmanager
def own_sources() -> Iterator[None]:
    """Let torch forget the texts of the graphs made meanwhile, which it keeps for tracebacks as long as the process lives."""
    known = set(graph_module._loader.eval_cache)
    try:
        yield
    finally:
        for name in graph_module._loader.eval_cache.keys() - known:
            del graph_module._loader.eval_cache[name]


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
def surroundings(inductor: bool, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """What a piece is traced under.

    For eager's kernels, that these stay in one piece, and fake tensors laid out as they lay theirs out; for Inductor, a context
    to report strides to. Autocast is off in the backward pass, where it is off in eager if `backward()` is called outside.
    """
    with ExitStack() as stack:
        stack.enter_context(functorch_config.patch(backward_pass_autocast="off"))
        if not inductor:
            # a gradient mostly comes from a product, which lays it out in order, however the output itself lies
            stack.enter_context(functorch_config.patch(guess_tangent_strides_as_outputs=False))
            stack.enter_context(native_kernels())
            stack.enter_context(own_results())
        if mode is not None or _guards.TracingContext.try_get() is None:
            mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(_guards.tracing(_guards.TracingContext(mode)))
        yield

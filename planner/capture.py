"""Model -> `Program`. The only reader of torch's graphs and their metadata.

The joint forward and backward graph is traced by AOTAutograd under fake tensors, without decompositions, so that what
runs later are the very kernels that eager PyTorch runs. Parameters are never touched: fake ones stand in for them.

Small tensors that depend on nothing but constants (positions, masks) are evaluated while tracing, so that code which looks
at their values takes the branch that it takes in eager mode.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .callers import noting_callers
from .casts import cached_casts
from .constants import Constants
from .errors import CaptureError
from .graph import Traced, lower
from .hooks import no_observers
from .inputs import Place, TensorFacts, check_leaf, children_of, facts, places_of
from .optimizers import check_alone, kept_by
from .plain_calls import noted_seeds
from .plan import Counted
from .program import Program
from .reach import Held, reach
from .reached import check_gradients, reached
from .reads import Fact, Log, facts_read
from .rebinding import Rebinding, check_rebound, shares
from .standins import fake, fake_parameters, named_tensors
from .state import MISSING, Change, Snapshot, refuse_drawing, untouched
from .structure import Structure
from .tracing import in_words, trace
from .writes import Calls, Collector, Made, Write, WriteBack, built_once, merged, needs_second

NUMBER = "DataDependentOutputException: aten._local_scalar_dense.default"
PLAIN = bool | int | float | str | None
TRACING = threading.RLock()  # tracing changes torch's tables and the model's


@dataclass(frozen=True)
class Signature:
    """What a call must look like for the captured program to answer it.

    Attributes:
        inputs: the facts of the flattened example inputs: a `TensorFacts` for a tensor, a plain value itself.
        spec: how the inputs nest.
        training: each module's name and whether it was in training mode.
        autocast: the autocast state of the device, as (enabled, type).
        places: where each input lies, for those that share memory with one another or with the model.
    """

    inputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    training: tuple[tuple[str, bool], ...]
    autocast: tuple[bool, torch.dtype]
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class Captured:
    """A program with what a backend needs to run it.

    Attributes:
        program: the step.
        traced: the graph behind it and how its ends are wired to the model.
        signature: what a call must look like.
        parameters: the facts of every parameter and buffer by name.
        outputs: the model's flattened output: an index into the traced outputs, or the value of a leaf that is no tensor.
        output_spec: how the outputs nest.
        loss_leaf: which leaf of the output is the loss; None where the caller computes it.
        train: whether there is a backward pass.
        plain: indices of traced outputs through which the model itself lets no gradient pass.
        model: a weak reference to the model that was traced.
        structure: what it was like.
        loss: the caller's loss function, if there is one.
        reads: what of the model, beside its tensors, forward has read.
        writes: what it stores, at every call.
        stored: of traced outputs that are no outputs of the model's the name of what they are stored in.
    """

    program: Program
    traced: Traced
    signature: Signature
    parameters: dict[str, TensorFacts]
    outputs: tuple[Any, ...]
    output_spec: pytree.TreeSpec
    loss_leaf: int | None
    train: bool
    plain: frozenset[int]
    model: weakref.ref[nn.Module]
    structure: Structure
    loss: Callable[[Any], torch.Tensor] | None
    reads: tuple[Fact, ...] = ()
    writes: tuple[Write, ...] = ()
    stored: dict[int, str] = field(default_factory=dict)


class _Step(nn.Module):
    """Wraps the model so that its inputs and outputs are flat, and only the loss carries a gradient."""

    def __init__(
        self, model: nn.Module, mode: Constants, spec: pytree.TreeSpec, fixed: dict[int, Any], train: bool, own_loss: bool
    ):
        super().__init__()
        self.model = model
        self.mode = mode
        self.call = (spec, fixed, train, own_loss)
        self.caches = train and torch.is_autocast_cache_enabled()
        self.outputs: tuple[Any, ...] = ()
        self.output_spec: pytree.TreeSpec | None = None
        self.loss_leaf: int | None = None
        self.plain: frozenset[int] = frozenset()
        self.found: list[Held] = []
        self.log = Log([])
        self.changes: list[Change] = []
        self.writes: list[Write] = []
        self.stored: dict[int, str] = {}
        self.assigned: list[str] = []  # names of parameters and buffers whose `.data` was assigned to
        self.attached: frozenset[int] = frozenset()  # what of the stored has to carry a gradient to the loss
        self.reentrant = False  # a Function calls `backward()` in its backward pass

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec, fixed, train, own_loss = self.call
        rest = iter(tensors)
        leaves = [fixed[index] if index in fixed else next(rest) for index in range(spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        before = Snapshot(self.found)
        try:
            output = self.call_model(args, kwargs)
            self.changes = before.changes()
        finally:
            before.restore()
        flat, self.output_spec = pytree.tree_flatten(output)
        found: list[torch.Tensor] = []
        kept, plain = [], set()
        loss = find_loss(output) if train and not own_loss else None
        self.loss_leaf = None  # AOTAutograd calls this more than once
        for index, leaf in enumerate(flat):
            if leaf is loss and loss is not None and self.loss_leaf is None:
                self.loss_leaf = index
            elif isinstance(leaf, torch.Tensor) and loss is not None:
                leaf = leaf.detach()
            if isinstance(leaf, torch.Tensor):
                if not flat[index].requires_grad:
                    plain.add(len(found))
                kept.append(_Leaf(len(found)))
                found.append(leaf)
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                kept.append(leaf)
            else:
                advice = "return tensors in tuples, lists, dicts or a registered pytree node"
                if hasattr(getattr(self.model, "config", None), "use_cache"):
                    advice = "set model.config.use_cache = False"
                kind = type(leaf).__name__
                raise CaptureError(f"the model returns a {kind}, of which memplan cannot see the tensors; {advice}")
        self.collect(list(tensors), found, flat, plain)
        self.outputs, self.plain = tuple(kept), frozenset(plain)
        return tuple(found)

    def call_model(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the model returns."""
        buffers = dict(self.model.named_buffers())
        given = Snapshot(reach(arguments_of(self.model, args, kwargs)))
        rebinding = Rebinding(self.model)
        self.assigned = rebinding.assigned
        with noting_callers(self.model), cached_casts(self.mode, self.caches), self.log.reading(), rebinding:
            output = self.model.forward(*args, **kwargs)  # not its hooks: they run around the planned forward
        check_rebound(self.model, buffers)
        for change in given.changes():
            if change.held.way and change.after is not MISSING and not isinstance(change.held.thing, nn.Module):
                raise CaptureError(f"the model stores {change.name} in its argument, which a planned call does not do for the "
                                   "caller: return it instead")  # fmt: skip
        return output

    def collect(self, inputs: list[torch.Tensor], found: list[torch.Tensor], flat: list[Any], plain: set[int]) -> None:
        """What the model has stored; tensors that it does not return are added to what is found."""
        collector = Collector(self.model, inputs, found, flat, {id(held.thing) for held in self.found})
        self.writes = collector.collect(self.changes)
        self.stored = {}
        for name, value in zip(collector.extra, collector.extra_tensors, strict=True):
            self.stored[len(found)] = name
            if not value.requires_grad:
                plain.add(len(found))
            value = value if len(found) in self.attached else value.detach()
            others = [*found, *inputs, *(tensor for _, tensor in named_tensors(self.model))]
            alone = value._base is None and not any(shares(value, other) for other in others)
            found.append(value if alone else value.clone())


def arguments_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> SimpleNamespace:
    """A call's containers by the names of the parameters that they are given for."""
    names = [name for name in inspect.signature(type(model).forward).parameters][1:]
    names += [f"args{index}" for index in range(len(names), len(args))]
    held = (*zip(names, args, strict=False), *kwargs.items())
    return SimpleNamespace(**{name: value for name, value in held if isinstance(value, dict | list)})


@dataclass(frozen=True)
class _Leaf:
    """A tensor leaf of the model's output: the index of the traced output that is its value."""

    index: int


def find_loss(output: Any) -> torch.Tensor:
    """The scalar in a model's output: the output itself, its `.loss`, or its `["loss"]`.

    Raises:
        CaptureError: there is none, or it is not a scalar, or it carries no gradient.
    """
    loss = output
    if not isinstance(output, torch.Tensor):
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"the model returns a {type(output).__name__} without a loss: pass loss=, "
                           "a function from the output to a scalar, or labels that make the model return one")  # fmt: skip
    if loss.numel() != 1 or loss.dim() != 0:
        raise CaptureError(f"the loss has shape {list(loss.shape)}, not a scalar's: pass loss=, such as lambda out: out.mean()")
    if not loss.requires_grad:
        raise CaptureError("the loss does not depend on anything that requires a gradient: unfreeze a parameter, or plan "
                           "with train=False")  # fmt: skip
    return loss


def flatten_call(model: nn.Module, args: tuple, kwargs: dict | None) -> tuple[list[Any], pytree.TreeSpec]:
    """A call's leaves in one order, however the caller split positional from keyword arguments.

    Raises:
        TypeError: the arguments do not fit the model's forward.
    """
    bound = inspect.signature(type(model).forward).bind(model, *args, **(kwargs or {}))
    for name, known in bound.signature.parameters.items():  # f(x) and f(x, mask=None) are one call: the first
        given = bound.arguments.get(name)
        if isinstance(known.default, PLAIN) and type(given) is type(known.default) and given == known.default:
            bound.arguments.pop(name, None)
    return pytree.tree_flatten((bound.args[1:], bound.kwargs))


def leaf_names(model: nn.Module, spec: pytree.TreeSpec) -> list[str]:
    """What to call the leaves of a call: the parameter's name, and the place in it where it holds several."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = [name for name, each in inspect.signature(type(model).forward).parameters.items() if each.kind in kinds][1:]
    args, kwargs = children_of(spec)
    named = [(known[min(place, len(known) - 1)], part) for place, part in enumerate(children_of(args))]
    named += zip(kwargs.context, children_of(kwargs), strict=True)
    return [name + path for name, part in named for path in leaf_paths(part)]


def leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """The place of each leaf in an argument, as `['key'][0]`; its number where a class does not tell."""
    try:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]
        found = [pytree.keystr(path) for path, _ in paths]
    except Exception:  # whatever a user's class says of numbers in the place of tensors
        found = []
    return found if len(found) == spec.num_leaves else [f" (leaf {index})" for index in range(spec.num_leaves)]


def capture(
    model: nn.Module,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    train: bool = True,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: Any = None,
    in_backward: bool = False,
    device: str | None = None,
    runs_on: str | None = None,
) -> Captured:
    """Trace one step of a model.

    Args:
        model: parameters on cpu, cuda or meta; they are not read, changed or moved.
        args: example inputs: real, fake or meta tensors.
        kwargs: likewise.
        train: trace the backward pass too.
        loss: from the output to a scalar, where the caller computes it; it is measured, not captured into the program.
        optimizer: None, `sgd`, `adam`, `adamw`, a torch optimizer or what was `Counted` of one, whose state and temporaries
            are counted.
        in_backward: its updates are part of the step: each parameter's runs as soon as its gradient is complete.
        device: the device type to trace for; by default where the model is, and cpu for a model on meta.
        runs_on: the device type that the step is for, where it cannot be traced for here; default: `device`.

    Raises:
        CaptureError: what cannot be traced, and the line of the model where that is.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"plan needs an nn.Module, not a {type(model).__name__}")
    try:
        leaves, spec = flatten_call(model, tuple(args), kwargs)
    except TypeError as error:
        raise CaptureError(f"the arguments do not fit {type(model).__name__}.forward: {error}") from None
    for leaf, name in zip(leaves, leaf_names(model, spec), strict=True):
        check_leaf(leaf, name)
    device = device or device_of(model, leaves)
    if in_backward and (optimizer is None or not train):
        raise CaptureError("optimizer_in_backward wants an optimizer and a training step: pass optimizer=, and train=True")
    fixed = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    mode = Constants()
    inputs = [fake(mode, leaf, device) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensor_leaves = [index for index in range(len(leaves)) if index not in fixed]
    parameters = {name: TensorFacts.of(value) for name, value in named_tensors(model)}
    structure = Structure.of(model)
    step = _Step(model, mode, spec, fixed, train, loss is not None)
    step.training = model.training  # without `train()`, which would reach into the model
    updated = trainable(model, optimizer)
    counted = None if optimizer is None or not train else count_optimizer(
        model, optimizer, updated, runs_on or device, in_backward)  # fmt: skip

    def as_eager(other: Constants) -> tuple[_Step, list[torch.Tensor]]:
        """The same step and inputs of another mode."""
        given = [fake(other, leaf, device) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        made = _Step(model, other, spec, fixed, train, loss is not None)
        made.found, made.log, made.attached = step.found, Log(step.found), step.attached
        tries.append(made)
        return made, given

    def parameter_name(target: str) -> str:
        """The first of a parameter's names."""
        return names.get(target.removeprefix("model."), target.removeprefix("model."))

    seeds: list[str] = []
    tries = [step]
    with TRACING, untouched(model, loss) as (step.found, randomness), told_of(tries):
        while True:
            step.log = Log(step.found)
            known = reached(model, device, as_eager) if train else None
            step.reentrant = known is not None and known.reentrant
            with ExitStack() as stack:
                names = stack.enter_context(fake_parameters(model, mode, device))
                stack.enter_context(nullcontext() if train else no_observers(model, step.found))
                with noted_seeds(seeds):
                    joint = trace(step, inputs, mode, train, stack, step.reentrant)
                refuse_drawing(randomness.moved())
                check_replaced(joint.graph_module, step.changes)
                writes, reads = settle_writes(step, joint.graph_module, inputs, mode)
                loss_cost = trace_loss(step, joint.graph_module, loss, mode) if train and loss is not None else None
                wanted = step.stored.keys() & gradients_of(loss_cost) - step.plain if loss_cost is not None else set()
                if wanted and not step.attached:
                    step.attached = frozenset(wanted)  # the loss reads them: a gradient is to pass
                    continue
                mode.note_values(joint.graph_module)
                if loss_cost is not None:
                    check_reached(joint.graph_module, loss_cost, step.plain)
                if known is not None:
                    check_gradients(
                        joint.graph_module, known, parameter_name, lambda index: leaf_names(model, spec)[tensor_leaves[index]]
                    )
                stack.enter_context(in_words("plan what was traced"))
                traced = lower(
                    joint.graph_module,
                    name=type(model).__name__,
                    device=device,
                    parameter_name=parameter_name,
                    input_leaf=lambda index: tensor_leaves[index],
                    train=train,
                    loss=loss_cost,
                    optimizer=counted,
                    in_backward=in_backward,
                    trainable=updated,
                    runs_on=runs_on or device,
                    region_of=mode.region_of,
                )
                break
    check_seeds(traced.program, seeds)
    assert step.output_spec is not None
    return Captured(
        program=traced.program,
        traced=traced,
        signature=Signature(
            inputs=tuple(facts(leaf) for leaf in leaves),
            spec=spec,
            training=tuple((name, module.training) for name, module in model.named_modules()),
            autocast=autocast_state(device),
            places=places_of(leaves, named_tensors(model)),
        ),
        parameters=parameters,
        outputs=tuple(leaf.index if isinstance(leaf, _Leaf) else (leaf,) for leaf in step.outputs),
        output_spec=step.output_spec,
        loss_leaf=step.loss_leaf,
        train=train,
        plain=step.plain,
        model=weakref.ref(model),
        structure=structure,
        loss=loss,
        reads=tuple(reads),
        writes=tuple(on_leaves(writes, tensor_leaves)),
        stored=step.stored,
    )


@contextmanager
def told_of(steps: "list[_Step]") -> Iterator[None]:
    """Say what torch's own errors do not: which parameter was exchanged too late, and that a number was asked for."""
    try:
        yield
    except CaptureError as error:
        assigned = [name for step in steps for name in step.assigned]
        if assigned and "modified by an inplace operation" in str(error):
            raise CaptureError(f"the model assigns to {assigned[0]}.data after it has computed with it, and its gradients "
                               "need the old contents: assign before") from error  # fmt: skip
        told = str(error)
        if told.endswith(NUMBER):
            raise CaptureError(f"{told.removesuffix(NUMBER)}the model takes a number out of a tensor, which depends on data: "
                               "keep it a tensor, or pass it in") from error  # fmt: skip
        raise


def settle_writes(
    step: "_Step", graph: fx.GraphModule, inputs: list[torch.Tensor], mode: Constants
) -> tuple[list[Write], list[Fact]]:
    """What forward stores at every call, and what it reads that it does not store.

    Raises:
        CaptureError: the call after the first would do something else.
    """
    writes, changes, found = step.writes, step.changes, step.found
    first = Snapshot(found)
    written = {(id(change.held.thing), change.key) for change in changes}
    reads = facts_read(step.log, found, written)
    if not needs_second(writes, changes, step.log.seen):
        return writes, reads
    stored, outputs = step.stored, output_nodes(graph, "PlainAOTOutput")
    try:
        once = calls_of(step, inputs)
        WriteBack(tuple(writes), [step.model]).store(lambda made: stand_in(step.model, made, outputs, inputs, mode))
        step.found = reach(step.model)
        try:
            twice = calls_of(step, inputs)
        except Exception as error:  # what the first call has stored is in the second one's way
            raise CaptureError(built_once(writes)) from error
        settled = merged(writes, step.writes)
        if not once.same_as(twice) or step.stored.keys() != stored.keys():
            raise CaptureError(built_once(writes))
    finally:
        first.restore()
        step.found = found
    step.writes, step.changes, step.stored = settled, changes, stored
    return settled, reads


def calls_of(step: "_Step", inputs: list[torch.Tensor]) -> Calls:
    """The operators that one more call runs, in the state that the model is in."""
    with Calls() as calls:
        step(*inputs)
    return calls


def stand_in(model: nn.Module, made: Made, outputs: list[fx.Node], inputs: list[torch.Tensor], mode: Constants) -> torch.Tensor:
    """A tensor of the tracer's for one that a first call has stored."""
    if made.kind == "named":
        return dict(named_tensors(model))[made.name]
    like = inputs[made.index] if made.kind == "input" else outputs[made.index].meta["val"]
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def on_leaves(writes: list[Write], tensor_leaves: list[int]) -> list[Write]:
    """Writes whose inputs are numbered as leaves of the call."""
    return [replace(write, leaves=tuple(replace(leaf, index=tensor_leaves[leaf.index])
                    if isinstance(leaf, Made) and leaf.kind == "input" else leaf for leaf in write.leaves))
            for write in writes]  # fmt: skip


def gradients_of(loss: fx.GraphModule) -> set[int]:
    """The inputs of a loss's graph to which it sends a gradient."""
    output = next(node for node in loss.graph.nodes if node.op == "output")
    pairs = zip(output.args[0], output.meta["desc"], strict=True)
    return {desc.grad_of.idx for node, desc in pairs if node is not None and type(desc).__name__ == "GradAOTOutput"}


def check_replaced(graph: fx.GraphModule, changes: list[Change]) -> None:
    """Refuse a model that reads a plain tensor and puts another in its place: a plan would read the old one ever after.

    Raises:
        CaptureError: which.
    """
    found = [getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")]
    for change in changes:
        if any(change.before is constant for constant in found):
            raise CaptureError(f"the model changes {change.name}, a tensor that is no buffer: use register_buffer")


def check_seeds(program: Program, seeds: list[str]) -> None:
    """Refuse a model that draws random numbers and sets the state of a generator: a planned step would only do the first.

    Raises:
        CaptureError: where.
    """
    if seeds and any(op.random for op in program.ops):
        raise CaptureError(f"the model sets the state of a random generator at {seeds[0]}, which a planned step would not "
                           "repeat: set it outside of the model, or give it what is drawn as an input")  # fmt: skip


def check_reached(graph: fx.GraphModule, loss: fx.GraphModule, plain: frozenset[int]) -> None:
    """Refuse a loss that is to send a gradient through an output to which none can come: it is the view of another.

    Args:
        graph: the model's joint graph.
        loss: the loss function's.
        plain: outputs through which the model itself lets no gradient pass.

    Raises:
        CaptureError: which output.
    """
    inputs = [node.meta["desc"] for node in graph.graph.find_nodes(op="placeholder")]
    fed = {getattr(desc.output, "idx", -1) for desc in inputs if type(desc).__name__ == "TangentAOTInput"}
    output = next(node for node in loss.graph.nodes if node.op == "output")
    for node, desc in zip(output.args[0], output.meta["desc"], strict=True):
        if node is not None and type(desc).__name__ == "GradAOTOutput" and desc.grad_of.idx not in fed | plain:
            raise CaptureError(f"the loss reads output {desc.grad_of.idx} of the model, which is a view of another output, or "
                               "a parameter: return a clone of it")  # fmt: skip


def count_optimizer(model: nn.Module, optimizer: Any, updated: set[str], device: str, in_backward: bool = False) -> Counted:
    """What counts of an optimizer: its figures, and the names of the parameters that it updates.

    Raises:
        CaptureError: it is unknown, cannot be tried out, or has to see all parameters at once and is to run in backward.
    """
    held = {name: value for name, value in model.named_parameters() if name in updated}
    if in_backward:
        check_alone(optimizer, held)
    return Counted(kept_by(optimizer, device, held), tuple(sorted(updated)))


def trainable(model: nn.Module, optimizer: Any) -> set[str]:
    """Names of the parameters that an optimizer updates: those that a torch optimizer holds, else all that want gradients."""
    wanted = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if isinstance(optimizer, Counted):
        return set(optimizer.trainable)
    if optimizer is None or isinstance(optimizer, str):
        return set(wanted)
    held = {id(value) for group in getattr(optimizer, "param_groups", ()) for value in group["params"]}
    return {name for name, value in wanted.items() if id(value) in held}


def trace_loss(
    step: "_Step", graph: fx.GraphModule, loss: Callable[[Any], torch.Tensor], mode: FakeTensorMode
) -> "fx.GraphModule":
    """The joint graph of the caller's loss alone, over the model's outputs: what it costs between the two passes."""
    values = [node.meta["val"] for node in output_nodes(graph, "PlainAOTOutput")]

    class Loss(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            flat = [tensors[leaf.index] if isinstance(leaf, _Leaf) else leaf for leaf in step.outputs]
            assert step.output_spec is not None
            with stored_for_loss(step, tensors):
                value = loss(pytree.tree_unflatten(flat, step.output_spec))
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise CaptureError(f"the loss function returns {shape}, not a scalar tensor: reduce it, as with .mean()")
            if not value.requires_grad:
                raise CaptureError("the loss function's result does not depend on what requires a gradient: leave out "
                                   ".detach() or no_grad(), or plan with train=False")  # fmt: skip
            return value

    inputs = []
    with mode:
        for index, value in enumerate(values):
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            plain = index in step.stored and index in step.plain
            inputs.append(copy.requires_grad_(value.is_floating_point() and not plain))
    with ExitStack() as stack:
        return trace(Loss(), inputs, mode, True, stack).graph_module


@contextmanager
def stored_for_loss(step: "_Step", tensors: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """While the loss is computed the model holds what its forward has stored."""
    before = Snapshot(step.found)
    known = dict(named_tensors(step.model))
    try:
        rows = [
            write for write in step.writes if all(not isinstance(leaf, Made) or leaf.kind != "input" for leaf in write.leaves)
        ]
        WriteBack(tuple(rows), [step.model]).store(
            lambda made: tensors[made.index] if made.kind == "output" else known[made.name])  # fmt: skip
        yield
    finally:
        before.restore()


def output_nodes(graph: fx.GraphModule, kind: str) -> list[fx.Node]:
    """The nodes that the graph returns under a descriptor of this kind, in order."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    pairs = zip(output.args[0], output.meta["desc"], strict=True)
    return [node for node, desc in pairs if type(desc).__name__ == kind and isinstance(node, fx.Node)]


def device_of(model: nn.Module, leaves: list[Any]) -> str:
    """The device type of the model, else of its inputs, else cpu.

    Raises:
        CaptureError: the model spans several types of device.
    """
    tensors = [value for _, value in named_tensors(model)] or [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = sorted({tensor.device.type for tensor in tensors} - {"meta"})
    if len(found) > 1:
        raise CaptureError(f"the model's parameters are on {' and '.join(found)}: move it to one device")
    return found[0] if found else "cpu"


def autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for the device type, and to which type."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

"""Model -> `Program`. The only reader of torch's graphs and their metadata.

The joint forward and backward graph is traced by AOTAutograd under fake tensors, without decompositions, so that what
runs later are the very kernels that eager PyTorch runs. Parameters are never touched: fake ones stand in for them.

Small tensors that depend on nothing but constants (positions, masks) are evaluated while tracing, so that code which looks
at their values takes the branch that it takes in eager mode.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from ..ir.errors import CaptureError
from ..ir.plan import Counted
from ..ir.program import Program
from .calls import Signature, autocast_state, flatten_call, leaf_names
from .constants import Constants, own_results
from .eagerly import check_gradients, reached
from .graph import Traced, lower
from .hooks import Hooks
from .inputs import TensorFacts, check_leaf, facts, places_of
from .live import Moments
from .losses import check_reached, gradients_of, trace_loss
from .observers import Observation, check_unchanged, clash
from .optimizers import check_alone, kept_by
from .plain_calls import noted_seeds
from .questions import Question, inputs_of
from .reads import Fact, Log
from .settle import on_leaves, settle_writes, told_of
from .sized import Sized, sized_capture, with_numbers
from .sizedconstants import SizedConstants
from .standins import fake, fake_parameters, named_tensors
from .state import Change, refuse_drawing, untouched
from .step import Leaf, Step
from .structure import Structure
from .symbols import Dynamic, Symbols
from .tracing import in_words, trace
from .writes import Write

TRACING = threading.RLock()  # tracing changes torch's tables and the model's


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
        counted: what counts of the optimizer; None for none, and of an inference.
        moments: the bytes that lived in eager mode while each op ran; None of an inference, and where the caller computes the
            loss.
        questions: what the model asked about the values of its inputs, by their index among the tensors of a call.
        values: of those inputs that it asked about, on the CPU.
        observed: the calls of hooks that look on.
        sized: of a capture with `dynamic`, which sizes it serves, and how; `program` and `signature` are those of the example.
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
    counted: Counted | None = None
    moments: Moments | None = None
    questions: tuple[Question, ...] = ()
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    observed: tuple[Observation, ...] = ()
    sized: Sized | None = None


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
    outside: bool = False,
    dynamic: Dynamic | None = None,
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
        outside: where the model has no loss and none is given, the caller computes one of which nothing is known.
        dynamic: for leaves of the call, by their name or their place in its flattened order, which of their dimensions vary
            from call to call, and a name for each size: `{"input_ids": {0: "batch", 1: "length"}}`. Equal names are equal
            sizes.

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
    symbols = None if dynamic is None else Symbols(dynamic, leaves, leaf_names(model, spec))
    mode = Constants() if symbols is None else SizedConstants(symbols)
    inputs = stand_ins(mode, leaves, leaf_names(model, spec), device, symbols)
    tensor_leaves = [index for index in range(len(leaves)) if index not in fixed]
    parameters = {name: TensorFacts.of(value) for name, value in named_tensors(model)}
    structure = Structure.of(model)
    own_loss = None if outside and loss is None else loss is not None
    hooks = Hooks(model, device)
    step = Step(model, mode, spec, fixed, train, own_loss, hooks)
    step.training = model.training  # without `train()`, which would reach into the model
    updated = trainable(model, optimizer)
    counted = None if optimizer is None or not train else count_optimizer(
        model, optimizer, updated, runs_on or device, in_backward)  # fmt: skip

    def as_eager(other: Constants) -> tuple[Step, list[torch.Tensor]]:
        """The same step and inputs of another mode."""
        given = stand_ins(other, leaves, leaf_names(model, spec), device, None)
        made = Step(model, other, spec, fixed, train, own_loss, hooks)
        made.found, made.log, made.attached = step.found, Log(step.found), step.attached
        tries.append(made)
        return made, given

    def parameter_name(target: str) -> str:
        """The first of a parameter's names."""
        return names.get(target.removeprefix("model."), target.removeprefix("model."))

    seeds: list[str] = []
    tries = [step]
    with (
        TRACING, own_results(), untouched(model, loss) as (step.found, randomness), told_of(tries),
        in_words("trace the model"),
    ):  # fmt: skip
        hooks.found = step.found
        while True:
            step.log = Log(step.found)
            known = reached(model, device, train, as_eager) if train or hooks else None
            step.reentrant = known is not None and known.reentrant
            with ExitStack() as stack:
                names = stack.enter_context(fake_parameters(model, mode, device))
                with noted_seeds(seeds), hooks.intercepted():
                    joint = trace(step, inputs, mode, train, stack, step.reentrant)
                seen = hooks.settled(joint.graph_module)
                refuse_drawing(randomness.moved())
                check_replaced(joint.graph_module, step.changes)
                writes, reads = settle_writes(step, joint.graph_module, inputs, mode)
                wrong = clash(seen, writes, model)
                if wrong is not None and hooks.set_apart():
                    continue
                if wrong is not None:
                    raise CaptureError(wrong)
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
                if symbols is not None and loss_cost is not None:
                    with_numbers(loss_cost, symbols)
                traced = lower(
                    joint.graph_module,
                    name=type(model).__name__,
                    device=device,
                    parameter_name=parameter_name,
                    input_leaf=lambda index: tensor_leaves[index],
                    train=train,
                    loss=loss_cost,
                    unknown=step.outside and loss is None,
                    optimizer=counted,
                    in_backward=in_backward,
                    trainable=updated,
                    runs_on=runs_on or device,
                    observed=seen,
                    region_of=mode.region_of,
                    prepare=(lambda graph: None) if symbols is None else partial(with_numbers, symbols=symbols),
                )
                sized = None if symbols is None else sized_capture(mode, symbols, traced, loss_cost, writes)
                break
    check_seeds(traced.program, seeds)
    check_unchanged(seen, {source.name for source, _ in traced.mutations.values()})
    questions = tuple(question for question in mode.questions.different if inputs_of([question]))
    real = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
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
        outputs=tuple(leaf.index if isinstance(leaf, Leaf) else (leaf,) for leaf in step.outputs),
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
        counted=counted,
        moments=None if known is None or step.outside else known.moments,
        questions=questions,
        values={index: real[index].detach().cpu().clone() for index in inputs_of(questions)},
        observed=seen,
        sized=sized,
    )


def stand_ins(mode: Constants, leaves: list[Any], names: list[str], device: str, symbols: Symbols | None) -> list[torch.Tensor]:
    """Fake tensors for a call's tensors, with symbols for the sizes that vary, and with the values that may be asked about."""
    varying = set() if symbols is None else {leaf for rows in symbols.places.values() for leaf, _ in rows}
    found: list[torch.Tensor] = []
    for index, leaf in enumerate(leaves):
        if symbols is not None and index in varying:
            made = symbols.stand_in(mode, index, leaf, names[index], device)
        elif isinstance(leaf, torch.Tensor):
            made = fake(mode, leaf, device)
        else:
            continue
        mode.questions.meet(made, leaf)
        found.append(made)
    return found


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

"""Model -> `Program`. The only reader of torch's graphs and their metadata.

The joint forward and backward graph is traced by AOTAutograd under fake tensors, without decompositions, so that what
runs later are the very kernels that eager PyTorch runs. Parameters are never touched: fake ones stand in for them.

Small tensors that depend on nothing but constants (positions, masks) are evaluated while tracing, so that code which looks
at their values takes the branch that it takes in eager mode.
"""

import inspect
import json
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError, PlanMismatch
from .graph import Source, Traced, lower
from .native import native_kernels
from .nodes import is_view
from .program import Program

CONSTANT_ELEMENTS = 1 << 20  # constants larger than this are not evaluated while tracing
GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
FACTORIES = {"arange", "ones", "zeros", "full", "scalar_tensor", "eye"}


@dataclass(frozen=True)
class Signature:
    """What a call must look like for the captured program to answer it.

    Attributes:
        inputs: the flattened example inputs: a `TensorFacts` for a tensor, else the value itself.
        spec: how the inputs nest.
        training: each module's name and whether it was in training mode.
        autocast: the autocast state of the device, as (enabled, type).
    """

    inputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    training: tuple[tuple[str, bool], ...]
    autocast: tuple[bool, torch.dtype]


class TensorFacts(msgspec.Struct, frozen=True):
    """What is promised of an input tensor or a parameter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorFacts":
        """The facts of a tensor."""
        return TensorFacts(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)[6:], tensor.requires_grad)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" + (" requiring grad" if self.requires_grad else "")


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


class _Constants(FakeTensorMode):
    """Fake tensors, except that small constants keep their values."""

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return t.numel() <= CONSTANT_ELEMENTS and not isinstance(t, FakeTensor) and t.device.type != "meta"

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is GROUPED and args[0].dtype != torch.bfloat16:
            return self.grouped_product(*args, **(kwargs or {}))
        if args and isinstance(args[0], FakeTensor) and args[0].constant is not None and is_view(func):
            return self.view_of_constant(func, types, args, kwargs or {})
        out = super().dispatch(func, types, args, kwargs or {})
        if getattr(func, "namespace", "") == "aten" and func._opname in FACTORIES and isinstance(out, FakeTensor):
            plain = not any(isinstance(arg, torch.Tensor) for arg in args)
            if plain and out.numel() <= CONSTANT_ELEMENTS:
                with _disable_current_modes():
                    out.constant = func(*args, **{**(kwargs or {}), "device": "cpu", "pin_memory": False})
        return out

    def view_of_constant(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A view with its value, which shares its base's storage as other views do: torch's own way makes a copy of it."""
        base, known = args[0], args[0].constant
        base.constant = None
        try:
            out = super().dispatch(func, types, args, kwargs)
        finally:
            base.constant = known
        with _disable_current_modes():
            values = func(known, *args[1:], **kwargs)
        for made, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(values), strict=True):
            made.constant = value
        return out

    def grouped_product(self, one: Any, two: Any, offsets: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        """A fake result of the experts' product, which torch's own fake kernel only knows for bfloat16."""
        from torch._meta_registrations import _create_grouped_mm_output_tensor as make

        with self:
            return make(one, two, offsets, out_dtype)


class _Step(nn.Module):
    """Wraps the model so that its inputs and outputs are flat, and only the loss carries a gradient."""

    def __init__(self, model: nn.Module, spec: pytree.TreeSpec, fixed: dict[int, Any], train: bool, own_loss: bool):
        super().__init__()
        self.model = model
        self.call = (spec, fixed, train, own_loss)
        self.outputs: tuple[Any, ...] = ()
        self.output_spec: pytree.TreeSpec | None = None
        self.loss_leaf: int | None = None
        self.plain: frozenset[int] = frozenset()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec, fixed, train, own_loss = self.call
        rest = iter(tensors)
        leaves = [fixed[index] if index in fixed else next(rest) for index in range(spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        output = self.model.forward(*args, **kwargs)  # not its hooks: they run around the planned forward
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
        self.outputs, self.plain = tuple(kept), frozenset(plain)
        return tuple(found)


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
    return pytree.tree_flatten((bound.args[1:], bound.kwargs))


def facts(leaf: Any) -> Any:
    """What a call promises of one leaf: a tensor's facts, or the value itself."""
    return TensorFacts.of(leaf) if isinstance(leaf, torch.Tensor) else leaf


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
        optimizer: None, `sgd`, `adam`, `adamw` or a torch optimizer, whose state and temporaries are counted.
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
    device = device or device_of(model, leaves)
    if in_backward and (optimizer is None or not train):
        raise CaptureError("optimizer_in_backward wants an optimizer and a training step: pass optimizer=, and train=True")
    fixed = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    mode = _Constants(allow_non_fake_inputs=True)
    inputs = [fake(mode, leaf, device) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensor_leaves = [index for index in range(len(leaves)) if index not in fixed]
    parameters = {name: TensorFacts.of(value) for name, value in named_tensors(model)}
    step = _Step(model, spec, fixed, train, loss is not None)
    step.training = model.training  # without `train()`, which would reach into the model
    updated = trainable(model, optimizer)
    with fake_parameters(model, mode, device) as names, ExitStack() as stack:
        joint = trace(step, inputs, mode, train, stack)
        loss_cost = trace_loss(step, joint.graph_module, loss, mode) if train and loss is not None else None
        traced = lower(
            joint.graph_module,
            name=type(model).__name__,
            device=device,
            parameter_name=lambda target: names.get(target.removeprefix("model."), target.removeprefix("model.")),
            input_leaf=lambda index: tensor_leaves[index],
            train=train,
            loss=loss_cost,
            optimizer=optimizer,
            in_backward=in_backward,
            trainable=updated,
            runs_on=runs_on or device,
        )
    assert step.output_spec is not None
    return Captured(
        program=traced.program,
        traced=traced,
        signature=Signature(
            inputs=tuple(facts(leaf) for leaf in leaves),
            spec=spec,
            training=tuple((name, module.training) for name, module in model.named_modules()),
            autocast=autocast_state(device),
        ),
        parameters=parameters,
        outputs=tuple(leaf.index if isinstance(leaf, _Leaf) else (leaf,) for leaf in step.outputs),
        output_spec=step.output_spec,
        loss_leaf=step.loss_leaf,
        train=train,
        plain=step.plain,
    )


def trainable(model: nn.Module, optimizer: Any) -> set[str]:
    """Names of the parameters that an optimizer updates: those that a torch optimizer holds, else all that want gradients."""
    wanted = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if optimizer is None or isinstance(optimizer, str):
        return set(wanted)
    held = {id(value) for group in getattr(optimizer, "param_groups", ()) for value in group["params"]}
    return {name for name, value in wanted.items() if id(value) in held}


def trace(step: nn.Module, inputs: list[torch.Tensor], mode: FakeTensorMode, train: bool, stack: ExitStack) -> Any:
    """AOTAutograd's joint graph with descriptors, or a `CaptureError` that names the model's line."""
    try:
        stack.enter_context(mode)
        stack.enter_context(native_kernels())
        stack.enter_context(torch.enable_grad() if train else torch.no_grad())
        return aot_export_joint_with_descriptors(stack, step, tuple(inputs), decompositions={})
    except CaptureError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"cannot trace the model{model_line(error)}: {type(error).__name__}: {reason[0][:300]}") from error


def model_line(error: BaseException) -> str:
    """` at file:line (code)` of the innermost frame that is the user's, else of torch's own modules, else nothing."""
    here = __file__.rsplit("/", 1)[0]
    library = sysconfig.get_paths()["stdlib"]
    theirs, modules = [], []
    for frame in traceback.extract_tb(error.__traceback__):
        if "/torch/nn/modules/" in frame.filename and not frame.filename.endswith("/module.py"):
            modules.append(frame)
        standard = frame.filename.startswith((library, "<")) and "site-packages" not in frame.filename
        if not standard and "/torch/" not in frame.filename and not frame.filename.startswith(here):
            theirs.append(frame)
    for frame in (theirs or modules)[-1:]:
        return f" at {frame.filename}:{frame.lineno} ({(frame.line or '').strip()[:120]})"
    return ""


def trace_loss(
    step: "_Step", graph: fx.GraphModule, loss: Callable[[Any], torch.Tensor], mode: FakeTensorMode
) -> "fx.GraphModule":
    """The joint graph of the caller's loss alone, over the model's outputs: what it costs between the two passes."""
    values = [node.meta["val"] for node in output_nodes(graph, "PlainAOTOutput")]

    class Loss(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            flat = [tensors[leaf.index] if isinstance(leaf, _Leaf) else leaf for leaf in step.outputs]
            assert step.output_spec is not None
            value = loss(pytree.tree_unflatten(flat, step.output_spec))
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise CaptureError(f"the loss function returns {shape}, not a scalar tensor: reduce it, as with .mean()")
            return value

    inputs = []
    with mode:
        for value in values:
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            inputs.append(copy.requires_grad_(value.is_floating_point()))
    with ExitStack() as stack:
        return trace(Loss(), inputs, mode, True, stack).graph_module


def output_nodes(graph: fx.GraphModule, kind: str) -> list[fx.Node]:
    """The nodes that the graph returns under a descriptor of this kind, in order."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    pairs = zip(output.args[0], output.meta["desc"], strict=True)
    return [node for node, desc in pairs if type(desc).__name__ == kind and isinstance(node, fx.Node)]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def fake_parameters(model: nn.Module, mode: FakeTensorMode, device: str) -> Iterator[dict[str, str]]:
    """Put fake tensors in place of the model's parameters and buffers, and the real ones back at the end.

    Yields:
        For a parameter with several names, each later name and the first one.
    """
    first: dict[int, tuple[str, torch.Tensor]] = {}
    alias: dict[str, str] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for prefix, module in model.named_modules(remove_duplicate=False):
            tables: Any = (module._parameters, module._buffers)
            for table in tables:
                for key, value in list(table.items()):
                    if value is None or isinstance(value, FakeTensor):
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    if id(value) in first:
                        alias[name] = first[id(value)][0]
                    else:
                        copy = fake(mode, value.detach(), device)
                        if isinstance(value, nn.Parameter):
                            copy = nn.Parameter(copy, requires_grad=value.requires_grad)
                        first[id(value)] = (name, copy)
                        first[id(copy)] = (name, copy)  # a module met twice holds the copy already
                    undo.append((table, key, value))
                    table[key] = first[id(value)][1]
        yield alias
    finally:
        for table, key, value in reversed(undo):
            table[key] = value


def fake(mode: FakeTensorMode, tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A fake tensor of the same facts, on the device traced for where the tensor is on meta or fake itself."""
    if tensor.device.type != "meta" and tensor.device.type == device and not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else made


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


def describe_inputs(captured: Captured) -> str:
    """The example inputs as JSON, for a plan file; empty where they hold something that JSON cannot."""
    try:
        leaves = [{"tensor": msgspec.to_builtins(leaf)} if isinstance(leaf, TensorFacts) else {"value": leaf}
                  for leaf in captured.signature.inputs]  # fmt: skip
        return json.dumps({"leaves": leaves, "spec": pytree.treespec_dumps(captured.signature.spec)})
    except (TypeError, NotImplementedError):
        return ""


def rebuild_inputs(text: str) -> tuple[tuple, dict]:
    """Inputs on meta as `describe_inputs` wrote them down.

    Raises:
        PlanMismatch: the description is missing or broken.
    """
    if not text:
        raise PlanMismatch("the plan file does not say what its inputs were: plan again in this process")
    try:
        data = json.loads(text)
        leaves = []
        for leaf in data["leaves"]:
            if "tensor" in leaf:
                known = msgspec.convert(leaf["tensor"], TensorFacts)
                made = torch.empty_strided(known.shape, known.stride, dtype=getattr(torch, known.dtype), device="meta")
                leaves.append(made.requires_grad_(known.requires_grad))
            else:
                leaves.append(leaf["value"])
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(data["spec"]))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise PlanMismatch(f"the plan file's description of its inputs is broken: {error}") from None
    return args, kwargs


__all__ = ["Captured", "Signature", "Source", "TensorFacts", "capture", "describe_inputs", "rebuild_inputs"]

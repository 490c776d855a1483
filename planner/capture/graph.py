"""A traced fx graph -> `Program`, and the wiring that a backend needs to run it.

Three facts are decided here, each by the graph itself and never by a name: which nodes are views (they share their
input's storage), which part of the step an op belongs to (what the outputs need is forward), and where an op can write
its result in place of an operand (same storage size, shape and strides, and a kernel that allows it).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..ir.errors import CaptureError
from ..ir.program import SUM, Buffer, Kind, Op, Phase, Program
from .callers import callers
from .in_place import InPlace, in_place_form
from .nodes import (
    call_key,
    closure,
    cost_of_graph,
    count_flops,
    encode,
    in_flight,
    is_call,
    is_known,
    is_random,
    is_tensor,
    results,
    span,
    unpicked,
)  # fmt: skip
from .observers import Observation, is_observation, row_of
from .optimizers import rows_of, update_op, update_ops
from .restore import merge_casts, restore_dropout, restore_gates, sum_tied, tell_products
from .tracing import OWN_GENERATOR

# BatchNorm in training mode reads the running statistics only to update them: its other results do not depend on them.
STATISTICS = {"aten._native_batch_norm_legit_functional.default": (3, 4)}

UNKNOWN = object()  # a loss of which nothing is known


@dataclass(frozen=True)
class Source:
    """Where a placeholder's value comes from: `parameter` or `buffer` by name, `input` by leaf, `tangent` by output."""

    kind: str
    name: str = ""
    index: int = -1
    value: torch.Tensor | None = None


@dataclass(frozen=True)
class Traced:
    """A program and the graph it came from.

    Attributes:
        program: the step.
        nodes: for each op its graph node; None for the loss and the update, which are the caller's.
        base: for each buffer the node whose value is the storage's first tensor.
        owner: for each node that holds a tensor its buffer.
        sources: for each placeholder and constant where its value comes from.
        outputs: nodes of the traced forward outputs, in order.
        mutations: op -> (source of the tensor to overwrite, node of the new value).
        gradients: pairs (placeholder, node of its gradient); of the placeholders of a tied parameter, the first has the sum.
        in_place: (op, operand's buffer) -> how to write over it.
        updates: for each op that updates parameters in backward, their names and the nodes of their gradients.
        states: for each buffer of optimizer state whose parameter is updated in backward, that parameter's name, and which of
            its states it is.
        adds: `updates` add to gradients that are there, and change no parameter: see `planner.capture.accumulate`.
    """

    program: Program
    nodes: tuple[fx.Node | None, ...]
    base: dict[int, fx.Node]
    owner: dict[fx.Node, int]
    sources: dict[fx.Node, Source]
    outputs: tuple[fx.Node, ...]
    mutations: dict[int, tuple[Source, fx.Node]]
    gradients: tuple[tuple[fx.Node, fx.Node], ...]
    in_place: dict[tuple[int, int], InPlace]
    updates: dict[int, tuple[tuple[str, fx.Node], ...]] = field(default_factory=dict)
    states: dict[int, tuple[str, int]] = field(default_factory=dict)
    adds: bool = False

    @property
    def shared(self) -> set[int]:
        """Buffers in which several different tensors lie: pieces of one flat tensor, say, or an optimizer's small state."""
        parts: dict[int, set[tuple[Any, ...]]] = {}
        for node in self.sources:
            if node in self.owner:
                value = node.meta["val"]
                parts.setdefault(self.owner[node], set()).add((value.storage_offset(), value.shape, value.stride()))
        unnamed = {index for index, buffer in enumerate(self.program.buffers)
                   if buffer.kind is Kind.STATE and index not in self.states}  # fmt: skip
        return {buffer for buffer, found in parts.items() if len(found) > 1} | unnamed


def lower(
    graph: fx.GraphModule,
    *,
    name: str,
    device: str,
    parameter_name: Callable[[str], str],
    input_leaf: Callable[[int], int],
    train: bool,
    loss: fx.GraphModule | None,
    optimizer: Any,
    in_backward: bool,
    trainable: set[str],
    runs_on: str,
    unknown: bool = False,
    observed: Sequence[Observation] = (),
    region_of: Callable[[fx.Node], int | None] = lambda cast: None,
    prepare: Callable[[fx.GraphModule], None] = lambda graph: None,
) -> Traced:
    """Build the program of a joint graph with descriptors.

    Args:
        graph: AOTAutograd's joint graph (or forward graph, for inference); changed where `planner/capture/restore.py` says.
        name: the program's name.
        device: the type of device traced for.
        parameter_name: from a descriptor's target to the name in the model; tied names map to the first.
        input_leaf: from a traced input's index to the leaf of the call.
        train: whether there is a backward pass.
        loss: the graph of the caller's own loss, whose cost lies between the passes.
        optimizer: see `planner.capture.optimizers`.
        in_backward: the step updates each parameter as soon as its gradient is complete.
        trainable: names of the parameters that the optimizer updates.
        runs_on: the type of device that the step is for: it decides the optimizer's temporaries, and on the CPU dropout
            is spelled out as eager computes it.
        unknown: the caller computes a loss of which nothing is known.
        observed: the calls of hooks that look on, by the numbers that their nodes have.
        region_of: as for `planner.capture.restore.merge_casts`.
        prepare: changes the graph once more, when all that is to be restored is.
    """
    sum_tied(graph, parameter_name)
    merge_casts(graph, parameter_name, region_of)
    if device == runs_on == "cpu":
        restore_dropout(graph)
        restore_gates(graph)
    tell_products(graph)
    prepare(graph)
    lowering = _Lowering(graph, device, parameter_name, input_leaf, observed)
    return lowering.run(name, train, UNKNOWN if unknown else loss, optimizer, in_backward, trainable, runs_on)


class _Lowering:
    """One walk over a graph; its fields are the tables under construction."""

    def __init__(
        self, graph: fx.GraphModule, device: str, parameter_name: Callable[[str], str], input_leaf: Callable[[int], int],
        observed: Sequence[Observation] = (),
    ):  # fmt: skip
        self.graph = graph
        self.device = device
        self.parameter_name = parameter_name
        self.input_leaf = input_leaf
        self.observed = observed
        self.kept: list[int] = []  # buffers that hooks keep
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.nodes: list[fx.Node | None] = []
        self.base: dict[int, fx.Node] = {}
        self.owner: dict[fx.Node, int] = {}
        self.by_storage: dict[int, int] = {}
        self.sources: dict[fx.Node, Source] = {}
        self.resident: set[int] = set()  # buffers of sources, tangents among them
        # what an operator of unknown kin has made or read: it may share memory with its operands, or still be at work on them
        self.unsure = {
            item.untyped_storage()._cdata
            for node in graph.graph.nodes
            if is_call(node) and not is_known(node)
            for item in pytree.tree_leaves([arg.meta.get("val") for arg in (node, *node.all_input_nodes)])
            if isinstance(item, torch.Tensor)
        }
        self.in_place: dict[tuple[int, int], InPlace] = {}
        self.mutations: dict[int, tuple[Source, fx.Node]] = {}
        self.updates: dict[int, tuple[tuple[str, fx.Node], ...]] = {}
        self.states: dict[int, tuple[str, int]] = {}
        self.where: dict[fx.Node, str] = {}
        self.groups: dict[fx.Node, int] = {}

    def run(
        self, name: str, train: bool, loss: Any, optimizer: Any, in_backward: bool, trainable: set[str], runs_on: str
    ) -> Traced:
        """The stages in order."""
        ends = next(node for node in self.graph.graph.nodes if node.op == "output")
        described = [pair for pair in zip(ends.args[0], ends.meta["desc"], strict=True) if pair[1] is not None]
        outputs = tuple(node for node, desc in described if type(desc).__name__ == "PlainAOTOutput")
        changes = [(node, desc.mutated_input) for node, desc in described if type(desc).__name__ == "InputMutationAOTOutput"]
        grads = [(node, desc.grad_of) for node, desc in described if type(desc).__name__ == "GradAOTOutput"]
        known = {"PlainAOTOutput", "InputMutationAOTOutput", "GradAOTOutput"}
        odd = {type(desc).__name__ for _, desc in described} - known
        if odd:
            raise CaptureError(f"the model returns something memplan cannot wire ({', '.join(sorted(odd))}): an output that "
                               "is a view of another output or of an input; return a clone of it")  # fmt: skip
        for node in self.graph.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.add_source(node, train)
        tangents = [node for node, source in self.sources.items() if source.kind == "tangent"]
        self.where = callers(self.graph.graph)
        early, late = split(self.graph.graph, [*outputs, *(node for node, _ in changes)])
        self.groups = groups_of(early, late)
        changed = {self.owner[self.find(desc)] for _, desc in changes}
        for node in early:
            self.add_node(node, Phase.FORWARD, changed)
        for node, desc in changes:
            self.add_mutation(node, desc)
        if train:
            self.add_loss(outputs, tangents, loss)
        for node in late:
            self.add_node(node, Phase.BACKWARD, changed)
        gradients = tuple((self.find(desc), node) for node, desc in grads if node is not None)
        held = [self.owner[node] for node in outputs if isinstance(node, fx.Node)]
        held += [self.owner[node] for node in tangents] + self.kept
        resident = {self.owner[node] for node in self.sources if node not in tangents and node in self.owner}
        made = {self.owner[node] for _, node in gradients}
        self.name_kinds(held, made, len(self.ops))
        if optimizer is not None and train and in_backward:
            gradients = self.add_updates(optimizer, trainable, runs_on, gradients)
        elif optimizer is not None and train:
            self.add_update(optimizer, trainable, runs_on)
        held += [self.owner[node] for _, node in gradients]
        program = Program(
            name=name,
            buffers=tuple(self.buffers),
            ops=tuple(self.ops),
            outputs=tuple(sorted(set(held) - resident)),
            device=self.device,
        )
        program.verify()
        return Traced(
            program=program,
            nodes=tuple(self.nodes),
            base=self.base,
            owner=self.owner,
            sources=self.sources,
            outputs=outputs,
            mutations=self.mutations,
            gradients=gradients,
            in_place=self.in_place,
            updates=self.updates,
            states=self.states,
        )

    def find(self, desc: Any) -> fx.Node:
        """The placeholder that a descriptor of an input describes."""
        return next(node for node in self.sources if node.meta.get("desc") == desc)

    def add_source(self, node: fx.Node, train: bool) -> None:
        """A resident buffer, or a tangent."""
        value = node.meta.get("val")
        if node.op == "get_attr":
            constant = getattr(self.graph, str(node.target))
            if isinstance(constant, torch.Generator):
                raise CaptureError(OWN_GENERATOR)
            if train and getattr(constant, "requires_grad", False):
                raise CaptureError("the model uses a tensor that wants a gradient and is not one of its parameters: register "
                                   "it (nn.Parameter, nn.ParameterList)")  # fmt: skip
            constant = getattr(constant, "constant", None) if hasattr(constant, "fake_mode") else constant
            if not isinstance(constant, torch.Tensor):
                raise CaptureError(f"the model holds {node.target}, whose value is not known while tracing")
            source = Source("constant", str(node.target), value=constant)
            kind = Kind.CONSTANT
            value = constant if value is None else value
            node.meta["val"] = value
        else:
            desc = node.meta["desc"]
            match type(desc).__name__:
                case "ParamAOTInput":
                    source, kind = Source("parameter", self.parameter_name(desc.target)), Kind.PARAMETER
                case "BufferAOTInput":
                    source, kind = Source("buffer", self.parameter_name(desc.target)), Kind.CONSTANT
                case "PlainAOTInput":
                    source, kind = Source("input", f"input {desc.idx}", self.input_leaf(desc.idx)), Kind.INPUT
                case "TangentAOTInput" if not hasattr(desc.output, "idx"):
                    name = getattr(getattr(desc.output, "mutated_input", None), "target", None)
                    told = f" ({self.parameter_name(name)})" if name else ""
                    raise CaptureError(f"the model changes a parameter or an input in its forward pass{told}, and "
                                       "differentiates it, as an embedding with max_norm does: change it outside")  # fmt: skip
                case "TangentAOTInput":
                    source, kind = Source("tangent", "tangent", desc.output.idx), Kind.TEMPORARY
                case other:
                    raise CaptureError(f"the model takes an input that memplan cannot wire ({other})")
        self.sources[node] = source
        if isinstance(value, torch.Tensor):
            self.resident.add(self.define(node, value, source.name or node.name, kind))

    def define(self, node: fx.Node, value: torch.Tensor, name: str, kind: Kind) -> int:
        """The buffer of a node's storage, new unless another node shares it."""
        storage = value.untyped_storage()
        buffer = self.by_storage.get(storage._cdata)
        if buffer is None:
            buffer = len(self.buffers)
            self.by_storage[storage._cdata] = buffer
            self.buffers.append(Buffer(name=name, bytes=storage.nbytes(), kind=kind))
            self.base[buffer] = node
        self.owner[node] = buffer
        return buffer

    def add_node(self, node: fx.Node, phase: Phase, changed: set[int]) -> None:
        """An op, or a view of a buffer that exists."""
        if is_observation(node):
            self.add_observation(node, phase)
            return
        value = node.meta.get("val")
        parts = results(node)
        tensors = [arg for arg in node.all_input_nodes if arg in self.owner]
        shared = {self.owner[arg] for arg in tensors}
        if any(isinstance(value, torch.Generator) for value in (*node.args, *node.kwargs.values())):
            raise CaptureError(OWN_GENERATOR)
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CaptureError(f"the model calls {node.target}, which memplan cannot plan; move it out of the model")
        if not parts and value is not None and not is_tensor(value):
            raise CaptureError(f"the model takes a number out of a tensor ({node.target}): memplan needs shapes and "
                               "branches that do not depend on data")  # fmt: skip
        if any(item.layout is not torch.strided for _, item in parts):
            raise CaptureError(f"the model makes a sparse tensor ({node.target}), and memplan plans dense ones: leave out "
                               "sparse=True")  # fmt: skip
        known = {part for part, item in parts if item.untyped_storage()._cdata in self.by_storage}
        if parts and all(part in known for part, _ in parts):
            for part, item in parts:
                self.owner[part] = self.by_storage[item.untyped_storage()._cdata]
            return
        writes = [self.define(part, item, part.name, Kind.TEMPORARY) for part, item in parts if part not in known]
        for part in known:
            self.owner[part] = self.by_storage[part.meta["val"].untyped_storage()._cdata]
        unread = STATISTICS.get(str(node.target), ())
        statistics = {self.owner[node.args[index]] for index in unread if isinstance(node.args[index], fx.Node)}  # type: ignore[index]
        if unread and not node.args[5]:  # not in training mode: the statistics do decide the result
            statistics = set()
        reads = tuple(sorted((shared - statistics) | {self.owner[arg] for arg in in_flight(node) if arg in self.owner}))
        once = node.target._schema.is_mutable or not is_known(node)
        index = len(self.ops)
        reuse = []
        for operand in tensors:
            form = in_place_form(node, operand, tensors, self.owner) if len(parts) == 1 else None
            buffer = self.owner[operand]
            sure = operand.meta["val"].untyped_storage()._cdata not in self.unsure
            if form is not None and sure and buffer not in self.resident and (writes[0], buffer) not in reuse:
                reuse.append((writes[0], buffer))
                self.in_place[index, buffer] = form
        self.ops.append(
            Op(
                name=node.name,
                target=str(node.target),
                key=call_key(node),
                phase=phase,
                reads=reads,
                writes=tuple(writes),
                reuse=tuple(reuse),
                repeatable=not (set(reads) & changed) and not once and bool(writes),
                random=is_random(node),
                flops=count_flops(node),
                workspace=unpicked(node, parts),
                traffic=sum(span(arg.meta["val"]) for arg in tensors) + sum(span(item) for _, item in parts),
                where=self.where[node],
                group=self.groups[node] if phase is Phase.BACKWARD else 0,
            )
        )
        self.nodes.append(node)

    def add_observation(self, node: fx.Node, phase: Phase) -> None:
        """A call of a hook that looks on: once, in its place among the others. What it keeps lives until the step ends."""
        row = self.observed[row_of(node)]
        shown = [self.owner[arg] for arg in node.args[0]]  # type: ignore[union-attr,index,misc]
        self.kept += [shown[index] for index in row.taken.kept]
        traffic = sum(span(arg.meta["val"]) for arg in node.all_input_nodes)
        writes = ()
        if row.taken.bytes:
            writes = (len(self.buffers),)
            self.buffers.append(Buffer(name=f"kept by {node.name}", bytes=row.taken.bytes, kind=Kind.TEMPORARY))
            self.kept += writes
        self.ops.append(
            Op(
                name=node.name,
                target=str(node.target),
                key=call_key(node),
                phase=phase,
                reads=tuple(sorted(set(shown))),
                writes=writes,
                repeatable=False,
                traffic=traffic,
                workspace=row.taken.times * traffic,
                where=self.where[node],
                group=self.groups[node] if phase is Phase.BACKWARD else 0,
            )
        )
        self.nodes.append(node)

    def add_mutation(self, node: fx.Node, desc: Any) -> None:
        """The op that gives a resident tensor its new contents, once, at the end of the forward pass."""
        target = self.find(desc)
        value = target.meta["val"]
        found, name = node.meta["val"], self.sources[target].name
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise CaptureError(f"the model turns the buffer {name} of shape {list(value.shape)} into {list(found.shape)}, "
                               "as some do in their first call: call it once, and plan it then")  # fmt: skip
        twins = [place for place in self.sources if place is not target and self.owner.get(place) == self.owner[target]]
        if any(place.users for place in twins):
            raise CaptureError(f"the model changes {name}, and reads its memory through another tensor that it holds: take "
                               "that view of the buffer in forward, where it is read")  # fmt: skip
        self.mutations[len(self.ops)] = (self.sources[target], node)
        self.ops.append(
            Op(
                name=f"{node.name}_to_{self.sources[target].name}",
                target="aten.copy_.default",
                key=json.dumps({"op": "aten.copy_.default", "args": [encode(target), encode(node)], "kwargs": {}}),
                phase=Phase.FORWARD,
                reads=(self.owner[node],),
                writes=(),
                mutates=(self.owner[target],),
                repeatable=False,
                traffic=2 * span(value),
                where=self.sources[target].name.rpartition(".")[0],
            )
        )
        self.nodes.append(None)

    def add_loss(self, outputs: Iterable[Any], tangents: list[fx.Node], loss: fx.GraphModule | object | None) -> None:
        """The caller's part between the passes: from the outputs to their tangents.

        A loss of which nothing is known is taken to need as much as what it differentiates, as cross entropy does, which keeps
        the logarithms of probabilities.
        """
        flops, traffic, workspace = cost_of_graph(loss) if isinstance(loss, fx.GraphModule) else (0.0, 0, 0)
        if loss is UNKNOWN:
            workspace = sum(span(node.meta["val"]) for node in tangents)
            flops, traffic = float(workspace), 4 * workspace
        self.ops.append(
            Op(
                name="loss",
                target="loss",
                key=json.dumps({"op": "loss", "args": [flops, traffic], "kwargs": {}}),
                phase=Phase.LOSS,
                reads=tuple(sorted({self.owner[node] for node in outputs})),
                writes=tuple(sorted({self.owner[node] for node in tangents})),
                repeatable=False,
                flops=flops,
                traffic=traffic,
                workspace=workspace,
            )
        )
        self.nodes.append(None)

    def add_update(self, optimizer: Any, trainable: set[str], runs_on: str) -> None:
        """The optimizer's state as resident buffers, and its step as the last op."""
        names = {
            self.owner[node]: source.name
            for node, source in self.sources.items()
            if source.kind == "parameter" and source.name in trainable
        }
        sizes = {buffer: self.buffers[buffer].bytes for buffer in names}
        gradients = [index for index, buffer in enumerate(self.buffers) if buffer.kind is Kind.GRADIENT]
        states, op = update_op(optimizer, sizes, names, gradients, len(self.buffers), runs_on)
        self.buffers.extend(states)
        self.ops.append(op)
        self.nodes.append(None)

    def add_updates(
        self, optimizer: Any, trainable: set[str], runs_on: str, gradients: tuple[tuple[fx.Node, fx.Node], ...]
    ) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """The optimizer's state, and ops that update the parameters. Returns the gradients that are left over."""
        pairs: dict[int, list[tuple[str, fx.Node]]] = {}
        left = []
        for place, node in gradients:
            source = self.sources[place]
            if source.kind == "parameter" and source.name in trainable:
                pairs.setdefault(self.owner[place], []).append((source.name, node))
            else:
                left.append((place, node))
        sizes = {buffer: self.buffers[buffer].bytes for buffer in pairs}
        read = {buffer: [self.owner[node] for _, node in rows] for buffer, rows in pairs.items()}
        names = {buffer: rows[0][0] for buffer, rows in pairs.items()}
        made = {buffer: at for at, op in enumerate(self.ops) for buffer in op.writes}
        rows = rows_of(sizes, {buffer: max(made.get(gradient, -1) for gradient in row) for buffer, row in read.items()})
        states, whose, ops = update_ops(optimizer, sizes, read, names, rows, len(self.buffers), runs_on)
        for index, state in enumerate(whose, len(self.buffers)):
            if state.number is not None:
                self.states[index] = names[state.parameter], state.number
        self.buffers.extend(states)
        for row, op in zip(rows, ops, strict=True):
            self.updates[len(self.ops)] = tuple(pair for buffer in row for pair in pairs[buffer])
            self.ops.append(op)
            self.nodes.append(None)
        return tuple(left)

    def name_kinds(self, held: list[int], gradients: set[int], end: int) -> None:
        """Give activations, gradients and outputs their kind, now that all readers are known."""
        boundary = next((index for index, op in enumerate(self.ops) if op.phase is Phase.LOSS), end)
        made_early = {buffer for op in self.ops[:boundary] for buffer in op.writes}
        read_late = {buffer for op in self.ops[boundary + 1 :] for buffer in op.reads}
        for index, buffer in enumerate(self.buffers):
            if buffer.kind is not Kind.TEMPORARY:
                continue
            if index in gradients:
                kind = Kind.GRADIENT
            elif index in held:
                kind = Kind.OUTPUT
            elif index in made_early and index in read_late:
                kind = Kind.ACTIVATION
            else:
                continue
            self.buffers[index] = Buffer(name=buffer.name, bytes=buffer.bytes, kind=kind)


def split(graph: fx.Graph, outputs: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Call nodes of the forward pass and of the backward pass, each in the order in which eager runs them.

    The forward pass is what was traced while the model's forward ran, also where only the backward pass needs it (a loss that
    makes its gradients chunk by chunk), and what the outputs need. What nothing needs is left out, but for draws of random
    numbers, whose order is part of the result. `passes/defer.py` says what of it had better wait for the backward pass.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends = [node for node in graph.nodes if node.op == "output" or is_observation(node)]
    wanted = closure(ends)
    late = {node for node in graph.nodes if "TangentAOTInput" in type(node.meta.get("desc")).__name__}
    for node in graph.nodes:
        if ran_backward(node) or any(arg in late for arg in node.all_input_nodes):
            late.add(node)
    ran = [node for node in graph.nodes if is_call(node) and node not in late and (node in wanted or is_random(node))]
    early = closure([node for node in [*outputs, *ran] if isinstance(node, fx.Node)])
    calls = [node for node in sorted(early | wanted, key=order.__getitem__) if is_call(node)]
    return [node for node in calls if node in early], [node for node in calls if node not in early]


def groups_of(early: list[fx.Node], late: list[fx.Node]) -> dict[fx.Node, int]:
    """For each call of the backward pass the number of the autograd node that ran it, from 1; SUM for the engine's own sums.

    Calls of one node follow one another, and torch gives them the number of the forward call. The sums of gradients that come
    from several readers are made between nodes, with a number that no forward call was given before them.
    """
    after = max((node.meta.get("seq_nr") or 0 for node in early), default=0)
    found: dict[fx.Node, int] = {}
    number, last = 0, None
    for node in late:
        known = node.meta.get("seq_nr")
        if node.target == torch.ops.aten.add.Tensor and (known or 0) >= after > 0:
            found[node], last = SUM, None
            continue
        number += known is None or known != last
        found[node], last = number, known
    return found


def ran_backward(node: fx.Node) -> bool:
    """Whether a node was traced after the backward pass began."""
    return "backward" in str(node.meta.get("partitioner_tag"))

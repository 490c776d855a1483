"""A joint graph of AOTAutograd's -> a traced program, and a schedule of it -> the two graphs that AOTAutograd wants.

    describe    the joint graph with descriptors that `planner.capture.graph.lower` knows
    emit        forward and backward graph in the order of a schedule, recomputation written out in the backward graph

AOTAutograd does the wiring to the caller (aliases, mutated inputs, who gets which gradient); the graphs made here only
have to keep its conventions: the forward graph returns its outputs and then what it saves, the backward graph takes
what was saved and then the tangents, and returns one gradient, or None, for each input.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    SavedForBackwardsAOTOutput,
    TangentAOTInput,
)

from ...planner.capture.graph import Traced, lower
from ...planner.capture.nodes import is_call, is_pick
from ...planner.capture.sized import family_of, with_numbers
from ...planner.capture.symbols import Symbols
from ...planner.ir.family import Family
from ...planner.ir.machine import Machine
from ...planner.ir.program import Phase
from ...planner.ir.schedule import Free, Run, Schedule, Start
from ..eager.codegen import Generated, get_state
from .identity import Arguments


@dataclass(frozen=True)
class Joint:
    """A joint graph (or an inference's graph) ready to be planned.

    Attributes:
        graph: with descriptors on its ends.
        traced: its program and wiring; what AOTAutograd writes back after the forward pass is not part of the wiring.
        returns: what the forward pass returns: a node, or the value of a constant.
        inputs: how many the graph has, tangents left out.
        places: among them, of those that its code takes, in the code's order.
        leaves: placeholders by the arguments of the piece that they stand for.
        family: the program at any sizes, of a graph with symbols for some.
    """

    graph: fx.GraphModule
    traced: Traced
    returns: tuple[Any, ...]
    inputs: int
    places: tuple[int, ...]
    leaves: dict[int, fx.Node]
    family: Family | None = None


def describe(
    graph: fx.GraphModule,
    arguments: Arguments,
    forward_outputs: int,
    name: str,
    device: str,
    region_of: Callable[[fx.Node], int | None] = lambda cast: None,
    outside: bool = False,
    symbols: Symbols | None = None,
) -> Joint:
    """Lower a graph that AOTAutograd hands to a partitioner or to an inference compiler.

    Args:
        graph: left as it is.
        arguments: what its inputs are.
        forward_outputs: how many of its outputs the forward pass returns; the gradients follow.
        name: the program's name.
        device: the type of device it runs on.
        region_of: as for `planner.capture.restore.merge_casts`.
        outside: the caller computes a loss of its outputs, of which nothing is known.
        symbols: for sizes that vary, if some do.

    Raises:
        CaptureError: an op that cannot be planned, or sizes that cannot vary.
    """
    copied = fx.GraphModule(graph, copy_graph(graph.graph))
    nodes = list(copied.graph.nodes)
    ends = nodes[-1]
    values, descs = list(ends.args[0]), list(ends.meta["desc"])
    order = {node: place for place, node in enumerate(node for node in nodes if node.op == "placeholder")}
    given = [(node, node.meta["desc"]) for node in order]
    leaves = {desc.idx: node for node, desc in given if type(desc).__name__ == "PlainAOTInput"}
    renamed = describe_inputs(nodes, arguments)
    returns = tuple(values[:forward_outputs])
    wired = [(value, PlainAOTOutput(idx=index)) for index, value in enumerate(returns) if isinstance(value, fx.Node)]
    for value, desc in zip(returns, descs, strict=False):
        if isinstance(desc, InputMutationAOTOutput):  # said a second time, so that old contents are not read after it
            wired.append((value, InputMutationAOTOutput(mutated_input=renamed[desc.mutated_input])))  # type: ignore[arg-type]
    for value, desc in zip(values[forward_outputs:], descs[forward_outputs:], strict=True):
        if isinstance(value, fx.Node):
            wired.append((value, GradAOTOutput(grad_of=renamed[desc.grad_of])))  # type: ignore[arg-type]
    ends.args = (tuple(value for value, _ in wired),)
    ends.meta["desc"] = [desc for _, desc in wired]
    traced = lower(
        copied,
        name=name,
        device=device,
        parameter_name=lambda target: target,
        input_leaf=lambda index: index,
        train=len(values) > forward_outputs,
        loss=None,
        optimizer=None,
        in_backward=False,
        trainable=set(),
        runs_on=device,
        unknown=outside,
        region_of=region_of,
        prepare=(lambda graph: None) if symbols is None else partial(with_numbers, symbols=symbols),
    )
    family = None if symbols is None else family_of(traced, symbols, None)
    taken = [node for node, source in traced.sources.items() if node in order and source.kind != "tangent"]
    outputs = tuple(value for value in returns if isinstance(value, fx.Node))
    traced = dataclasses.replace(traced, outputs=outputs, mutations={})
    inputs = sum(not isinstance(desc, TangentAOTInput) for _, desc in given)
    return Joint(copied, traced, returns, inputs, tuple(order[node] for node in taken), leaves, family)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with the same names and metadata, its output node included."""
    copied, known = fx.Graph(), {}
    for node in graph.nodes:
        known[node] = copied.node_copy(node, known.__getitem__)
    return copied


def describe_inputs(nodes: list[fx.Node], arguments: Arguments) -> dict[Any, Any]:
    """Give each placeholder the descriptor of what it is to the user.

    Returns:
        For each descriptor that AOTAutograd gave, the one that stands in its place.
    """
    renamed: dict[Any, Any] = {}
    tangents = 0
    for index, node in enumerate(node for node in nodes if node.op == "placeholder"):
        known = node.meta["desc"]
        if isinstance(known, TangentAOTInput):
            node.meta["desc"] = TangentAOTInput(output=PlainAOTOutput(idx=tangents))
            tangents += 1
            continue
        argument = arguments.find(known)
        if argument is not None and argument.kind == "parameter":
            desc: Any = ParamAOTInput(target=argument.name)
        elif argument is not None and argument.kind == "buffer":
            desc = BufferAOTInput(target=argument.name)
        else:
            desc = PlainAOTInput(idx=index)
        renamed[known] = node.meta["desc"] = desc
    return renamed


@dataclass
class _Emitter:
    """One graph under construction, and which nodes of the joint graph have a value at this point."""

    joint: Joint
    machine: Machine
    graph: fx.Graph = field(default_factory=fx.Graph)
    alive: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def source(self, node: fx.Node) -> None:
        """Take a value from outside."""
        if node.op == "get_attr":
            self.alive[node] = self.graph.node_copy(node)
            return
        placed = self.graph.placeholder(node.name)
        placed.meta = {key: value for key, value in node.meta.items() if key != "desc"}
        self.alive[node] = placed

    def instruction(self, step: Any) -> None:
        """Carry out one instruction of a schedule."""
        if isinstance(step, Free) and step.tier == 0:
            self.drop(step.buffer)
        elif isinstance(step, Start) and self.machine.tier_index(self.machine.links[step.link].target) == 0:
            node = self.joint.traced.base[step.buffer]
            self.alive[node] = self.graph.call_function(fetched, ())
            self.alive[node].meta = {key: value for key, value in node.meta.items() if key != "desc"}
        elif isinstance(step, Run) and (node := self.joint.traced.nodes[step.op]) is not None:
            self.call(step, node)

    def call(self, step: Run, node: fx.Node) -> None:
        """Copy a call, and the picks of its results that live on."""
        made = self.graph.node_copy(node, self.read)
        for _, old in step.reuse:  # the op is the last to read it; the graph itself writes nothing in place
            self.drop(old)
        if isinstance(node.meta["val"], torch.Tensor):
            if step.keep:
                self.alive[node] = made
            return
        for pick in node.users:
            if is_pick(pick) and self.joint.traced.owner.get(pick) in step.keep and pick not in self.alive:
                self.alive[pick] = self.graph.node_copy(pick, {node: made}.__getitem__)

    def read(self, node: fx.Node) -> fx.Node:
        """The node's value here; views of what is alive are made where they are read."""
        if node not in self.alive:
            if not is_pick(node) and not is_call(node):
                raise AssertionError(f"{node} is read where it does not exist")
            self.alive[node] = self.graph.node_copy(node, self.read)
        return self.alive[node]

    def drop(self, buffer: int) -> None:
        """Forget a buffer's tensors, and tuples of its views."""
        owner = self.joint.traced.owner
        for node in list(self.alive):
            owned = [node] if node in owner else [pick for pick in node.users if pick in owner]
            if any(owner[known] == buffer for known in owned):
                del self.alive[node]

    def finish(self, values: Sequence[Any], descs: Sequence[Any] | None = None) -> fx.GraphModule:
        """The module that returns these values."""
        ends = self.graph.output(tuple(values))
        if descs is not None:
            ends.meta["desc"] = list(descs)
        self.graph.lint()
        return fx.GraphModule(self.joint.graph, self.graph)


def emit(joint: Joint, schedule: Schedule, code: Generated, machine: Machine) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph of a schedule.

    They save what the generated code saves, in the same order, so that either can stand for the other.

    Args:
        joint: what the schedule belongs to.
        schedule: with a loss, which is where the forward pass ends.
        code: generated from the same schedule.
        machine: whose links the schedule names.
    """
    traced = joint.traced
    steps = schedule.instructions
    cut = next(at for at, step in enumerate(steps)
               if isinstance(step, Run) and traced.program.ops[step.op].phase is Phase.LOSS)  # fmt: skip
    tangents = [node for node, source in traced.sources.items() if source.kind == "tangent"]
    primals = [node for node in traced.sources if node.op == "placeholder" and node not in set(tangents)]
    placed = dict(zip(joint.places, primals, strict=True))
    first = _Emitter(joint, machine)
    for place in range(joint.inputs):
        if place in placed:
            first.source(placed[place])
        else:  # a size, which is not read
            first.graph.placeholder(f"size_{place}")
    for node in traced.sources:
        if node.op == "get_attr":
            first.source(node)
    for step in steps[:cut]:
        first.instruction(step)
    returned = [first.read(value) if isinstance(value, fx.Node) else value for value in joint.returns]
    saved = [first.read(node) for node in code.saved]
    size = sum(state.numel() for state in get_state())
    states = [stand_in(first.graph, joint, packed_state, size) for _ in range(code.states)]
    states += [stand_in(first.graph, joint, token_of, 0)] if code.tiers else []
    descs = [PlainAOTOutput(idx=index) for index in range(len(returned))]
    kept = [SavedForBackwardsAOTOutput(idx=index) for index in range(len(saved) + len(states))]
    forward = first.finish([*returned, *saved, *states], [*descs, *kept])

    second = _Emitter(joint, machine)
    for node in code.saved:
        second.alive[node] = known = second.graph.placeholder(node.name)
        known.meta = {key: value for key, value in node.meta.items() if key != "desc"}
    for number, state in enumerate(states):
        second.graph.placeholder(f"random_state_{number}").meta = dict(state.meta)
    for node in tangents:
        second.source(node)
    for step in steps[cut:]:
        second.instruction(step)
    found = {place: second.read(node) for place, node in traced.gradients}
    values = [found.get(placed[place]) if place in placed else None for place in range(joint.inputs)]
    backward = second.finish(values)
    return forward, backward


def stand_in(graph: fx.Graph, joint: Joint, target: Any, size: int) -> fx.Node:
    """A node that stands for bytes that only generated code computes: a generator's packed state, or a step's visits."""
    node = graph.call_function(target, ())
    like = next(known for known in joint.traced.owner if known.op == "placeholder").meta["val"]
    node.meta["val"] = like.new_empty(size, dtype=torch.uint8, device="cpu")
    return node


def packed_state() -> torch.Tensor:
    """The generators' states as one tensor of bytes, which autograd can save."""
    return pack(get_state())


def fetched() -> torch.Tensor:
    """What comes from another tier; only generated code copies it."""
    raise AssertionError("the graph of a schedule with copies is not run")


def token_of(code: Generated | None = None, carried: Sequence[Any] = ()) -> torch.Tensor:
    """An empty tensor, which autograd can save, with what it cannot.

    Args:
        code: that has run forward.
        carried: its visits to the tiers, which end when the token is dropped, and its sizes.
    """
    token = torch.empty(0, dtype=torch.uint8)
    token.memplan_carried = code, list(carried)  # type: ignore[attr-defined]
    return token


def carried_by(token: torch.Tensor) -> tuple[Any, list[Any]]:
    """What `token_of` put away."""
    return token.memplan_carried  # type: ignore[attr-defined]


def pack(states: list[torch.Tensor]) -> torch.Tensor:
    """Generator states end to end; the first is the CPU's."""
    return torch.cat(states)


def unpack(packed: torch.Tensor) -> list[torch.Tensor]:
    """The states that `pack` put together."""
    first = torch.get_rng_state().numel()
    return [part for part in (packed[:first].clone(), packed[first:].clone()) if part.numel()]


__all__ = ["Joint", "describe", "emit", "pack", "unpack"]

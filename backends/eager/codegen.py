"""A schedule -> the source of two Python functions, forward and backward, that call torch's operators directly.

Generated code rather than an interpreter: a step then costs what eager PyTorch's own dispatch costs. A buffer's first
tensor is a local variable; views of it are made where they are read, and deleted with it, so that a storage is freed
exactly where the schedule frees it.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...planner.capture.graph import Source, Traced
from ...planner.capture.nodes import is_call, is_pick
from ...planner.capture.observers import is_observation, row_of
from ...planner.ir.machine import Machine
from ...planner.ir.program import Phase, Program
from ...planner.ir.schedule import Free, Run, Schedule, Start, Wait
from ..tiers.moving import blank, make_tier, places_of
from .accumulation import Accumulation
from .fetched import Homes
from .observers import observe
from .updates import Updates

# Kernels that save what their backward kernel reads only while gradients are on, as they are not where an op is run again.
KEEPING = {torch.ops.aten.mkldnn_rnn_layer.default}


@dataclass(frozen=True)
class Generated:
    """Two functions and how to call them.

    Attributes:
        source: the text of both.
        forward: `forward(inputs) -> (outputs, saved)`; a list of tensors by `arguments`, and a list for `backward`.
        backward: `backward(saved, tangents) -> gradients`, by `gradients`; None for an inference.
        arguments: where each element of `inputs` comes from.
        gradients: for each gradient the position in `arguments` of what it belongs to.
        tangents: which outputs the tangents belong to, and how each is laid out; None where the code sees to that itself.
        saved: the nodes whose tensors head the list for `backward`; saved generator states follow them.
        states: how many generator states follow.
        lent: which of the gradients lie in the arena.
        arena: where the step's own tensors lie, if their addresses are planned.
        tiers: the memories that values are moved to, by the machine's number.
        updates: the updates that the step runs in backward.
        homes: parameters and optimizer state that lie elsewhere between steps.
        sizes: how many sizes end the list for `backward`, of code for inputs of any size.
        lock: see `alone`.
    """

    source: str
    forward: Any
    backward: Any
    arguments: tuple[Source, ...]
    gradients: tuple[int, ...]
    tangents: dict[int, torch.Tensor | None]
    saved: tuple[fx.Node, ...] = ()
    states: int = 0
    lent: tuple[int, ...] = ()
    arena: Any = None
    tiers: dict[int, Any] = field(default_factory=dict)
    updates: Updates | Accumulation | None = None
    homes: Homes | None = None
    sizes: int = 0
    lock: Any = field(default_factory=threading.RLock)

    def alone(self) -> AbstractContextManager[Any]:
        """Lets one inference run at a time where several would share memory: an arena, or parameters that come and go."""
        return nullcontext() if self.arena is None and self.homes is None else self.lock


@dataclass
class Scope:
    """One function under construction: its lines, how deep the next is indented, and which nodes are variables now."""

    lines: list[str] = field(default_factory=list)
    depth: int = 1
    alive: dict[fx.Node, str] = field(default_factory=dict)
    of_buffer: dict[int, list[fx.Node]] = field(default_factory=dict)


class Writer:
    """Walks a schedule once and writes both functions."""

    def __init__(
        self,
        traced: Traced,
        schedule: Schedule,
        machine: Machine | None = None,
        updates: Updates | Accumulation | None = None,
        homes: Homes | None = None,
    ):
        self.traced = traced
        self.updates, self.homes = updates, homes
        self.away = {buffer for buffer, _ in schedule.homes}
        self.program: Program = traced.program
        self.schedule = schedule
        self.machine = machine
        self.offsets, ends = ({}, {}) if machine is None else places_of(traced.program, machine, schedule)
        self.tiers = {tier: make_tier(machine, tier, size) for tier, size in ends.items() if machine is not None}
        self.constants: dict[str, Any] = {}
        self.constant_names: dict[Any, str] = {}
        self.names: dict[fx.Node, str] = {}
        self.scope = Scope()
        self.holder: dict[int, fx.Node] = {}  # buffer -> node that its variable stands for now
        runs = Counter(step.op for step in schedule.instructions if isinstance(step, Run))
        self.again = {op for op, count in runs.items() if count > 1}
        self.ran: set[int] = set()
        self.states: dict[int, str] = {}

    def write(self) -> Generated:
        """The two functions, compiled."""
        placeholders = [(node, source) for node, source in self.traced.sources.items() if source.kind != "tangent"]
        tangents = [(node, source) for node, source in self.traced.sources.items() if source.kind == "tangent"]
        for node, _ in placeholders:
            self.bind(node)
        head = ["def forward(inputs):", *self.unpack([node for node, _ in placeholders], "inputs")]
        head += [f"    t{tier} = open_{tier}()" for tier in self.tiers]
        visits = [f"t{tier}" for tier in self.tiers]
        steps = self.schedule.instructions
        cut = next(
            (at for at, step in enumerate(steps) if isinstance(step, Run) and self.phase(step) is Phase.LOSS),
            len(steps),
        )
        for step in steps[:cut]:
            self.instruction(step)
        outputs = [self.read(node) for node in self.traced.outputs]
        saved = self.crossing(steps[cut:])
        states = [self.states[op] for op in sorted(self.states)]
        sizes = self.sizes
        kept = ", ".join([*(self.name(node) for node in saved), *states, *visits, *sizes])
        forward = [
            *head,
            *self.measured(placeholders),
            *self.computed(),
            *self.scope.lines,
            f"    return [{', '.join(outputs)}], [{kept}]",
        ]
        backward: list[str] = []
        lent: list[int] = []
        if cut < len(steps):
            self.scope = Scope()
            self.cross(saved)
            for node, _ in tangents:
                self.bind(node)
            tail = ["def backward(saved, tangents):"]
            tail += self.unpack_names([*(self.name(node) for node in saved), *states, *visits, *sizes], "saved")
            tail += ["    saved.clear()", *self.unpack([node for node, _ in tangents], "tangents")]
            self.lay_out([node for node, _ in tangents])
            for step in steps[cut:]:
                self.instruction(step)
            returned = [self.read(node) for _, node in self.traced.gradients]
            lent = [index for index, (_, node) in enumerate(self.traced.gradients) if self.is_lent(node)]
            closed = [f"    {visit}.close()" for visit in visits]
            backward = [*tail, *self.computed(), *self.scope.lines, *closed, f"    return [{', '.join(returned)}]"]
        source = "\n".join([*forward, "", *backward]) + "\n"
        order = {node: index for index, (node, _) in enumerate(placeholders)}
        space: dict[str, Any] = {
            **self.constants,
            "get_state": get_state,
            "drawing_from": drawing_from,
            "enable_grad": torch.enable_grad,
            "updates": self.updates,
            "homes": self.homes,
            "observe": observe,
            "laid_out": laid_out,
            "math": math,
        }
        space |= {f"open_{tier}": memory.open for tier, memory in self.tiers.items()}
        exec(compile(source, "<memplan schedule>", "exec"), space)
        return Generated(
            source=source,
            forward=space["forward"],
            backward=space.get("backward"),
            arguments=tuple(source for _, source in placeholders),
            gradients=tuple(order[node] for node, _ in self.traced.gradients),
            tangents={source.index: self.layout_of(node) for node, source in tangents},
            saved=tuple(saved),
            states=len(states),
            lent=tuple(lent),
            tiers=self.tiers,
            updates=self.updates,
            homes=self.homes,
            sizes=len(sizes),
        )

    @property
    def sizes(self) -> list[str]:
        """Variables for the sizes of the inputs, of code that takes any."""
        return []

    def measured(self, placeholders: list[tuple[fx.Node, Source]]) -> list[str]:
        """Lines that read the sizes from the inputs."""
        return []

    def computed(self) -> list[str]:
        """Lines that compute what the function under construction wants of the sizes; the next one computes its own."""
        return []

    def layout_of(self, node: fx.Node) -> torch.Tensor | None:
        """How a tangent is laid out; None where the code sees to that."""
        return node.meta["val"]

    def lay_out(self, tangents: list[fx.Node]) -> None:
        """The lines that see to it."""

    def is_lent(self, node: fx.Node) -> bool:
        """Whether a gradient lies in memory that the next step writes over."""
        return False

    def phase(self, step: Run) -> Phase:
        """The phase of the op that an instruction runs."""
        return self.program.ops[step.op].phase

    def unpack(self, nodes: list[fx.Node], source: str) -> list[str]:
        """A line that takes a list apart into the nodes' variables."""
        return self.unpack_names([self.name(node) for node in nodes], source)

    def unpack_names(self, names: list[str], source: str) -> list[str]:
        """A line that takes a list apart into variables."""
        return [f"    [{', '.join(names)}] = {source}"] if names else []

    def name(self, node: fx.Node) -> str:
        """The node's variable."""
        return self.names.setdefault(node, f"v{len(self.names)}")

    def bind(self, node: fx.Node) -> None:
        """From here on the node's variable holds its value."""
        self.scope.alive[node] = self.name(node)
        if node in self.traced.owner:
            buffer = self.traced.owner[node]
            self.scope.of_buffer.setdefault(buffer, []).append(node)

    def crossing(self, rest: tuple[Any, ...]) -> list[fx.Node]:
        """Base nodes of the buffers that exist at the end of the forward pass and are read after it."""
        wanted: set[int] = set()
        for step in rest:
            if isinstance(step, Run) and self.phase(step) is not Phase.UPDATE:
                op = self.program.ops[step.op]
                node = self.traced.nodes[step.op]
                wanted.update(op.reads if op.phase is not Phase.LOSS else ())
                if node is not None:  # the node may take more than decides its result: running statistics
                    wanted.update(self.traced.owner[arg] for arg in node.all_input_nodes if arg in self.traced.owner)
        wanted.update(self.traced.owner[node] for _, node in self.traced.gradients)
        return [node for node in self.scope.alive if node in self.traced.owner
                and self.traced.owner[node] in wanted and self.is_base(node)]  # fmt: skip

    def cross(self, saved: list[fx.Node]) -> None:
        """The backward function begins with what was saved for it."""
        for node in saved:
            self.bind(node)

    def is_base(self, node: fx.Node) -> bool:
        """Whether the node's value is a storage's first tensor, or one of the names of a resident one."""
        return node in self.traced.sources or node is self.traced.base[self.traced.owner[node]]

    def instruction(self, step: Any) -> None:
        """The lines of one instruction."""
        if isinstance(step, Free):
            if step.tier == 0 and step.buffer in self.away:
                self.release(step.buffer)
            elif step.tier == 0:
                self.drop(step.buffer)
        elif isinstance(step, Start | Wait):
            self.move(step)
        elif isinstance(step, Run):
            if step.op in self.traced.mutations:
                target, node = self.traced.mutations[step.op]
                place = next(known for known, source in self.traced.sources.items() if source == target)
                value = self.read(node)
                self.line(f"{self.constant(torch.ops.aten.copy_.default, 'copy')}({self.read(place)}, {value})")
            elif step.op in self.traced.updates:
                gradients = ", ".join(self.read(node) for _, node in self.traced.updates[step.op])
                self.line(f"updates.update({step.op}, [{gradients}])")
            elif is_observation(self.traced.nodes[step.op]):
                self.show(self.traced.nodes[step.op])
            elif self.traced.nodes[step.op] is not None:
                self.call(step, self.traced.nodes[step.op])

    def show(self, node: Any) -> None:
        """The line that calls a hook."""
        self.line(f"observe({row_of(node)}, {self.argument(node.args[0])})")

    def move(self, step: Start | Wait) -> None:
        """The line of a copy to another tier or from there, or of the wait for it."""
        assert self.machine is not None
        link = self.machine.links[step.link]
        source, target = self.machine.tier_index(link.source), self.machine.tier_index(link.target)
        visit = f"t{source or target}"
        if step.buffer in self.away:
            verb = "wait" if isinstance(step, Wait) else "store" if source == 0 else "fetch"
            self.line(f"homes.{verb}({step.buffer})")
            return
        if isinstance(step, Wait):
            self.line(f"{visit}.wait({step.buffer})")
            return
        node = self.traced.base[step.buffer]
        offset = self.offsets[step.buffer, source or target]
        if target == 0:
            self.arrive(node)
        verb, value = "get" if target == 0 else "put", self.storage_of(node)
        self.line(f"{visit}.start({step.buffer}, {visit}.{verb}({offset}, {value}))")

    def release(self, buffer: int) -> None:
        """The lines that take the memory of a resident tensor: its views go, its own variable stays."""
        nodes = self.scope.of_buffer.get(buffer, [])
        self.scope.of_buffer[buffer] = [node for node in nodes if node not in self.traced.sources]
        self.drop(buffer)
        self.scope.of_buffer[buffer] = [node for node in nodes if node in self.traced.sources]
        self.line(f"homes.release({buffer})")

    def arrive(self, node: fx.Node) -> None:
        """A new tensor for a value that is about to be copied in."""
        made = self.constant(blank(node.meta["val"], self.program.device), f"blank_{self.name(node)}")
        self.line(f"{self.name(node)} = {made}()")
        self.bind(node)

    def storage_of(self, node: fx.Node) -> str:
        """A tensor that stands for the bytes of a value's buffer."""
        return self.read(node)

    def call(self, step: Run, node: fx.Node | None) -> None:
        """One operator call."""
        assert node is not None
        op = self.program.ops[step.op]
        args = [self.argument(arg) for arg in node.args]
        kwargs = [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
        target: Any = node.target
        taken = self.taken(step)
        if taken is not None:
            form = self.traced.in_place[step.op, taken]
            target = form.target
            if form.out is not None:
                kwargs.append(f"{form.out}={self.read(form.operand)}")
        guarded = op.random and step.op in self.again
        if guarded and step.op not in self.ran:
            self.states[step.op] = f"s{step.op}"
            self.line(f"s{step.op} = get_state()")
        elif guarded:
            self.line(f"with drawing_from(s{step.op}):")
            self.scope.depth += 1
        if target in KEEPING and op.phase is Phase.FORWARD:
            self.line("with enable_grad():")
            self.scope.depth += 1
        self.make(step, node, target, [*args, *kwargs], taken)
        self.scope.depth = 1
        self.ran.add(step.op)

    def taken(self, step: Run) -> int | None:
        """The buffer that a run writes over."""
        return step.reuse[0][1] if step.reuse else None

    def make(self, step: Run, node: fx.Node, target: Any, given: list[str], taken: int | None) -> None:
        """The line of a call, and variables for those of its results that live on."""
        made = f"{self.constant(target, node.name)}({', '.join(given)})"
        if taken is not None:
            self.line(f"{self.name(node)} = {made}")
            self.drop(taken, but=self.name(node))
            self.bind(node)
        elif isinstance(node.meta["val"], torch.Tensor):
            keeps = bool(step.keep)
            self.line(f"{self.name(node)} = {made}" if keeps else made)
            if keeps:
                self.bind(node)
        else:
            self.line(f"t = {made}")
            for pick in node.users:
                if is_pick(pick) and self.traced.owner.get(pick) in step.keep and pick not in self.scope.alive:
                    self.keep(pick, f"t[{pick.args[1]}]")
            self.line("del t")

    def keep(self, node: fx.Node, value: str) -> None:
        """A variable for one of several results."""
        self.line(f"{self.name(node)} = {value}")
        self.bind(node)

    def line(self, text: str) -> None:
        """Add a line to the function."""
        self.scope.lines.append("    " * self.scope.depth + text)

    def drop(self, buffer: int, but: str = "") -> None:
        """Delete every variable that keeps a buffer's storage alive."""
        names = sorted(
            {self.scope.alive.pop(node) for node in self.scope.of_buffer.pop(buffer, []) if node in self.scope.alive}
        )
        names = [name for name in names if name != but]
        if names:
            self.line(f"del {', '.join(names)}")

    def read(self, node: Any) -> str:
        """The variable of a node's value, with the views that lead to it made first."""
        if not isinstance(node, fx.Node):
            return self.argument(node)
        if node not in self.scope.alive:
            if is_pick(node):
                self.line(f"{self.name(node)} = {self.read(node.args[0])}[{node.args[1]}]")
            elif is_call(node):
                args = [self.argument(arg) for arg in node.args]
                kwargs = [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
                made = f"{self.constant(node.target, node.name)}({', '.join([*args, *kwargs])})"
                self.line(f"{self.name(node)} = {made}")
            else:
                raise AssertionError(f"{node} is read where it does not exist")
            self.bind(node)
            if node not in self.traced.owner:  # a tuple of views: it lives as long as what it views
                first = next(pick for pick in node.users if pick in self.traced.owner)
                self.scope.of_buffer.setdefault(self.traced.owner[first], []).append(node)
        return self.name(node)

    def argument(self, arg: Any) -> str:
        """An argument as an expression."""
        if isinstance(arg, fx.Node):
            return self.read(arg)
        if isinstance(arg, list | tuple):
            inner = ", ".join(self.argument(item) for item in arg)
            return f"[{inner}]"
        if arg is None or isinstance(arg, bool | int | str):
            return repr(arg)
        if isinstance(arg, float) and arg == arg and abs(arg) != float("inf"):
            return repr(arg)
        return self.constant(arg, "constant")

    def constant(self, value: Any, hint: str) -> str:
        """A global of the generated module that holds the value."""
        key = (type(value).__name__, str(value))
        if key not in self.constant_names:
            self.constant_names[key] = f"k{len(self.constants)}_{hint}" if hint.isidentifier() else f"k{len(self.constants)}"
            self.constants[self.constant_names[key]] = value
        return self.constant_names[key]


def generate(
    traced: Traced,
    schedule: Schedule,
    machine: Machine | None = None,
    updates: Updates | Accumulation | None = None,
    homes: Homes | None = None,
) -> Generated:
    """Write and compile the functions that carry out a schedule.

    Args:
        traced: what is scheduled.
        schedule: of its program.
        machine: whose tiers the schedule's copies name; needed only where it has any.
        updates: of the parameters; needed only where the program updates any in backward.
        homes: of the resident buffers; needed only where the schedule has any in another tier.
    """
    return Writer(traced, schedule, machine, updates, homes).write()


def laid_out(
    tangent: torch.Tensor | None, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tangent with the strides that the graph was traced with; zeros where autograd has none."""
    if tangent is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    if tangent.stride() == tuple(stride) and tangent.dtype == dtype:
        return tangent
    return torch.empty_strided(shape, stride, dtype=dtype, device=tangent.device).copy_(tangent)


def get_state() -> list[torch.Tensor]:
    """The state of every generator that the step may draw from."""
    return list(states())


def states() -> Iterator[torch.Tensor]:
    """The CPU generator's state, then the current CUDA device's if CUDA is in use."""
    yield torch.get_rng_state()
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state()


@contextmanager
def drawing_from(saved: list[torch.Tensor]) -> Iterator[None]:
    """Random numbers are those that came after `get_state`; then they go on where they were, whatever happens."""
    now = get_state()
    set_state(saved)
    try:
        yield
    finally:
        set_state(now)


def set_state(saved: list[torch.Tensor]) -> None:
    """Put back what `get_state` returned."""
    torch.set_rng_state(saved[0])
    if len(saved) > 1:
        torch.cuda.set_rng_state(saved[1])

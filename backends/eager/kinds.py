"""Kinds of calls that a module within a budget has met: one shape, or every size of some; and what runs each.

A kind was captured once. It has a plan for a call by itself, for one beside gradients that are there, and for one of several
before one backward pass; one of every size has some schedules, of which each size takes the fastest that fits there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from ...passes.liveness import held_bytes
from ...planner.capture.capture import Captured
from ...planner.capture.inputs import TensorFacts
from ...planner.capture.questions import Call
from ...planner.ir.errors import BudgetError, PlanMismatch
from ...planner.ir.plan import Plan
from ...planner.ir.program import Kind, Program
from .codegen import Generated
from .module import Runner, coded
from .stepwitness import Beside, StepWitness

ALONE = False, False  # no gradients are there, and no other calls
KNOWN = 512  # sizes whose choice is kept


class Ways(Protocol):
    """Schedules for every size of a capture: see `planner.verbs.sizes.SizedPlans`."""

    ways: list[Any]
    captured: Captured

    def at(self, sizes: tuple[int, ...]) -> Program:
        """The program at these sizes."""
        ...

    def fastest(self, sizes: tuple[int, ...], room: int, calls: int = 1, patient: bool = False) -> Any:
        """The fastest schedule that fits, with what the referee says of it; None where none does."""
        ...

    def loss(self, way: Any, sizes: tuple[int, ...]) -> float:
        """Seconds that a schedule takes beyond what keeping everything takes, where they may be worth a search."""
        ...

    def is_due(self, lost: float, sizes: tuple[int, ...], room: int, calls: int = 1) -> bool:
        """Look for another schedule once as much has been lost as looking takes."""
        ...

    def fitting(self, sizes: tuple[int, ...], room: int, calls: int = 1) -> Any:
        """The same of those that are known."""
        ...

    def solve(self, sizes: tuple[int, ...], budget: int, time_limit: float = 10.0) -> Any:
        """One more schedule, for these sizes."""
        ...

    def start(self) -> None:
        """Find the first schedules."""
        ...

    def check_against(self, other: Captured) -> tuple[int, ...]:
        """Compare the capture with another one of a single shape."""
        ...


class Session(Protocol):
    """A call that has been captured, to be planned for one budget or many: see `planner.verbs.session.Session`."""

    captured: Captured

    @property
    def program(self) -> Program:
        """What was captured, with its costs."""
        ...

    def accumulating(self, calls: int = 1) -> "Session":
        """The same with a step that adds to the gradients that are there, of other calls among them."""
        ...

    def plan(self, budget: int, *, calls: int = 1, reserved: int = 0) -> Plan:
        """The fastest that fits."""
        ...


@dataclass(frozen=True)
class Whose:
    """The module that runs, and what it is held to.

    Attributes:
        module: whose calls these are.
        model: the same with the model's own forward, which was captured.
        original: that forward.
        room: bytes that a step may take.
        witness: looks whether planned steps run at all.
        say: tells the user something, given a message.
        ways_of: from a session whose sizes vary to its schedules.
    """

    module: nn.Module
    model: nn.Module
    original: Callable[..., Any]
    room: int
    witness: StepWitness
    say: Callable[[str], None]
    ways_of: Callable[[Session], Ways]

    def runner(self, captured: Captured, code: Generated, peak: int, held: int) -> Runner:
        """What runs some code."""
        return Runner(self.module, self.original, captured, code, Beside(self.room, held, peak, self.witness))


class OneShape:
    """A kind of calls of one shape.

    Attributes:
        whose: module.
        session: that captured it.
        runners: for (calls before one backward pass, whether gradients are there) what runs.
    """

    def __init__(self, whose: Whose, session: Session):
        self.whose, self.session = whose, session
        self.adding: dict[bool, Session] = {}  # for whether there are other calls
        self.runners: dict[tuple[int, bool], Runner] = {}
        self.add(1, False)

    @property
    def captured(self) -> Captured:
        """The call."""
        return self.session.captured

    def pick(self, leaves: Sequence[Any], spec: TreeSpec) -> tuple[list[Any], list[Any]] | None:
        """The leaves of a call and the arguments of what runs, if the call is of this kind."""
        return picked(next(iter(self.runners.values())), leaves, spec)

    def is_like(
        self, shapes: Sequence[tuple[int, ...]], leaves: Sequence[Any], dynamic: Mapping[Any, Mapping[int, str]]
    ) -> bool:
        """Whether another call may differ from this one in the sizes that vary alone, as far as is known before it is traced.

        Args:
            shapes: of its leaves.
            leaves: themselves.
            dynamic: the dimensions that vary, for each leaf.
        """
        for leaf, (shape, known) in enumerate(zip(shapes, self.captured.signature.inputs, strict=True)):
            fixed = [dim for dim in range(len(shape)) if dim not in dynamic.get(leaf, ())]
            if isinstance(known, TensorFacts) and any(shape[dim] != known.shape[dim] for dim in fixed):
                return False
        call, known = Call([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]), {}
        try:
            return all(question.same(call, known) for question in self.captured.questions)
        except Exception:  # an operator with this shape's own sizes in it
            return True

    def runner(self, leaves: list[Any], calls: int, gradients: int) -> Runner:
        """What runs a call beside others, and beside so many bytes of gradients.

        Raises:
            BudgetError: no schedule fits.
        """
        wanted = (calls, gradients > 0 or calls > 1)
        alone = self.runners[1, False]
        if wanted == (1, True) and alone.witness.peak + gradients <= self.whose.room:
            return alone
        if wanted not in self.runners:
            self.add(*wanted)
        return self.runners[wanted]

    def add(self, calls: int, there: bool) -> None:
        """Plan for what lies beside a call.

        Raises:
            BudgetError: no schedule fits.
        """
        session, room = self.session, self.whose.room
        if there:
            if (calls > 1) not in self.adding:
                self.adding[calls > 1] = session.accumulating(calls)
            session = self.adding[calls > 1]
        try:
            plan = session.plan(room, calls=calls)
        except BudgetError as error:
            if calls == 1:
                raise larger(error, self.session.program, self.captured.signature.inputs, room) from None
            plan = session.plan(room)
            self.whose.say(f"{error}; each call is planned as if alone")
        assert plan.captured is not None
        code = coded(plan, plan.captured, self.whose.model)
        held = held_bytes(plan.program, plan.schedule)
        self.runners[calls, there] = self.whose.runner(plan.captured, code, plan.peak, held)


@dataclass
class Chosen:
    """What runs at some sizes.

    Attributes:
        runner: of the schedule.
        peak: its bytes at these sizes, and
        held: those of them that it holds between the passes.
        lost: seconds by which it is slower than keeping everything, as far as that may be worth another search.
    """

    runner: Runner
    peak: int
    held: int
    lost: float

    def ready(self) -> Runner:
        """What runs, whose witness knows what it takes."""
        self.runner.witness.peak, self.runner.witness.held = self.peak, self.held
        return self.runner


class EverySize:
    """A kind of calls whose sizes vary.

    Attributes:
        whose: module.
        session: that captured it.
        plans: for whether gradients are there, and other calls, schedules.
        runners: for each schedule what runs it.
        chosen: for sizes, calls before one backward pass and whether gradients are there: what runs.
    """

    def __init__(self, whose: Whose, session: Session):
        self.whose, self.session = whose, session
        self.plans: dict[tuple[bool, bool], Ways] = {ALONE: whose.ways_of(session)}
        self.runners: dict[int, Runner] = {}
        self.chosen: dict[tuple[tuple[int, ...], int, bool], Chosen] = {}

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the trace serves a call of this form: its sizes, and what the model asks of it."""
        assert self.captured.sized is not None
        shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        sizes = self.sizes_of(shapes)
        return self.answers(sizes, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])

    def is_like(self, known: Captured) -> bool:
        """Whether a call of one shape that was captured is one that the trace serves, of a model that was as it is now."""
        if [write.name for write in known.writes] != [write.name for write in self.captured.writes]:
            return False  # what a first call sets, for one
        given = known.signature.inputs
        shapes = [facts.shape if isinstance(facts, TensorFacts) else None for facts in given]
        return self.answers(self.sizes_of(shapes), [known.values.get(index) for index in range(len(given))])

    def answers(self, sizes: tuple[int, ...] | None, inputs: Sequence[torch.Tensor | None]) -> bool:
        """Whether the model's questions have the answers of the example in another call, as far as can be told."""
        sized = self.captured.sized
        assert sized is not None
        if sizes is None or not sized.holds(sizes):
            return False
        call, known = Call(inputs, sized.holds.by_symbol(sizes)), {}
        try:
            return all(question.same(call, known) for question in self.captured.questions)
        except Exception:  # an input that was not kept, or whatever an operator says of other sizes
            return False

    def sizes_of(self, shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
        """The sizes of a call whose leaves have these shapes; None where what does not vary is another."""
        sized = self.captured.sized
        assert sized is not None
        sizes = sized.of([None if shape is None else torch.empty(shape, device="meta") for shape in shapes])
        if sizes is None:
            return None
        wanted = sized.signature(self.captured.signature, sizes).inputs
        alike = all(shape == known.shape for shape, known in zip(shapes, wanted, strict=True) if isinstance(known, TensorFacts))
        return sizes if alike else None

    def confirm(self, known: Captured) -> None:
        """Compare the trace with one of a single shape, and find the first schedules.

        Raises:
            CaptureError: they differ.
        """
        self.plans[ALONE].check_against(known)
        self.plans[ALONE].start()
        self.first = self.of(ALONE, self.plans[ALONE].ways[0])

    @property
    def captured(self) -> Captured:
        """The call of the example."""
        return self.session.captured

    def pick(self, leaves: Sequence[Any], spec: TreeSpec) -> tuple[list[Any], list[Any]] | None:
        """The leaves of a call and the arguments of what runs, if the call is of this kind."""
        return picked(self.first, leaves, spec)

    def runner(self, leaves: list[Any], calls: int, gradients: int) -> Runner:
        """What runs a call beside others, and beside so many bytes of gradients.

        Raises:
            BudgetError: no schedule fits.
        """
        assert self.captured.sized is not None
        sizes = self.captured.sized.of(leaves)
        assert sizes is not None
        there = gradients > 0 or calls > 1
        alone = self.chosen.get((sizes, 1, False))
        if calls == 1 and there and alone is not None and alone.peak + gradients <= self.whose.room:
            return alone.ready()
        key = sizes, calls, there
        if key not in self.chosen:
            while len(self.chosen) >= KNOWN:
                self.chosen.pop(next(iter(self.chosen)))
            self.chosen[key] = self.choose(sizes, calls, there)
        lost, plans = self.chosen[key].lost, self.plans[there, calls > 1]
        if lost and plans.is_due(lost, sizes, self.whose.room, calls):
            self.chosen.clear()  # the new one may be better for other sizes too
            self.chosen[key] = self.choose(sizes, calls, there)
        return self.chosen[key].ready()

    def choose(self, sizes: tuple[int, ...], calls: int, there: bool) -> "Chosen":
        """The fastest schedule that fits at some sizes.

        Raises:
            BudgetError: none does.
        """
        beside = there, calls > 1
        if beside not in self.plans:
            self.plans[beside] = self.whose.ways_of(self.session.accumulating(calls))
            self.plans[beside].start()
        plans, room = self.plans[beside], self.whose.room
        found = plans.fastest(sizes, room, calls, patient=True)
        if found is None:
            try:
                plans.solve(sizes, room)
            except BudgetError as error:
                raise larger(error, plans.at(sizes), resized(self.captured, sizes), room) from None
            found = plans.fitting(sizes, room)
            if calls > 1:
                self.whose.say(f"{calls} calls before one backward pass do not fit together; each is planned as if alone")
        assert found is not None
        side = found.side
        lost = plans.loss(found.way, sizes)
        return Chosen(self.of(beside, found.way), side.peak, held_bytes(side.program, side.schedule), lost)

    def of(self, beside: tuple[bool, bool], way: Any) -> Runner:
        """What runs a schedule."""
        if id(way) not in self.runners:
            self.runners[id(way)] = self.whose.runner(self.plans[beside].captured, way.code, 0, 0)
        return self.runners[id(way)]


def picked(runner: Runner, leaves: Sequence[Any], spec: TreeSpec) -> tuple[list[Any], list[Any]] | None:
    """The leaves of a call and the arguments of what runs, if the call is the one planned for."""
    try:
        checked = runner.checks.check_leaves(list(leaves), spec)
        return checked, runner.checks.fetched(checked)
    except PlanMismatch:
        return None


def resized(captured: Captured, sizes: tuple[int, ...]) -> Sequence[Any]:
    """The facts of a call's inputs at other sizes."""
    assert captured.sized is not None
    return captured.sized.signature(captured.signature, sizes).inputs


def larger(error: BudgetError, program: Program, inputs: Sequence[Any], room: int) -> BudgetError:
    """The error of a batch that does not fit, with how much of it would."""
    rows = next((known.shape[0] for known in inputs if isinstance(known, TensorFacts) and len(known.shape) > 1), 0)
    fixed = program.resident_bytes - sum(buffer.bytes for buffer in program.buffers if buffer.kind is Kind.INPUT)
    if error.minimum is None or rows < 2 or room <= fixed:
        return error
    fitting = int(rows * (room - fixed) / (error.minimum - fixed))
    told = f"about {fitting} of the {rows} rows of this batch would fit" if fitting else "not one row of this batch would fit"
    return BudgetError(f"{error}; {told}", error.minimum)


__all__ = ["EverySize", "OneShape", "Session", "Ways", "Whose"]

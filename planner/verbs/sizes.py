"""One trace and a handful of schedules for every size of a model's inputs.

A `Session` at one shape is traced with symbols for the sizes that vary. Its planner finds some schedules, from the one that
keeps everything down to the smallest known. At other sizes the program is computed in milliseconds, and of these schedules the
fastest is taken that the referee accepts there: nothing is traced or solved.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ...passes.liveness import held_bytes
from ..cost.table import apply_costs
from ..ir.errors import BudgetError, InvalidSchedule, MemplanError
from ..ir.family import Sizes
from ..ir.plan import Plan, Side, Varying
from ..ir.schedule import Schedule
from ..ir.units import parse_bytes
from ..pipeline.planner import Planner
from ..pipeline.sized import Way, Ways
from .session import Session

if TYPE_CHECKING:
    from torch import nn

    from ...backends.eager.codegen import Generated
    from ..capture.capture import Captured
    from ..capture.sized import Sized

WAYS = 8  # schedules that are found at the sizes of the example
START = 10.0  # seconds for the first two, at most


def plan_sizes(session: Session, budget: int | str | None, sizes: tuple[Varying, ...]) -> Plan:
    """A plan that holds at every size up to the bounds, or the example's size where there is none.

    The schedule is the fastest for the largest sizes; the plan's figures are those of the example.

    Args:
        session: captured with these sizes varying.
        budget: as for `plan`.
        sizes: that vary.

    Raises:
        BudgetError: no schedule fits at the largest sizes.
        MemplanError: the model does something else at these than in the example.
    """
    plans, began = SizedPlans(session), time.monotonic()
    bounds = {size.name: size.most for size in sizes if size.most is not None}
    base = plans.sized.family.base
    largest = tuple(bounds.get(name, known) for name, known in zip(plans.names, base, strict=True))
    told = ", ".join(f"{name}={size}" for name, size in zip(plans.names, largest, strict=True))
    if not plans.holds(largest):
        asked_of_sizes = ", ".join(plans.sized.holds.told)
        raise MemplanError(f"at {told} the model, or torch, does something else than in the example: plan with an example of "
                           f"about these sizes, or smaller bounds; what was asked: {asked_of_sizes}")  # fmt: skip
    planner = session.begin()
    ends, session.began = planner.deadline, None
    capacity = session.machine.tiers[0].capacity
    asked = None if budget is None else parse_bytes(budget, of=planner.unplanned.peak)
    room = min(capacity if asked is None else asked, capacity)
    try:
        choice = plans.solve(largest, room, max(0.0, ends - time.monotonic()))
    except BudgetError as error:
        raise BudgetError(f"at {told}: {error}", error.minimum) from None
    recipe = msgspec.structs.replace(session.recipe, sizes=sizes)
    side = plans.side(choice.way, base)
    return session.made(side, min(planner.base_seconds, side.time), asked, side.peak, began, recipe)


class SizedPlans(Ways):
    """Plans for every size of a model's inputs, from one session.

    Attributes:
        session: captured with `dynamic`.
        sized: which sizes the capture serves.
    """

    def __init__(self, session: Session):
        """Nothing is solved yet: see `prepare`.

        Raises:
            MemplanError: the session was captured for one shape.
        """
        if session.captured.sized is None:
            raise MemplanError("this session was captured for one shape: make it with dynamic=")
        self.session = session
        self.sized: Sized = session.captured.sized

        def write(schedule: Schedule) -> "Generated":
            from ...backends.eager.sizedcode import generate_sized

            return generate_sized(session.captured, schedule)

        super().__init__(session.planner, self.sized.family, session.table, write)

    @property
    def captured(self) -> "Captured":
        """The capture at the sizes of the example."""
        return self.session.captured

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sizes."""
        return self.sized.names

    def sizes_of(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Sizes | None:
        """The sizes of a call of the model; None where it is another call, or one size is two numbers."""
        from ..capture.calls import flatten_call

        model = self.captured.model()
        if model is None:
            return None
        try:
            leaves, spec = flatten_call(model, args, dict(kwargs or {}))
        except TypeError:
            return None
        return self.sized.of(leaves) if spec == self.captured.signature.spec else None

    def holds(self, sizes: Sizes) -> bool:
        """Whether the trace serves these sizes; where it does not, they want a trace of their own."""
        return self.sized.holds(sizes)

    def check_against(self, other: "Captured") -> Sizes:
        """Compare the trace with an independent one for a single shape. Returns its sizes.

        Raises:
            CaptureError: they differ: the family is not to be used.
        """
        from ..capture.sizedcheck import check_against

        return check_against(self.captured, other)

    def learn(self, sizes: Sizes) -> None:
        """Measure the ops at these sizes too, so that costs at sizes between rest on both. Takes the session's time limit."""
        if self.session.table is None:
            raise MemplanError(f"{self.machine.name} is not at hand, so nothing can be measured on it: plan for this computer")
        self.session.began = time.monotonic()
        program = self.sized.family.at(sizes)
        self.session.measure_program(program, self.machine, self.session.table)
        self.costs.add(apply_costs(program, self.machine, self.session.table))
        self.known = {self.sized.family.base: self.program}

    def start(self) -> None:
        """Find the schedule that keeps everything, and the smallest known."""
        began = time.monotonic()
        self.prepare(2, START)
        self.price = time.monotonic() - began

    def planner_of(self, sizes: Sizes) -> Planner:
        """The same with all that the session allows."""
        return dataclasses.replace(self.session.planner_of(self.at(sizes)), progress=None)

    def search(self, planner: Planner, budget: int) -> Side:
        """The fastest schedule that is known from before, or that a planner finds until its deadline; it is written down.

        Raises:
            BudgetError: it finds none.
        """
        began = time.monotonic()
        side = self.session.known_plan(planner, budget)
        if side is None:
            side = super().search(planner, budget)
            self.session.keep_plan(planner, began, side, budget)
        return side

    def prepare(self, count: int = WAYS, time_limit: float | None = None) -> list[Way]:
        """Find schedules from the one that keeps everything down to the smallest known, with budgets evenly spaced between.

        Args:
            count: how many, at most.
            time_limit: seconds, at most; default: what is left of the session's.

        Returns:
            All that are known by now, the largest first.
        """
        planner = self.session.begin()
        ends = planner.deadline if time_limit is None else time.monotonic() + time_limit
        self.session.began = None
        self.add(planner.kept.schedule)
        planner.deadline = time.monotonic() + (ends - time.monotonic()) / max(count, 1)
        floor = self.session.floor_of(planner)
        self.session.note(floor, False)
        self.add(floor.schedule)
        top, bottom = planner.kept.peak, floor.peak
        for left in range(count - 2, 0, -1):
            planner.deadline = time.monotonic() + max(0.0, ends - time.monotonic()) / left
            try:
                self.add(planner.solve(bottom + (top - bottom) * left // (count - 1)).found.schedule)
            except BudgetError:  # the time is up
                break
        planner.deadline = float("inf")
        self.ways.sort(key=lambda way: way.seconds(self.program))
        return self.ways

    def module(self, way: Way, budget: int | None = None) -> "nn.Module":
        """A planned module that runs one way, at all sizes at which the trace holds and the referee accepts it in the budget.

        Raises:
            MemplanError: the model is gone.
        """
        from ...backends.eager.module import planned_module
        from ...backends.eager.stepwitness import StepWitness

        model = self.captured.model()
        if model is None:
            raise MemplanError("the model that was captured is gone: keep it as long as its plans")

        def admit(sizes: Sizes) -> bool:
            try:
                self.side(way, sizes, budget)
            except InvalidSchedule:
                return False
            return True

        witness = StepWitness(budget, held_bytes(self.program, way.schedule), self.captured.loss is not None, [])
        return planned_module(model, self.captured, way.code, witness, admit)

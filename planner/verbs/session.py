"""One model captured once, to be planned for one budget or many."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from ...passes.homes import Homes
from ...passes.outside import LeaveOutside
from ...passes.place import Place
from ...passes.transfers import routes_of
from ...solvers.face.answer import Answer
from ...solvers.warm import compile_addresses, compile_planning
from ..cost.eager import eager_peak
from ..cost.estimate import Estimate
from ..cost.table import Table, apply_costs, coverage
from ..ir.coverage import Coverage
from ..ir.errors import BudgetError, MachineError
from ..ir.machine import Machine, named_machine
from ..ir.plan import Plan, PlanBody, Recipe, Side, assemble, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import Run, check_levers
from ..ir.units import parse_bytes, shorten
from ..pipeline.calls import solve_calls, together
from ..pipeline.planner import Planner, answer_of
from .arguments import Progress, check_asked, check_dynamic, check_hooks, check_model, check_numbers, limit_tiers, traced_device
from .kept import Asked, has_floor, keep_floor, keep_plan, known_floor, known_plan
from .levers import levers_beyond, with_levers
from .solver import check_solver

if TYPE_CHECKING:
    from torch import nn

    from ..capture.capture import Captured
    from ..capture.symbols import Dynamic

PLACINGS = 8  # plans made to find one that fits with its arena


class Session:
    """One model captured once, to be planned for one budget or many.

    The arguments are those of `plan`, and `dynamic`: the sizes of inputs that vary, for `planner/verbs/sizes.py`, as
    `planner.capture.capture.capture` takes them.
    """

    def __init__(
        self,
        model: "nn.Module",
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        train: bool = True,
        loss: Callable[[Any], Any] | None = None,
        optimizer: Any = None,
        machine: str | Machine | None = None,
        allow: Iterable[str] | None = None,
        time_limit: float = 60.0,
        seed: int = 0,
        lend_gradients: bool = False,
        host_budget: int | str | None = None,
        optimizer_in_backward: bool = False,
        solver: str | None = None,
        progress: Progress | None = None,
        outside: bool = False,
        measured: bool = True,
        dynamic: "Dynamic | None" = None,
        runs: bool = True,
    ):
        """Check the arguments, capture the model, and measure its ops.

        Args:
            outside: as for `capture`.
            measured: measure ops that are not known yet; without, their times are estimated from those that are.
        """
        self.began: float | None = time.monotonic()
        levers = check_levers(allow)
        known = named_machine(machine)
        check_numbers(time_limit, seed)
        check_solver(solver, levers)
        check_model(model, kwargs)
        if dynamic is not None and runs:
            check_dynamic(levers, lend_gradients, optimizer_in_backward)
        from ...backends.eager.fetched import bring_back
        from ..capture.capture import capture
        from ..capture.inputtext import describe_inputs

        bring_back(model.parameters())
        if progress is not None:
            progress("tracing the model", 0.0)
        began = time.monotonic()
        self.time_limit, self.progress, self.compile_seconds = float(time_limit), progress, 0.0
        self.lend_gradients = lend_gradients
        self.captured: Captured = capture(
            model, args, dict(kwargs or {}), train=train, loss=loss, optimizer=optimizer, in_backward=optimizer_in_backward,
            device=traced_device(known), runs_on=None if known is None else known.device, outside=outside, dynamic=dynamic,
        )  # fmt: skip
        self.capture_seconds = time.monotonic() - began
        moves = "offload" in levers and (optimizer_in_backward or not train)
        check_hooks(self.captured.observed, False, optimizer_in_backward, moves)
        self.recipe = Recipe(
            inputs=describe_inputs(self.captured),
            train=train,
            loss=loss is not None,
            optimizer=None if optimizer is None else optimizer if isinstance(optimizer, str) else type(optimizer).__name__,
            in_backward=optimizer_in_backward,
            counted=None if isinstance(optimizer, str) else self.captured.counted,
        )
        real = known is None and all(value.device.type != "meta" for value in model.parameters())
        table, spoilt = None, False
        self.smallest: dict[bool, Side | None] = {}  # the smallest schedule known, with an arena and without
        self.placed: tuple[Any, Side] | None = None  # a schedule, and the same with addresses
        self.offload = "offload" in levers
        self.allowed = frozenset(levers)
        if known is None:
            from ..cost.local import device_key, doubts_rates, local_machine

            known = local_machine(self.captured.program.device, offload=self.offload)
            if machine not in (None, "local", known.name):
                raise MachineError(f"machine={machine!r}, but the model is on {known.device}: move it, or ask for 'local'")
            table, spoilt = Table(device_key(known.device)), doubts_rates(known.device)
            if real and measured:
                self.measure_program(self.captured.program, known, table, progress)
        self.machine = limit_tiers(known, host_budget)
        self.table, self.spoilt, self.seed, self.solver = table, spoilt, seed, solver
        self.prepare()

    def prepare(self) -> None:
        """Make the planner of what was captured."""
        began = time.monotonic()
        self.planner = self.planner_of(apply_costs(self.captured.program, self.machine, self.table))
        self.solve_began = time.monotonic() - began

    def planner_of(self, program: Program) -> Planner:
        """A planner, with this session's levers, of a program with costs: what was captured, or the same at other sizes."""
        machine, traced = self.machine, self.captured.traced
        routes = routes_of(machine) if self.offload and not traced.adds else []
        return Planner(
            program, machine, "recompute" in self.allowed, "reorder" in self.allowed, self.offload, seed=self.seed,
            progress=self.progress, solver=self.solver,
            homes=Homes(machine.tiers[routes[0].tier].capacity, traced.shared)(program) if routes else (),
        )  # fmt: skip

    @property
    def program(self) -> Program:
        """What was captured, with its costs."""
        return self.planner.program

    def accumulating(self, calls: int = 1) -> "Session":
        """The same with a step that adds to the gradients that are there, those of other calls before the same backward pass
        among them (`planner/capture/accumulate.py`)."""
        from ..capture.accumulate import added_up

        made = copy.copy(self)
        for name in ("static_planner", "lent"):
            vars(made).pop(name, None)
        made.captured, made.recipe = added_up(self.captured, calls > 1), msgspec.structs.replace(self.recipe, accumulate=True)
        made.smallest, made.placed = {}, None
        made.prepare()
        return made

    def measure_program(self, program: Program, machine: Machine, table: Table, progress: Progress | None = None) -> None:
        """Measure the ops of a program that the table of this device lacks."""
        from ...backends.measure.worker import calibrate

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress("measuring ops", done / max(total, 1))

        tell(0, 1)  # the first figure comes when a process has been started that measures
        calibrate(program, machine, table, time_limit=self.left(), progress=tell)

    def covered(self, side: Side) -> Coverage:
        """How much of a schedule's time was measured."""
        runs = [step.op for step in side.schedule.instructions if isinstance(step, Run)]
        alike = 0 if self.table is None else Estimate(self.table.samples(), self.machine).ops
        return coverage(side.program, self.table, runs, alike, self.spoilt)

    @cached_property
    def eager_peak(self) -> int | None:
        """Bytes at the peak of the step in eager mode; None where that is not known."""
        moments = self.captured.moments
        return None if moments is None else eager_peak(moments, self.planner.program, self.table)

    def left(self) -> float:
        """Seconds that are left: of the first plan's time limit what measuring has not taken, of a later one's all."""
        return self.time_limit if self.began is None else max(0.0, self.began + self.time_limit - time.monotonic())

    def begin(self, arena: bool = False) -> Planner:
        """The planner, which is told when to end; what has to be compiled first takes none of its time."""
        took = compile_planning(self.progress) + (compile_addresses(self.progress) if arena else 0.0)
        self.compile_seconds += took
        if self.began is not None:
            self.began += took
        planner = self.static_planner if arena else self.planner
        planner.deadline = time.monotonic() + self.left()
        planner.known = None if arena else self.known(False)
        return planner

    @cached_property
    def static_planner(self) -> Planner:
        """Plans steps that run in an arena."""
        from ...backends.eager.arena import with_transients

        program = with_transients(self.planner.program, lent=self.lent)
        return dataclasses.replace(self.planner, program=program, homes=(), known=None)

    @cached_property
    def lent(self) -> tuple[int, ...]:
        """The gradients that lie in an arena."""
        from ...backends.eager.arena import lendable

        return lendable(self.captured.traced) if self.lend_gradients else ()

    @property
    def static_floor(self) -> Side:
        """The smallest schedule known, in an arena."""
        side = self.static_planner.floor
        if self.placed is None or self.placed[0] is not side.schedule:
            self.placed = side.schedule, self.place(side)
        known = self.known(True)
        return min([self.placed[1], *([] if known is None else [known])], key=lambda side: side.peak)

    def known(self, arena: bool) -> Side | None:
        """The smallest schedule that earlier plans have found, in this process or another."""
        from ...backends.eager.arena import with_transients

        if arena not in self.smallest:
            program, machine = self.planner.program, self.machine
            self.smallest[arena] = known_floor(
                program, machine, self.allowed, self.planner.homes, self.kind_of(arena),
                lambda schedule: with_transients(program, schedule.outside, self.lent) if arena else program,
            )  # fmt: skip
        return self.smallest[arena]

    def kind_of(self, arena: bool) -> str:
        """What schedules with an arena, or without, are kept as."""
        return f"arena {self.lent}" if arena else ""

    def note(self, side: Side, arena: bool) -> int:
        """Keep a schedule if none as small is known. Returns the bytes of the smallest."""
        known, kind = self.known(arena), self.kind_of(arena)
        least = side if known is None or side.peak < known.peak else known
        if least is not known or not has_floor(self.planner.program, self.machine, self.allowed, kind):
            self.smallest[arena] = least
            keep_floor(least, self.planner.program, self.machine, self.allowed, kind)
        return least.peak

    def place(self, side: Side) -> Side:
        """A schedule with addresses, and what the referee says of it."""
        from ...backends.eager.arena import find_passing, with_transients

        passing = frozenset(buffer for buffers in find_passing(self.planner.program, self.lent) for buffer in buffers)
        schedule = msgspec.structs.replace(side.schedule, lent=self.lent)
        left = LeaveOutside(passing)(side.program, self.machine, schedule)
        program = with_transients(self.planner.program, left.outside, self.lent)
        schedule, _ = Place()(program, self.machine, left)
        return Side(program, schedule, referee(program, unlimited(self.machine), schedule))

    def levers(self, arena: bool, strategy: str | None) -> dict[str, int]:
        """What is not allowed and would take less than the smallest step known, estimated in bytes."""
        planner = self.planner if strategy is None else dataclasses.replace(self.planner, reorder=True)
        found = levers_beyond(planner, self.captured.traced, self.captured.counted, self.machine.device)
        if not arena:
            return found
        without = {f"{name} and no arena": size for name, size in found.items()}
        return {"no arena": planner.search.descent.peak if planner.recompute or planner.moves else planner.kept.peak} | without

    def solve_placed(self, budget: int) -> tuple[Answer[Side, float], Side]:
        """A plan whose arena and what lies beside it fit a budget: planned for less until they do; and the smallest known.

        Raises:
            BudgetError: none was found.
        """
        planner, target = self.static_planner, budget
        for number in range(PLACINGS):
            try:
                answer = planner.solve(target)
            except BudgetError:
                break
            side = self.place(answer.found)
            if side.peak <= budget:
                answer = answer_of(side, min(planner.bound(budget), answer.bound))
                return answer, min(self.static_floor, side, key=lambda each: each.peak)
            target -= side.peak - budget + number * budget // 200  # a little more each time, for the next one differs
        floor = self.static_floor
        if floor.peak <= budget:
            return answer_of(floor, planner.bound(budget)), floor
        raise planner.refuse(budget, floor)

    def floor_of(self, planner: Planner) -> Side:
        """The smallest schedule known of what was captured, looked for unless that has been done with the same levers."""
        known = planner.known
        if known is not None and has_floor(planner.program, self.machine, self.allowed):
            return known
        return planner.quick_floor

    def found_before(self, budget: int, calls: int) -> Answer[Side, float] | None:
        """The answer to the same question, if it has been found before, in this process or another."""
        planner = self.planner
        if planner.kept.peak <= budget or planner.known is None:
            return None
        side = self.known_plan(planner, budget, calls)
        return None if side is None or together(side, calls) > budget else answer_of(side, planner.bound(budget))

    def search(self, budget: int, calls: int) -> Answer[Side, float]:
        """Look for the answer, and write it down.

        Raises:
            BudgetError: none was found.
        """
        began = time.monotonic()
        answer = solve_calls(self.planner, budget, calls)
        if self.planner.kept.peak > budget:
            self.keep_plan(self.planner, began, answer.found, budget, calls)
        return answer

    def known_plan(self, planner: Planner, budget: int, calls: int = 1) -> Side | None:
        """The fastest schedule of a planner's program that was found before: see `planner/verbs/kept.py`."""
        asked, left = Asked(budget, calls, self.seed, self.solver), planner.deadline - time.monotonic()
        return known_plan(planner.program, self.machine, self.allowed, planner.homes, asked, left)

    def keep_plan(self, planner: Planner, began: float, side: Side, budget: int, calls: int = 1) -> None:
        """Write a schedule down as the fastest that a planner has found since it began."""
        limit = None if time.monotonic() < planner.deadline else planner.deadline - began
        keep_plan(side, self.machine, self.allowed, Asked(budget, calls, self.seed, self.solver), limit)

    def plan(
        self, budget: int | str | None, arena: bool = False, strategy: str | None = None, *, calls: int = 1, reserved: int = 0
    ) -> Plan:
        """The plan for one budget; with `arena`, with addresses; by a strategy other than the best; beside other calls."""
        check_asked(budget, None, arena, self.lend_gradients, strategy)
        check_hooks(self.captured.observed, arena, False, False)
        planner, self.began = self.begin(arena), None
        began = time.monotonic()
        capacity = self.machine.tiers[0].capacity
        asked = None if budget is None else parse_bytes(budget, of=planner.unplanned.peak)
        limit = min(asked if asked is not None else capacity, capacity) - reserved
        typed = f"the budget {shorten(budget)}, " if isinstance(budget, str) else ""
        planner.asked = typed if limit == asked else f"{self.machine.name}, " if limit == capacity else ""
        try:
            if arena:
                answer, lowest = self.solve_placed(limit)
                minimum = self.note(lowest, arena)
            elif strategy:
                answer = planner.solve_memo(limit)
                minimum = answer.found.peak
            else:
                answer = self.found_before(limit, calls) or self.search(limit, calls)
                minimum = self.note(min(self.floor_of(planner), answer.found, key=lambda each: each.peak), arena)
        except BudgetError as error:
            if strategy is None:
                self.note(self.static_floor if arena else planner.floor, arena)
            raise with_levers(error, limit, self.levers(arena, strategy)) from None
        recipe = msgspec.structs.replace(self.recipe, calls=calls, reserved=reserved)
        return self.made(answer.found, answer.bound, asked, minimum, began, recipe)

    def made(self, side: Side, bound: float, asked: int | None, minimum: int, began: float, recipe: Recipe) -> Plan:
        """The plan of a schedule.

        Args:
            side: the schedule.
            bound: seconds that none is faster than.
            asked: the budget.
            minimum: the smallest budget known to work.
            began: when planning did.
            recipe: of the capture.
        """
        body = PlanBody(
            program=side.program,
            machine=self.machine,
            recipe=recipe,
            budget=asked,
            planned=side.schedule,
            unplanned=self.planner.unplanned.schedule,
            bound=bound,
            minimum=minimum,
            capture_seconds=self.capture_seconds,
            solve_seconds=time.monotonic() - began + self.solve_began,
            compile_seconds=self.compile_seconds,
            coverage=self.covered(side),
            eager_peak=self.eager_peak,
        )
        return assemble(body, side, self.planner.unplanned, self.captured)

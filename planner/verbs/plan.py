"""The verb: `plan(model, budget)`."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import msgspec

from ...passes.homes import Homes
from ...passes.liveness import held_bytes
from ...passes.outside import LeaveOutside
from ...passes.place import Place
from ...passes.transfers import routes_of
from ...solvers.face.answer import Answer
from ...solvers.warm import compile_addresses, compile_planning
from ..cost.eager import eager_peak
from ..cost.estimate import Estimate
from ..cost.table import Table, apply_costs, coverage
from ..ir.coverage import Coverage
from ..ir.errors import BudgetError, CaptureError, MachineError, MemplanError
from ..ir.machine import Machine, named_machine
from ..ir.plan import Plan, PlanBody, Recipe, Side, assemble, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import LEVERS, Run, check_levers
from ..ir.units import parse_bytes, shorten, show_bytes
from ..pipeline.planner import Planner, answer_of
from .floors import keep_floor, known_floor
from .levers import levers_beyond, with_levers
from .solver import check_solver, check_strategy, solving

if TYPE_CHECKING:
    from torch import nn

    from ..capture.capture import Captured
    from ..capture.symbols import Dynamic
    from .sizes import SizedPlans

SEEDS = 2**31  # random generators take no larger ones, and some count on from the seed
SOME = 2**40  # bytes that a percentage is of while the peak is not known
PLACINGS = 8  # plans made to find one that fits with its arena
Progress = Callable[[str, float], None]


@solving()
def plan(
    model: "nn.Module",
    budget: int | str | None,
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
    arena: bool = False,
    lend_gradients: bool = False,
    strategy: str | None = None,
    host_budget: int | str | None = None,
    optimizer_in_backward: bool = False,
    solver: str | None = None,
    accumulate: bool = False,
    calls: int = 1,
    reserved: int | str = 0,
    progress: Progress | None = None,
) -> Plan:
    """The fastest step of a model that provably fits a number of bytes, with the same numbers as before.

    Args:
        model: parameters on cpu, cuda or meta; they are not touched.
        budget: bytes of physical peak, everything counted: 17179869184, "16GiB", "16GB", "60%" of the unplanned peak;
            None for the fastest step that the machine holds.
        args: example inputs: real, fake or meta tensors.
        kwargs: likewise.
        train: plan forward and backward; False for inference.
        loss: from the model's output to a scalar, where the caller computes it; default: the output itself or its `.loss`.
        optimizer: None, "sgd", "adam", "adamw" or a torch optimizer: its state and its step's temporaries count.
        machine: a preset's name, a TOML path or a `Machine`; default: the one the model is on, found out and measured.
        allow: which levers may be used, out of "recompute", "reorder" and "offload"; default: "recompute" and "reorder".
            Offload moves activations to the tiers behind the device: the host's memory for a GPU, a file for a CPU (in
            `MEMPLAN_OFFLOAD`, or else beside the measurements).
        time_limit: seconds for measuring and planning together, at most; not counted is the compiling of the solvers, which
            the first plan on a machine waits for.
        seed: of the search.
        arena: plan an address for every tensor that the step makes and keeps to itself: applied, the plan runs in one
            arena, made once, and fits the budget with it. Gradients and outputs are the caller's and lie beside it.
        lend_gradients: gradients lie in the arena too, as far as kernels can write them there, where the next forward pass
            has other things. They must be gone by then, as they are after `optimizer.zero_grad()`; a step that finds one
            still held refuses to run. So they cannot be accumulated.
        strategy: "memo" for MEMO's own rule of offload and recomputation (`remat/memo_rule.py`), to compare with; default: the
            fastest that is found.
        host_budget: bytes that may be used in each tier behind the device, in the same forms as `budget` ("50%" of the
            tier); default: what the machine has.
        optimizer_in_backward: the planned step updates each parameter itself, as soon as its gradient is complete, so that
            gradients never pile up; apply the plan with `plan.apply(model, optimizer=...)`. The numbers are those of a step
            after the backward pass; gradients are gone, so nothing can be clipped or accumulated.
        solver: of the integer programs that the search begins with: "highs", which is the default, "cbc", "scip", "gurobi" or
            "cplex", if it is installed.
        accumulate: gradients of earlier steps are there when the step begins, and it adds its own to them, each as soon as
            it is complete: for micro-batches between two optimizer steps. The budget counts them.
        calls: how many calls of the planned module come before one backward pass, as of a triplet's three; with more than
            one the step accumulates, and the budget holds for all of them together.
        reserved: bytes of the budget that are left to others, as 17179869184 or "2GiB": a second model, an EMA copy,
            DistributedDataParallel's buckets.
        progress: is told (stage, fraction of it).

    Returns:
        A plan that the referee has accepted.

    Raises:
        BudgetError: no schedule fits; `.minimum` is the smallest budget known to work.
        CaptureError: the model cannot be traced.
        MachineError: no such machine.
        MemplanError: an argument that makes no sense.

    Several threads may plan at once: they trace one after the other, for tracing changes the model and torch for a while.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> planned = memplan.plan(model, None, (torch.randn(8, 64),), loss=lambda out: out.sum()).apply(model)
        >>> planned(torch.randn(8, 64)).sum().backward()
    """
    check_asked(budget, host_budget, arena, lend_gradients, strategy)
    check_strategy(solver, strategy)
    check_calls(calls, accumulate, train, arena, strategy, optimizer_in_backward)
    spare = 0 if reserved == 0 else parse_bytes(reserved, what="number of bytes reserved")
    session = Session(
        model, args, kwargs, train=train, loss=loss, optimizer=optimizer, machine=machine, allow=levers_of(allow, strategy),
        time_limit=time_limit, seed=seed, lend_gradients=lend_gradients, host_budget=host_budget,
        optimizer_in_backward=optimizer_in_backward, solver=solver, progress=progress,
    )  # fmt: skip
    session = session.accumulating(calls) if accumulate or calls > 1 else session
    return session.plan(budget, arena, strategy, calls=calls, reserved=spare)


def levers_of(allow: Iterable[str] | None, strategy: str | None) -> Iterable[str] | None:
    """The levers that may be used: all that there are for a strategy, where nothing is said."""
    return LEVERS if strategy is not None and allow is None else allow


@solving()
def sweep(
    model: "nn.Module", points: int | Iterable[int | str], args: tuple = (), kwargs: Any = None, **options: Any
) -> list[Plan]:
    """Plans for falling budgets, from the unplanned peak to the smallest budget known to work, with one capture.

    Args:
        model: as in `plan`.
        points: how many budgets, evenly spaced; or the budgets themselves, in the forms that `plan` takes, of which those
            that no schedule meets are left out.
        args: as in `plan`.
        kwargs: as in `plan`.
        options: the other arguments of `plan`; `time_limit` is for each budget, the first of which pays for measuring.

    Returns:
        A plan for each budget, in their order.

    Raises:
        BudgetError: a budget that cannot be read.
        CaptureError: the model cannot be traced.
        MachineError: no such machine.
        MemplanError: an argument that makes no sense.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> plans = memplan.sweep(model, 3, (torch.randn(8, 64),), loss=lambda out: out.sum(), machine="h100-80gb")
        >>> [plan.peak <= plan.budget for plan in plans]
        [True, True, True]
    """
    arena, strategy = options.pop("arena", False), options.pop("strategy", None)
    check_strategy(options.get("solver"), strategy)
    session = Session(model, args, kwargs, **{**options, "allow": levers_of(options.get("allow"), strategy)})
    if isinstance(points, int):
        session.begin(arena)
        top = session.planner.unplanned.peak
        bottom = (session.static_floor if arena else session.planner.floor).peak
        budgets: list[int | str] = [top - (top - bottom) * index // max(points - 1, 1) for index in range(points)]
    else:
        budgets = list(points)
    plans = []
    for budget in budgets:
        try:
            plans.append(session.plan(budget, arena, strategy))
        except BudgetError as error:
            if error.minimum is None:
                raise
    return plans


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
        if dynamic is not None:
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
        machine, traced = self.machine, self.captured.traced
        program = apply_costs(self.captured.program, machine, self.table)
        routes = routes_of(machine) if self.offload and not traced.adds else []
        self.planner = Planner(
            program, machine, "recompute" in self.allowed, "reorder" in self.allowed, self.offload, seed=self.seed,
            progress=self.progress, solver=self.solver,
            homes=Homes(machine.tiers[routes[0].tier].capacity, traced.shared)(program) if routes else (),
        )  # fmt: skip
        self.solve_began = time.monotonic() - began

    @property
    def program(self) -> Program:
        """What was captured, with its costs."""
        return self.planner.program

    def ways(self) -> "SizedPlans":
        """Schedules for every size, where it was captured with sizes that vary."""
        from .sizes import SizedPlans

        return SizedPlans(self)

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
        known = self.known(arena)
        if known is not None and known.peak <= side.peak:
            return known.peak
        self.smallest[arena] = side
        keep_floor(side, self.planner.program, self.machine, self.allowed, self.kind_of(arena))
        return side.peak

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

    def solve_calls(self, budget: int, calls: int) -> Answer[Side, float]:
        """The fastest step that fits a budget beside what others like it hold between their passes.

        Raises:
            BudgetError: none was found.
        """
        planner, target = self.planner, budget
        if calls == 1:
            return planner.solve(budget)
        for _ in range(PLACINGS):
            try:
                side = planner.solve(target).found
            except BudgetError:
                break
            short = side.peak + (calls - 1) * held_bytes(planner.program, side.schedule) - budget
            if short <= 0:
                return answer_of(side, planner.bound(budget))
            target = min(target, side.peak) - max(short // calls, budget // 200)
        floor = planner.floor
        need = floor.peak + (calls - 1) * held_bytes(planner.program, floor.schedule)
        if need <= budget:
            return answer_of(floor, planner.bound(budget))
        raise BudgetError(f"no schedule of {planner.program.name} fits {planner.asked}{show_bytes(budget)} ({budget} bytes) "
                          f"with {calls} calls before one backward pass: together they need {show_bytes(need)} ({need} bytes)",
                          need)  # fmt: skip

    def plan(
        self, budget: int | str | None, arena: bool = False, strategy: str | None = None, *, calls: int = 1, reserved: int = 0
    ) -> Plan:
        """The plan for one budget; with `arena`, with addresses; by a strategy other than the best; beside other calls."""
        check_asked(budget, None, arena, self.lend_gradients, strategy)
        planner, self.began = self.begin(arena), None
        began = time.monotonic()
        unplanned = planner.unplanned
        capacity = self.machine.tiers[0].capacity
        asked = None if budget is None else parse_bytes(budget, of=unplanned.peak)
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
                answer = self.solve_calls(limit, calls)
                minimum = self.note(min(planner.quick_floor, answer.found, key=lambda each: each.peak), arena)
        except BudgetError as error:
            if strategy is None:
                self.note(self.static_floor if arena else planner.floor, arena)
            raise with_levers(error, limit, self.levers(arena, strategy)) from None
        body = PlanBody(
            program=answer.found.program,
            machine=self.machine,
            recipe=msgspec.structs.replace(self.recipe, calls=calls, reserved=reserved),
            budget=asked,
            planned=answer.found.schedule,
            unplanned=unplanned.schedule,
            bound=answer.bound,
            minimum=minimum,
            capture_seconds=self.capture_seconds,
            solve_seconds=time.monotonic() - began + self.solve_began,
            compile_seconds=self.compile_seconds,
            coverage=self.covered(answer.found),
            eager_peak=self.eager_peak,
        )
        return assemble(body, answer.found, unplanned, self.captured)


def check_asked(
    budget: int | str | None, host_budget: int | str | None, arena: bool, lend_gradients: bool, strategy: str | None
) -> None:
    """Refuse, before anything is traced, budgets that cannot be read and arguments that contradict each other.

    Raises:
        BudgetError: a budget is no size.
        MemplanError: which arguments.
    """
    if budget is not None:
        parse_bytes(budget, of=SOME)
    if host_budget is not None:
        host_bytes(host_budget, SOME)
    if strategy not in (None, "memo"):
        raise MemplanError(f"strategy={strategy!r}: it is 'memo' or None")
    if strategy and arena:
        raise MemplanError("strategy='memo' has no addresses: plan without arena")
    if lend_gradients and not arena:
        raise MemplanError("lend_gradients=True lends gradients that lie in an arena: plan with arena=True")


def check_calls(calls: Any, accumulate: bool, train: bool, arena: bool, strategy: str | None, in_backward: bool) -> None:
    """Refuse what does not go with several calls, or with gradients that are there.

    Raises:
        MemplanError: which.
    """
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise MemplanError(f"calls={shorten(calls)}: give how many calls come before one backward pass, 1 or more")
    if not accumulate and calls == 1:
        return
    asked = f"calls={calls}" if calls > 1 else "accumulate=True"
    if not train:
        raise MemplanError(f"{asked} is of training: an inference makes no gradients")
    for name, given in (("arena=True", arena), ("strategy='memo'", strategy), ("optimizer_in_backward=True", in_backward)):
        if given:
            raise MemplanError(f"{asked} does not go with {name}: plan without it")


def check_dynamic(levers: Iterable[str], lend_gradients: bool, optimizer_in_backward: bool) -> None:
    """Refuse, where sizes vary, what holds for one shape alone.

    Raises:
        MemplanError: which argument.
    """
    given = {"allow='offload'": "offload" in levers, "lend_gradients": lend_gradients,
             "optimizer_in_backward": optimizer_in_backward}  # fmt: skip
    for name, asked in given.items():
        if asked:
            raise MemplanError(f"{name} holds for one shape alone, and dynamic= is for many: leave one of them out")


def check_numbers(time_limit: Any, seed: Any) -> None:
    """Refuse a time limit or a seed that is none.

    Raises:
        MemplanError: which, and what it is to be.
    """
    if not isinstance(time_limit, Real) or isinstance(time_limit, bool) or not float(time_limit) >= 0:
        raise MemplanError(f"time_limit={time_limit!r}: give seconds, 0 or more")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < SEEDS:
        raise MemplanError(f"seed={shorten(seed)}: give a whole number from 0 to 2^31 - 1")


def check_model(model: Any, kwargs: Any) -> None:
    """Refuse what is no model, or cannot be its keyword arguments.

    Raises:
        CaptureError: what it is instead.
        MemplanError: likewise.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise CaptureError(f"plan needs an nn.Module, not a {type(model).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise MemplanError(f"kwargs={shorten(kwargs)}: give a dict of the model's keyword arguments")


def host_bytes(budget: int | str, capacity: int) -> int:
    """Bytes that may be used in a tier behind the device."""
    return parse_bytes(budget, of=capacity, what="host budget", whole="tier")


def limit_tiers(machine: Machine, budget: int | str | None) -> Machine:
    """The machine with no more than a number of bytes in each tier behind the first."""
    if budget is None:
        return machine
    rest = [msgspec.structs.replace(tier, capacity=min(tier.capacity, host_bytes(budget, tier.capacity)))
            for tier in machine.tiers[1:]]  # fmt: skip
    return msgspec.structs.replace(machine, tiers=(machine.tiers[0], *rest))


def traced_device(machine: Machine | None) -> str | None:
    """The device type to trace for: the machine's, where this process has one; None for where the model is.

    Without a CUDA device torch cannot choose CUDA's attention kernels; cpu's stand in for them, whose saved tensors have
    the same shapes.
    """
    if machine is None or machine.device != "cuda":
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

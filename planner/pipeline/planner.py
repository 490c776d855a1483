"""Program -> schedule: the stages in order, each answer replayed by the referee before it leaves.

    flatten -> segments -> linear bounds -> integer program over the timeline -> annealing -> liveness -> referee

One `Planner` serves many budgets of one program: everything that does not depend on the budget is made once.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...passes.eager import Eager
from ...passes.liveness import Liveness
from ...passes.problem import Flat, flatten
from ...passes.transfers import Transfers, routes_of
from ...solvers.face.answer import Answer, Status
from ...solvers.programs.names import HIGHS
from ...solvers.remat.bound import CutModel, find_cuts, least_seconds
from ...solvers.remat.exact import SMALL, Master, find_slots
from ...solvers.remat.memo_rule import memo
from ...solvers.remat.problem import events_of, score
from ...solvers.remat.search import EXACT, NOTHING, MultiStart
from ...solvers.remat.segments import find_segments
from ..ir.errors import BudgetError, InvalidSchedule, MemplanError
from ..ir.machine import Machine
from ..ir.plan import Side, as_eager, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import Start
from ..ir.units import show_bytes
from .peak import at_peak
from .ways import orders_of, others_of

Progress = Callable[[str, float], None]
LEAST_EXACT = 0.1  # seconds for a round of the integer program, where time is short
WORTH = 0.005  # of the time of a step: what moving has to save, for the price of a copy is known less well than that of an op


@dataclass
class Planner:
    """Plans one program on one machine for any budget.

    Attributes:
        program: with its costs filled in.
        machine: what it runs on.
        recompute: whether ops may run again.
        reorder: whether the backward pass may run in another order.
        offload: whether values may lie in other tiers of the machine, if it has any with links there and back.
        homes: resident buffers that may lie in the first such tier before the step and after it; see `passes/homes.py`.
        seed: of the search; the same seed, program and budget give the same schedule.
        effort: simulations per start of the search; by default as many as a few seconds allow.
        order: the base order, as op indices; by default the best of those that the levers allow, and then others are tried too.
        known: a schedule of the program that was found before.
        asked: the budget in the user's words, for an error.
        solver: of the integer programs; default: HiGHS.
        hurried: a budget is given up when the time is up; else it is searched for until every start has been tried.
    """

    program: Program
    machine: Machine
    recompute: bool = True
    reorder: bool = True
    offload: bool = False
    homes: tuple[int, ...] = ()
    seed: int = 0
    effort: int | None = None
    progress: Progress | None = None
    deadline: float = field(default=float("inf"))
    order: tuple[int, ...] | None = None
    known: Side | None = None
    asked: str = ""
    solver: str | None = None
    hurried: bool = False

    def __post_init__(self) -> None:
        self.homes = self.homes if self.moves else ()
        self._lowest: tuple[np.ndarray, Side] | None = None  # a solution and its schedule

    @cached_property
    def unplanned(self) -> Side:
        """The step as eager PyTorch runs it: base order, nothing in place, on a machine that holds it all."""
        eager = as_eager(self.program)
        schedule = Eager()(eager)
        return Side(eager, schedule, referee(eager, unlimited(self.machine), schedule))

    @cached_property
    def orders(self) -> list[list[int]]:
        """The base orders that may be taken, the best first."""
        return orders_of(self.program, self.reorder) if self.order is None else [list(self.order)]

    @cached_property
    def flat(self) -> Flat:
        """The arrays that the solvers work on, ops in base order."""
        machine = self.machine if self.offload else None
        return self.restricted(flatten(self.program, self.orders[0], machine, dict.fromkeys(self.homes, 1)))

    def restricted(self, flat: Flat) -> Flat:
        """The same, with no op that may be repeated if recomputation is not allowed."""
        if self.recompute:
            return flat
        once = dataclasses.replace(flat.problem, repeatable=np.zeros_like(flat.problem.repeatable))
        return dataclasses.replace(flat, problem=once)

    @property
    def moves(self) -> bool:
        """Whether there is a tier to move values to."""
        return self.offload and bool(routes_of(self.machine))

    @cached_property
    def base_seconds(self) -> float:
        """Time of a step in which nothing is repeated."""
        return float(self.flat.problem.seconds.sum())

    @cached_property
    def segments(self):
        """The forward pass cut into pieces, equal ones recognised."""
        return find_segments(self.flat.problem)

    @cached_property
    def master(self) -> Master:
        """The keep-or-recompute program."""
        slots = find_slots(self.flat.problem, len(self.program.ops) <= SMALL)
        return Master(self.flat.problem, self.segments, slots, self.solver or HIGHS)

    @cached_property
    def search(self) -> MultiStart:
        """What looks for solutions."""
        known = [] if self.memo_solution is None else [self.memo_solution]
        left = min(max((self.deadline - time.monotonic()) / 4, LEAST_EXACT), EXACT) if self.hurried else EXACT
        return MultiStart(
            self.master,
            self.recompute,
            known,
            self.effort,
            self.seed,
            lambda: time.monotonic() > self.deadline,
            self.tell,
            left,
        )

    @cached_property
    def cuts(self) -> list[CutModel]:
        """Linear programs at the moments that press most."""
        return find_cuts(self.flat.problem, self.segments)

    def bound(self, budget: int) -> float:
        """A lower bound on the time of any schedule within the budget that keeps the base order; infinite if none is."""
        if not self.recompute and not self.moves:
            return self.base_seconds
        return least_seconds(self.flat.problem, self.cuts, budget)

    def tell(self, stage: str, fraction: float) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(stage, fraction)

    def finish(self, solution: np.ndarray, budget: int | None) -> Side:
        """A solution as a schedule that the referee has accepted."""
        found = events_of(self.flat.problem, solution)
        runs, ops, buffers = found.order >= 0, self.flat.ops, self.flat.buffers
        machine = self.machine if budget is not None else unlimited(self.machine)
        if runs.all():
            schedule = Liveness()(self.program, ops[found.order].tolist())
            return Side(self.program, schedule, referee(self.program, machine, schedule, budget))
        events = np.where(runs, ops[np.maximum(found.order, 0)], -1 - buffers[np.maximum(-1 - found.order, 0)])
        tier = dict(zip(buffers.tolist(), found.tier.tolist(), strict=True))
        limit = budget if budget is not None else score(self.flat.problem, solution, 0).peak
        return self.moved(machine, events.tolist(), tier, limit)

    def moved(self, machine: Machine, events: list[int], tier: dict[int, int], budget: int) -> Side:
        """The schedule of events with copies.

        What was to be fetched before it had left stays; if that is all that becomes of a copy out, it is left out, where the
        schedule is no worse without it.
        """
        best: Side | None = None
        away = [buffer for buffer in self.homes if tier[buffer]]
        while True:
            schedule = Transfers(budget)(self.program, self.machine, events, tier, away)
            try:
                side = Side(self.program, schedule, referee(self.program, machine, schedule, budget))
            except InvalidSchedule:
                if best is None:
                    raise
                return best
            if best is not None and side.time > best.time:
                return best
            best = side
            left = Counter(step.buffer for step in schedule.instructions if isinstance(step, Start))
            idle = {buffer for buffer, count in left.items() if count == 1 and buffer not in away}
            if not idle:
                return best
            events = [event for event in events if event >= 0 or -1 - event not in idle]

    @cached_property
    def kept(self) -> Side:
        """Nothing repeated, everything freed as soon as it can be."""
        return self.finish(self.flat.problem.keep_all(), None)

    @property
    def floor(self) -> Side:
        """The smallest schedule known: looked for until the time is up, then in other orders and with fewer levers."""
        return self.least([self, *self.others])

    @property
    def quick_floor(self) -> Side:
        """The smallest schedule known, for which no other orders are searched: a plan is there, and does not wait for them."""
        return self.least([self])

    def least(self, ways: "list[Planner]") -> Side:
        """The smallest schedule that planners know, or that was known before; they look for it until the time is up."""
        sides = [] if self.known is None else [self.known]
        for way in [way for each in ways for way in (each, each.still) if way is not None]:
            if way is self or way.begun or time.monotonic() <= self.deadline:
                way.deadline = self.deadline
                sides.append(way.lowest())
        return min(sides, key=lambda side: side.peak)

    def lowest(self) -> Side:
        """The smallest schedule known in this base order, with these levers."""
        if not (self.recompute or self.moves) or self.search.space.uses == 0:
            return self.kept
        solution = self.search.smallest
        if self._lowest is None or self._lowest[0] is not solution:
            self._lowest = solution, self.finish(solution, None)
        return self._lowest[1]

    @property
    def begun(self) -> bool:
        """Whether the smallest schedule has been looked for."""
        return "search" in self.__dict__ and "descent" in self.search.__dict__

    @cached_property
    def others(self) -> "list[Planner]":
        """Planners of other base orders, and with fewer levers, whose schedules may be taken."""
        return others_of(self)

    @cached_property
    def memo_solution(self) -> np.ndarray | None:
        """MEMO's rule, where it applies."""
        attention = np.array(["scaled_dot_product" in self.program.ops[index].target for index in self.flat.ops])
        return memo(self.flat.problem, self.segments, self.master.slots, attention) if self.moves else None

    def solve_memo(self, budget: int) -> Answer[Side, float]:
        """What MEMO's own rule gives: the budget decides only how long the step waits for copies out (`remat/memo_rule.py`).

        Raises:
            BudgetError: it takes more than the budget.
            MemplanError: it does not apply.
        """
        solution = self.memo_solution
        if solution is None:
            raise MemplanError(
                f"strategy='memo' wants three equal layers or more and a tier behind the device: {self.program.name} on "
                f"{self.machine.name} lacks one of them; plan without strategy"
            )
        if self.search.rated(solution, budget) is NOTHING:
            raise self.refuse(budget, self.finish(solution, None))
        side = self.finish(solution, budget)
        return answer_of(side, self.bound(budget))

    def solve(self, budget: int) -> Answer[Side, float]:
        """The fastest schedule found within a budget.

        Raises:
            BudgetError: none was found; the message has the smallest budget known to work and what sets it.
        """
        found = self.within(budget)
        if found is None:
            raise self.refuse(budget, self.floor if self.recompute or self.moves else self.kept)
        return found

    def within(self, budget: int) -> Answer[Side, float] | None:
        """The same; None where none was found."""
        if self.kept.peak <= budget:
            return answer_of(self.kept, self.base_seconds)
        if not self.recompute and not self.moves:
            return None
        self.tell("bounding", 0.0)
        bound = self.bound(budget)
        side = self.fastest(budget, bound, self.is_met(budget))
        for way in self.others:
            side, bound = self.faster(way, budget, side, bound)
        if side is None and self.known is not None and self.known.peak <= budget:
            side, bound = self.known, min(bound, self.known.time)
        return None if side is None else answer_of(side, bound)

    def is_met(self, budget: int) -> bool:
        """Whether nothing need be found once the time is up."""
        return self.hurried or (self.known is not None and self.known.peak <= budget)

    def faster(self, way: "Planner", budget: int, side: Side | None, bound: float) -> tuple[Side | None, float]:
        """The better of what is known and what another planner finds, with its bound: asked where it can be better."""
        if side is not None and time.monotonic() > self.deadline:
            return side, bound
        way.deadline = self.deadline
        least = way.bound(budget)
        margin = WORTH if len(self.program.ops) > SMALL else 0.0
        if side is not None and least >= side.time * (1 - margin):
            return side, bound
        found = way.fastest(budget, least, side is not None or self.is_met(budget))
        if found is None or (side is not None and found.time >= side.time):
            return side, bound
        return found, least

    def fastest(self, budget: int, bound: float, met: bool) -> Side | None:
        """The fastest schedule found, if one is; it moves nothing where moving saves less than it is worth.

        Args:
            budget: bytes.
            bound: seconds that no schedule is faster than.
            met: a schedule that meets the budget is known.
        """
        still = None
        if self.still is not None:
            now = time.monotonic()
            self.still.deadline = now + max(self.deadline - now, 0.0) / 2
            still = self.still.fastest(budget, self.still.bound(budget), met)
        if not np.isfinite(bound) or (still is not None and still.time <= bound / (1 - WORTH)):
            return still
        solution = self.search.fastest(budget, bound, met or still is not None)
        side = None if solution is None else self.finish(solution, budget)
        if still is not None and (side is None or side.time > still.time * (1 - WORTH)):
            return still
        return side

    @cached_property
    def still(self) -> "Planner | None":
        """The planner of steps that move nothing, in whose smaller space a search finds more; None where this is one."""
        if not (self.moves and self.recompute):
            return None
        return dataclasses.replace(self, offload=False, homes=(), order=tuple(self.orders[0]))

    def refuse(self, budget: int, smallest: Side) -> BudgetError:
        """The error for a budget below the floor."""
        heavy = ", ".join(f"{name} {show_bytes(size)}" for name, size in at_peak(self.program, smallest)[:4])
        return BudgetError(
            f"no schedule of {self.program.name} fits {self.asked}{show_bytes(budget)} ({budget} bytes): the smallest budget "
            f"known to work is {show_bytes(smallest.peak)} ({smallest.peak} bytes), of which "
            f"{show_bytes(self.program.resident_bytes)} are parameters, inputs and optimizer state; "
            f"at its peak the largest are {heavy}",
            smallest.peak,
        )


def answer_of(side: Side, bound: float) -> Answer[Side, float]:
    """A schedule within a budget, and seconds that none is faster than."""
    return Answer(Status.OPTIMAL if side.time <= bound else Status.FEASIBLE, min(bound, side.time), side)

"""Schedules of one piece that leave much to the others."""

from ...passes.liveness import Liveness, held_bytes
from ...planner.ir.plan import Side, unlimited
from ...planner.ir.program import Program
from ...planner.ir.referee import referee
from ...planner.pipeline.planner import Planner


def small_schedules(planner: Planner) -> list[Side]:
    """Schedules that take little in one way or another.

    A small peak is not all: what a piece holds counts while every other piece runs. So besides the smallest peak known,
    there is the schedule that saves only what it must and computes the rest a second time.
    """
    if planner.program.boundary == len(planner.program.ops):
        return [planner.kept, planner.floor]
    if not planner.recompute:
        return [planner.kept, planner.floor]
    schedule = Liveness()(planner.program, replayed(planner.program))
    again = Side(planner.program, schedule, referee(planner.program, unlimited(planner.machine), schedule))
    return [planner.kept, planner.floor, again]


def replayed(program: Program) -> list[int]:
    """The order in which the forward pass runs again, op by op, when the backward pass first needs its results."""
    outputs = set(program.outputs)
    again = [op.repeatable and not outputs & set(op.writes) for op in program.ops[: program.boundary]]
    order = list(range(program.boundary + 1))
    done: set[int] = set()
    for late in range(program.boundary + 1, len(program.ops)):
        needed: set[int] = set()
        stack = [late]
        while stack:
            for buffer in program.ops[stack.pop()].reads:
                maker = program.producer[buffer]
                if 0 <= maker < program.boundary and again[maker] and maker not in done and maker not in needed:
                    needed.add(maker)
                    stack.append(maker)
        order += [*sorted(needed), late]
        done |= needed
    return order


def burden(program: Program, side: Side) -> int:
    """How much a piece weighs on the others: what it holds, and less so its peak, which passes."""
    return 2 * held_bytes(program, side.schedule) + side.peak


def smallest(planner: Planner) -> Side:
    """The one that weighs least."""
    return min(small_schedules(planner), key=lambda side: burden(planner.program, side))

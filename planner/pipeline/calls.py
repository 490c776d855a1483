"""The fastest step within a budget beside what others like it hold between their passes."""

from ...passes.liveness import held_bytes
from ...solvers.face.answer import Answer
from ..ir.errors import BudgetError
from ..ir.plan import Side
from ..ir.units import show_bytes
from .planner import Planner, answer_of

TRIES = 8  # targets for the peak of one step, each lower than the last


def solve_calls(planner: Planner, budget: int, calls: int) -> Answer[Side, float]:
    """The fastest step that fits a budget beside what others like it hold between their passes.

    Args:
        planner: of one step.
        budget: bytes for all of them.
        calls: how many there are, this one among them.

    Raises:
        BudgetError: none was found.
    """
    if calls == 1:
        return planner.solve(budget)
    target = budget
    for _ in range(TRIES):
        try:
            side = planner.solve(target).found
        except BudgetError:
            break
        short = together(side, calls) - budget
        if short <= 0:
            return answer_of(side, planner.bound(budget))
        target = min(target, side.peak) - max(short // calls, budget // 200)
    floor = planner.floor
    need = together(floor, calls)
    if need <= budget:
        return answer_of(floor, planner.bound(budget))
    raise BudgetError(f"no schedule of {planner.program.name} fits {planner.asked}{show_bytes(budget)} ({budget} bytes) "
                      f"with {calls} calls before one backward pass: together they need {show_bytes(need)} ({need} bytes)",
                      need)  # fmt: skip


def together(side: Side, calls: int) -> int:
    """The peak of a step, in bytes, beside what so many, itself among them, hold between their passes."""
    return side.peak + (calls - 1) * held_bytes(side.program, side.schedule)

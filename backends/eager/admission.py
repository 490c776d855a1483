"""Which sizes a plan's one schedule is run with: those within its bounds at which the referee accepts it."""

from typing import TYPE_CHECKING

from ...planner.capture.sized import Sized
from ...planner.cost.resized import Resized
from ...planner.ir.errors import InvalidSchedule
from ...planner.ir.family import rebound
from ...planner.ir.referee import referee

if TYPE_CHECKING:
    from ...planner.ir.plan import Plan


class Admission:
    """Judges a plan's schedule at other sizes.

    Attributes:
        bounds: for each size the least and the most that it may be; None for no bound.
    """

    def __init__(self, plan: "Plan", sized: Sized):
        self.plan, self.sized = plan, sized
        known = {size.name: (size.least, size.most) for size in plan.recipe.sizes}
        self.bounds = [known[name] for name in sized.names]
        self.costs = Resized(plan.program, plan.machine, None)

    def __call__(self, sizes: tuple[int, ...]) -> bool:
        """Whether the step may run with these sizes: within the bounds, and within the budget."""
        pairs = zip(sizes, self.bounds, strict=True)
        if any(size < least or (most is not None and size > most) for size, (least, most) in pairs):
            return False
        plan = self.plan
        program = self.costs.apply(self.sized.family.at(sizes))
        try:
            referee(program, plan.machine, rebound(plan.schedule, plan.program, program), plan.budget)
        except InvalidSchedule:
            return False
        return True

"""A planner at one size of a family, which takes the schedules that the family has before it looks for another."""

from functools import cached_property

from ...solvers.face.answer import Answer
from ..ir.family import Sizes
from ..ir.plan import Side
from .planner import Planner, answer_of
from .sized import Ways


class Member(Planner):
    """Plans one size of a family for any budget.

    Attributes:
        ways: the family's schedules.
        sizes: of the inputs.
    """

    def __init__(self, ways: Ways, sizes: Sizes):
        base = ways.planner
        super().__init__(ways.at(sizes), ways.machine, base.recompute, base.reorder, seed=base.seed, solver=base.solver)
        self.ways, self.sizes = ways, sizes

    @cached_property
    def kept(self) -> Side:
        known = self.ways.accepted(self.ways.ways[0], self.sizes)
        return Planner.kept.func(self) if known is None else known  # where an op may not write in place at these sizes

    @property
    def floor(self) -> Side:
        known = [side for side in (self.ways.accepted(way, self.sizes) for way in self.ways.ways) if side is not None]
        return min(known, key=lambda side: side.peak) if known else super().floor

    @property
    def quick_floor(self) -> Side:
        return self.floor

    def solve(self, budget: int) -> Answer[Side, float]:
        """The fastest of the family's schedules that fits; one more is looked for where that may be worth it.

        Raises:
            BudgetError: none was found.
        """
        found = self.ways.fastest(self.sizes, budget)
        side = self.ways.solve(self.sizes, budget).side if found is None else found.side
        return answer_of(side, self.base_seconds)


__all__ = ["Member"]

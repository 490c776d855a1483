"""The outer choice of an offload plan: which parameters and optimizer state have their home in another tier.

Each rung has more of them there than the one before (see `passes/homes.py`) and is planned for itself; the fastest is taken. A
rung whose lower bound shows that it cannot be faster than what has been found is left out.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..passes.homes import Homes
from ..passes.transfers import routes_of
from .errors import BudgetError
from .pipeline import Answer, Planner

NEAR = 0.005  # a gap at which no further rung is tried


@dataclass
class Ladder:
    """Plans one program with ever more of its resident buffers at home elsewhere.

    Attributes:
        planner: with everything on the device: the first rung.
    """

    planner: Planner

    @cached_property
    def rungs(self) -> list[Planner]:
        """The planners, the one with the least on the device last."""
        if not self.planner.moves:
            return [self.planner]
        room = self.planner.machine.tiers[routes_of(self.planner.machine)[0].tier].capacity
        sets = Homes(room=room)(self.planner.program)[1:]
        return [self.planner, *(dataclasses.replace(self.planner, homes=homes) for homes in sets)]

    def bound(self, budget: int) -> float:
        """A lower bound on the time of any schedule within the budget, wherever its resident buffers are at home."""
        last = self.rungs[-1]
        return last.base_seconds if last.kept.peak <= budget else last.bound(budget, links=False)

    @property
    def floor(self) -> int:
        """The smallest peak known; the last rung's, but for chance."""
        known = [planner.floor.peak for planner in self.rungs[:-1] if "floor" in planner.__dict__]
        return min([self.rungs[-1].floor.peak, *known])

    def solve(self, budget: int, deadline: float) -> Answer:
        """The fastest schedule found.

        Args:
            budget: bytes of the device.
            deadline: as `time.monotonic` has it; each rung has an equal part of what the ones before it leave.

        Raises:
            BudgetError: none was found.
        """
        bound, best, refused = self.bound(budget), None, None
        for planner in self.rungs:
            planner.deadline = deadline
        for number, planner in enumerate(self.rungs):
            left = deadline - time.monotonic()
            planner.deadline = time.monotonic() + max(left, 0.0) / (len(self.rungs) - number)
            least = planner.bound(budget)
            if not np.isfinite(least) or (best is not None and least >= best.side.time):
                continue
            try:
                answer = planner.solve(budget)
            except BudgetError as error:
                refused = error
                continue
            if best is None or answer.side.time < best.side.time:
                best = answer
            if best.side.time <= bound * (1 + NEAR):
                break
        if best is not None:
            return Answer(best.side, min(bound, best.side.time) if len(self.rungs) > 1 else best.bound)
        raise refused or self.rungs[-1].refuse(budget, self.rungs[-1].floor)

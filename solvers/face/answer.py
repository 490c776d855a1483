"""What a way is asked and what it answers: `solve(problem, limit) -> Answer`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Best = TypeVar("Best")
Score = TypeVar("Score", int, float)


class Status(StrEnum):
    """What is known about an answer."""

    OPTIMAL = "optimal"  # none scores less; or, asked to fit so many bytes, it fits
    FEASIBLE = "feasible"  # it fits, and the bound is smaller
    INFEASIBLE = "infeasible"  # proven: nothing fits
    UNKNOWN = "unknown"  # nothing found in time


@dataclass(frozen=True)
class Limit:
    """What a solver has to stay within.

    Attributes:
        bytes: to fit into; None for as few as can be. A room whose problem has a capacity of its own does not look at it.
        seconds: to search for, at most; what is found without a search is found whatever they are.
        seed: of the search.
        solver: of integer programs, by name (`programs/names.py`); None for the one that suits the room. Ways without such
            a program do not look at it.
    """

    bytes: int | None = None
    seconds: float = 10.0
    seed: int = 0
    solver: str | None = None


@dataclass(frozen=True)
class Answer(Generic[Best, Score]):
    """What a solver found, and what it knows of all that it has not found.

    Attributes:
        status: which of the four.
        bound: no answer to the problem scores less, in the units of the room's score.
        best: the best found, or None. Where the status is UNKNOWN it may be one that takes more bytes than it may.
        method: what found it, in words.
    """

    status: Status
    bound: Score
    best: Best | None = None
    method: str = ""

    @property
    def found(self) -> Best:
        """The best, for who knows that there is one.

        Raises:
            ValueError: there is none.
        """
        if self.best is None:
            raise ValueError(f"there is no answer: {self.status}")
        return self.best

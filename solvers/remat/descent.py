"""The search for the solution of smallest peak: ever smaller budgets, counted in rounds and not in seconds.

What a round finds depends on the rounds before it and on nothing else. So whoever stops early, because the time is up, can go
on later, and another process that makes as many rounds finds the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .problem import Problem, score

if TYPE_CHECKING:
    from .search import Found

STRAIGHT = 3  # rounds that may fail before the next is asked for less


@dataclass
class Descent:
    """Where the search stands.

    Attributes:
        problem: what is searched.
        improve: annealing from several (solution, steps, heat) within a budget, with a seed and with care for the time.
        steps: simulations of each.
        rounds: how many to make.
        best: the solution of smallest peak so far.
        peak: its bytes.
        least: bytes that no solution goes below.
        number: rounds made.
    """

    problem: Problem
    improve: "Callable[[Sequence[tuple[np.ndarray, int, float]], int, int, float], list[Found]]"
    steps: int
    rounds: int
    best: np.ndarray
    peak: int
    least: int
    number: int = 0

    def __post_init__(self) -> None:
        self.current, self.tries, self.shrink = self.best, 0, 0.9

    @property
    def done(self) -> bool:
        """Whether all rounds are made, or steps have become too small to matter, or nothing is left to gain."""
        return self.number >= self.rounds or self.shrink > 0.995 or self.peak <= self.least

    def step(self) -> None:
        """One round."""
        target = int(self.problem.resident + (self.peak - self.problem.resident) * self.shrink)
        answers = self.improve([(self.current, self.steps, heat) for heat in (0.01, 0.03)], target, 2 * self.number, 0.05)
        found = min(answers, key=lambda each: (each.seconds, score(self.problem, each.solution, target).excess))
        self.number += 1
        self.current = found.solution  # what comes closest, if nothing fits: the next round goes on from it
        if np.isfinite(found.seconds):
            self.best, self.peak, self.tries = self.current, score(self.problem, self.current, target).peak, 0
            return
        self.tries += 1
        if self.tries == STRAIGHT:
            self.current, self.tries, self.shrink = self.best, 0, 1 - (1 - self.shrink) / 2.5


def least_of(problem: Problem) -> int:
    """Bytes that no solution goes below: what some op takes with all that it reads and writes, the resident ones included."""
    most = 0
    for op in range(len(problem.seconds)):
        read = problem.read[problem.read_start[op] : problem.read_start[op + 1]]
        made = problem.write[problem.write_start[op] : problem.write_start[op + 1]]
        over = problem.reuse_new[problem.reuse_start[op] : problem.reuse_start[op + 1]]  # may lie where an operand did
        fresh = problem.size[np.setdiff1d(made, over)].sum()
        most = max(most, int(problem.size[np.unique(read)].sum() + fresh + problem.workspace[op]))
    return int(problem.resident) + most

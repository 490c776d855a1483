"""The search for the fastest solution within a budget, and for the smallest: where it begins, and annealing from there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .anneal import anneal, make_space
from .bound import find_cuts, least_seconds
from .descent import Descent, least_of
from .exact import Master, make_master
from .problem import KEEP, SINCE, Answer, Limit, Problem, Status, budget_of, score, verdict

GOOD = 0.002  # a gap at which the search stops
FLOOR_ROUNDS = 16  # searches for a smaller peak; half as many for programs of more than LARGE ops
LARGE = 2000  # ops: programs beyond this size are spared what takes longest
TINY = 64  # ops: programs up to this size are searched from more starts
HEATS = (0.02, 0.06, 0.2)
EXACT = 4.0  # seconds, at most, for a round of the integer program
RELAXED = 20.0  # seconds, at most, for rounds of the linear relaxation; those of most programs take milliseconds
SHARES = 9  # of what may be at home elsewhere, from none to all, from which a search may start
STARTS = 8  # of a search, the best among them
TOGETHER = 2  # searches at once; fixed, so that answers do not depend on the number of cores


@dataclass(frozen=True)
class Found:
    """What one search found: a solution and its time, infinite where it does not fit."""

    solution: Any
    seconds: float


NOTHING = Found(None, float("inf"))


def solve(problem: Problem, limit: Limit) -> Answer[np.ndarray, float]:
    """The fastest solution found, with the bound of linear programs; whether a budget is met does not depend on the seconds."""
    until, budget = time.monotonic() + limit.seconds, budget_of(limit)
    kept = verdict(problem, [problem.keep_all()], limit, float(problem.seconds.sum()), "nothing repeated")
    if kept.status is Status.OPTIMAL:
        return kept
    master = make_master(problem, limit.solver)
    bound = least_seconds(problem, find_cuts(problem, master.segments), budget)
    if not np.isfinite(bound):
        return verdict(problem, [], limit, bound, "bound")
    again = bool(problem.repeatable.any())
    search = MultiStart(master, again, (), None, limit.seed, lambda: time.monotonic() > until, lambda stage, share: None)
    found = search.fastest(budget, bound)
    return verdict(problem, [] if found is None else [found], limit, bound, "search")


@dataclass
class MultiStart:
    """Annealing from many starts: the searches of one problem, which remember what they have found.

    Attributes:
        master: the problem's integer program, with its segments and choices.
        recompute: whether ops may run again.
        known: solutions to start from as well.
        effort: simulations per start; None for as many as a few seconds allow.
        seed: of the random moves; the same seed and budget give the same solution, if there is time.
        late: whether the time is up; nothing that has begun is stopped.
        tell: reports progress: a stage and how much of it is done.
        exact: seconds for the integer program in each round, of programs that are not large.
    """

    master: Master
    recompute: bool
    known: Sequence[np.ndarray]
    effort: int | None
    seed: int
    late: Callable[[], bool]
    tell: Callable[[str, float], None]
    exact: float = EXACT

    @property
    def problem(self) -> Problem:
        """What is searched."""
        return self.master.problem

    @property
    def ops(self) -> int:
        """How many ops the problem has."""
        return len(self.problem.seconds)

    @property
    def moves(self) -> bool:
        """Whether there is a tier to move values to."""
        return len(self.problem.tiers) > 0

    @cached_property
    def space(self):
        """The moves of the search."""
        return make_space(self.problem, self.master.segments, self.master.slots)

    @cached_property
    def steps(self) -> int:
        """Simulations per start: more for larger programs, as long as one start takes no more than a second or two."""
        ops = max(self.ops, 1)
        return self.effort or int(max(min(10_000 * ops, 2.4e7 / ops), 2000))

    def fastest(self, budget: int, bound: float, met: bool = False) -> np.ndarray | None:
        """The best solution found within the budget, or None.

        From every start; then, for programs so small that each op is a large step, several times more from nothing
        chosen and from the smallest solution, at different heats; then twice from the best, longer and cooler.

        Args:
            budget: bytes.
            bound: seconds that no solution is faster than.
            met: something is known that meets the budget, so that nothing need be found once the time is up.
        """
        hot = max(0.01, 0.5 / max(self.ops, 1))
        nothing = self.problem.keep_all()
        tries = [(start, self.steps // 2, hot) for start in self.starts(budget)]
        if self.ops <= TINY:
            tries += [(start, self.steps, heat) for start in (nothing, self.smallest, nothing) for heat in HEATS]
        best = min((self.rated(start, budget) for start, *_ in tries), key=lambda each: each.seconds, default=NOTHING)
        for number in range(0, len(tries) + TOGETHER, TOGETHER):
            if number and best.solution is not None and (best.seconds <= bound * (1 + GOOD) or self.late()):
                break
            if number and met and self.late():
                break
            self.tell("searching", number / (len(tries) + TOGETHER))
            batch = tries[number : number + TOGETHER]
            if not batch:
                if best.solution is None:
                    best = self.rated(self.descend(None if met else budget), budget)
                if best.solution is None:
                    break
                batch = [(best.solution, self.steps, hot / 3)] * TOGETHER
            found = [each for each in self.improve(batch, budget, number) if np.isfinite(each.seconds)]
            best = min([best, *found], key=lambda each: each.seconds)
        return best.solution

    @property
    def smallest(self) -> np.ndarray:
        """The solution of smallest peak known, looked for until the time is up."""
        return self.descend(None)

    def descend(self, budget: int | None) -> np.ndarray:
        """The solution of smallest peak known.

        Args:
            budget: bytes that are wanted: the search goes on until it finds them or has come to its end, whatever the time, so
                that whether a budget is met depends on nothing else.
        """
        descent = self.descent
        while not descent.done and (not descent.number or not self.late() or (budget is not None and descent.peak > budget)):
            self.tell("finding the smallest budget", descent.number / descent.rounds)
            descent.step()
        return descent.best

    @cached_property
    def descent(self) -> Descent:
        """The search for the smallest peak, at its beginning: the best of what needs no search."""
        problem = self.problem
        bases = [problem.keep_all(), *([problem.keep_all(away=1.0, ahead=0.0)] if problem.home.any() else [])]
        rules = [rule for base in bases for rule in (base, *self.rules(base))]
        choices = [choice for choice in rules if score(problem, choice, 2**62).excess <= 0]
        peaks = [score(problem, choice, 0).peak for choice in choices]
        steps = max(min(self.steps // 4, 40_000), 500)
        rounds = FLOOR_ROUNDS if self.ops <= LARGE else FLOOR_ROUNDS // 2
        return Descent(problem, self.improve, steps, rounds, choices[int(np.argmin(peaks))], min(peaks), least_of(problem))

    def improve(self, tries: Sequence[tuple[np.ndarray, int, float]], budget: int, seed: int, care: float = 1.0) -> list[Found]:
        """Annealing from several (solution, steps, heat) at once, in threads: what each found, in their order."""

        def one(number: int) -> Found:
            start, steps, hot = tries[number]
            return Found(*anneal(self.problem, self.space, start, budget, steps, hot, self.seed + seed + number, care))

        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(one, range(len(tries))))

    def rated(self, solution: np.ndarray, budget: int) -> Found:
        """A solution as found without a search."""
        found = score(self.problem, solution, budget)
        return Found(solution, found.time) if found.excess <= 0 and np.isfinite(found.time) else NOTHING

    def starts(self, budget: int) -> list[np.ndarray]:
        """Where the search begins: answers of the integer program and of its relaxation, then simple rules."""
        if self.problem.home.any():
            return self.starts_away(budget)
        base = self.problem.keep_all()
        rounded = self.master.iterate(base, budget, rounds=4, seconds=RELAXED, integer=False)[1:]
        rules = [*(self.known if self.recompute else ()), *self.rules(base)[: 3 + self.moves]]
        if self.ops > LARGE:
            return [*rounded, *rules]
        return [*self.master.iterate(base, budget, rounds=4, seconds=self.exact)[1:], *rounded[1:], *rules]

    def starts_away(self, budget: int) -> list[np.ndarray]:
        """The same with more and more at home elsewhere: the relaxation's answers for each share, what fits best first."""
        found: dict[float, list[tuple[float, float, int, np.ndarray]]] = {}  # by share: excess, time, number, solution

        def look(share: float) -> None:
            base = self.problem.keep_all(away=share)
            rounded = self.master.iterate(base, budget, rounds=5, seconds=RELAXED, integer=False)
            solutions = [base, *rounded, *self.rules(base)[: 1 + self.moves]]
            scores = [score(self.problem, solution, budget) for solution in solutions]
            rows = [(each.excess, each.time, number) for number, each in enumerate(scores)]
            found[share] = sorted((*row, solution) for row, solution in zip(rows, solutions, strict=True))[:2]

        for share in np.linspace(0.0, 1.0, SHARES).tolist():
            look(share)
        for step in (0.5, 0.25):  # and around the best
            best = min(found, key=lambda share: found[share][0][:3])
            for share in (best - step / (SHARES - 1), best + step / (SHARES - 1)):
                if 0 <= share <= 1:
                    look(share)
        ranked = sorted((*row[:3], share, row[3]) for share, rows in found.items() for row in rows)
        return [row[-1] for row in ranked[:STARTS]]

    def rules(self, base: np.ndarray) -> list[np.ndarray]:
        """Solutions that follow one rule for all: moved; checkpoints of segments; nothing kept and rebuilt once, or each time.

        Args:
            base: the solution that keeps everything, and has at home elsewhere what shall be.
        """
        slots, segments, boundary = self.master.slots, self.master.segments, self.problem.boundary
        made = []
        if self.moves:
            made.append(base.copy())
            self.master.move(made[0], slots.travels, 1)
        if self.recompute:
            crosses = segments.crosses[slots.buffer]
            own = segments.opened[np.maximum(segments.of_buffer[slots.buffer], 0)]
            first = (slots.last == 0) & (slots.before <= boundary) & (slots.at > boundary) & (slots.movable < 3)
            for times in (
                np.where(crosses, KEEP, own),
                np.where(crosses, boundary, own),
                np.full(len(own), boundary),
                slots.at,
            ):
                made.append(base.copy())
                made[-1][SINCE, slots.gap[first]] = times[first]
        return made

"""What every way of every room of solvers owes who asks it: the tables of tests ask it of each."""

from collections.abc import Callable
from typing import Any

import pytest
from memplan.solvers.face.answer import Answer, Status


def keeps_its_word(
    answer: Answer,
    least: float | None,
    score: Callable[[Any], float],
    fault: Callable[[Any], str],
    enough: float | None = None,
) -> None:
    """Assert that an answer passes the room's own check and claims nothing that trying everything contradicts.

    Args:
        answer: what a way said.
        least: the smallest score of all answers, by brute force; None where there are none.
        score: the room's.
        fault: the room's check: what is wrong with an answer, in words.
        enough: the score that was asked for; None for the smallest.
    """
    best = None if answer.best is None else score(answer.best)
    if best is not None:
        assert not fault(answer.best)
        assert least is not None
        assert answer.bound <= best or answer.bound == pytest.approx(best)
        assert least <= best or least == pytest.approx(best)
    if least is not None:
        assert answer.bound <= least or answer.bound == pytest.approx(least)
    if answer.status is Status.INFEASIBLE:
        assert least is None or (enough is not None and enough < least)
    if answer.status is Status.FEASIBLE:
        assert best is not None
    if answer.status is Status.OPTIMAL:
        assert best is not None
        assert best == pytest.approx(least) if enough is None else best <= enough

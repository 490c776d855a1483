"""A solver that is named: refused before anything is traced if it cannot be used, and told in a line if it gives up."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ...solvers.programs.names import SolverError, why_not
from ..ir.errors import MemplanError
from ..ir.units import shorten


def check_solver(solver: str | None, levers: Collection[str] = ()) -> None:
    """Refuse a solver that is not known or not installed, or for which the levers leave nothing to do.

    Raises:
        MemplanError: which there are, what to install, or what to leave out.
    """
    reason = "" if solver is None else why_not(solver)
    if reason:
        raise MemplanError(f"solver={shorten(solver)} {reason}")
    if solver is not None and set(levers) == {"reorder"}:
        raise MemplanError(f"solver={shorten(solver)} does nothing: allow 'reorder' alone leaves nothing to solve")


def check_strategy(solver: str | None, strategy: str | None) -> None:
    """Refuse a solver beside a strategy, which solves nothing.

    Raises:
        MemplanError: there are both.
    """
    if solver is not None and strategy is not None:
        raise MemplanError(f"strategy={shorten(strategy)} is a rule and solves no program: plan without solver")


@contextmanager
def solving() -> Iterator[None]:
    """What a solver raises, as memplan raises it.

    Raises:
        MemplanError: the solver gave up; with its own words.
    """
    try:
        yield
    except SolverError as error:
        raise MemplanError(f"{error}: choose another, or leave it out") from None

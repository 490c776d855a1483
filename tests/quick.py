"""Plans made in little time, for tests that ask what a plan does and not how good it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from memplan.solvers.remat import search

ROUNDS, SIMULATIONS = 4, 1500  # of a search


@contextmanager
def hasty() -> Iterator[None]:
    """Search for a few hundredths of a second where it would be seconds: a few simulations find a schedule."""
    known = search.FLOOR_ROUNDS, search.MultiStart.steps
    search.FLOOR_ROUNDS, search.MultiStart.steps = ROUNDS, SIMULATIONS  # type: ignore[assignment]
    try:
        yield
    finally:
        search.FLOOR_ROUNDS, search.MultiStart.steps = known

"""Solvers of mixed-integer linear programs by name, and why one cannot be used here.

HiGHS comes with memplan. The others are those that PuLP knows: CBC comes with PuLP's wheels, the rest their owners install.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HIGHS = "highs"


@dataclass(frozen=True)
class Door:
    """How PuLP reaches a solver.

    Attributes:
        classes: of PuLP, of which the first that works is used.
        missing: what is wrong where none works, and what to do.
    """

    classes: tuple[str, ...]
    missing: str


DOORS = {
    "cbc": Door(("PULP_CBC_CMD", "COIN_CMD"), "is not installed: put cbc on the PATH (apt install coinor-cbc)"),
    "scip": Door(("SCIP_PY", "SCIP_CMD"), "is not installed: pip install pyscipopt, or put scip on the PATH"),
    "gurobi": Door(
        ("GUROBI", "GUROBI_CMD"), "is not installed, or has no licence: pip install gurobipy, or put gurobi_cl on the PATH"
    ),
    "cplex": Door(("CPLEX_PY", "CPLEX_CMD"), "is not installed: pip install cplex, or put cplex on the PATH"),
}
NAMES = (HIGHS, *DOORS)


class SolverError(Exception):
    """A solver that is installed gave up: a licence too small for the program, say."""


@contextmanager
def unwarned() -> Iterator[None]:
    """PuLP says what its next version will do without, which is no concern of who plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def why_not(name: str) -> str:
    """Why a solver cannot be used, with what to do, in words that follow its name; empty if it can."""
    if name == HIGHS:
        return ""
    door = DOORS.get(name) if isinstance(name, str) else None
    if door is None:
        return f"is not known: the solvers are {', '.join(NAMES)}"
    return "" if find_class(name) else door.missing


def find_class(name: str) -> Any:
    """PuLP's class for a solver; None where none works on this machine."""
    with unwarned():
        import pulp  # loaded when asked for, in 0.2 s

        for candidate in DOORS[name].classes:
            made = getattr(pulp, candidate, None)
            try:
                if made is not None and made(msg=False).available():
                    return made
            except Exception:  # each asks its owner's library, which raises what it likes
                continue
    return None

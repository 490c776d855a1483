"""What stating a linear program costs, by arrays and through PuLP: HiGHS and CBC, without solving it.

python -m memplan.benchmarks.programs
python -m memplan.benchmarks.programs --rows 1000
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..solvers.programs.linear import LinearProgram, highs_model, of_rows, pulp_model
from ..solvers.programs.names import unwarned

ACROSS = 5  # columns of a row, as in the closure rows of a plan
TURNS = 9


def cover(rows: int) -> LinearProgram:
    """As many columns as rows, each row over a few neighbours."""
    found = [([(row + each) % rows for each in range(ACROSS)], [1.0] * ACROSS, 1.0) for row in range(rows)]
    return of_rows(np.ones(rows), np.zeros(rows), np.ones(rows), found, np.ones(rows, bool))


def highs_through_pulp(program: LinearProgram) -> None:
    """PuLP's objects, and HiGHS's model made of them."""
    import pulp

    with unwarned():
        model: Any = pulp_model(program)[0]
        solver: Any = pulp.HiGHS(msg=False)
        solver.createAndConfigureSolver(model)
        solver.buildSolverModel(model)


def cbc_through_pulp(program: LinearProgram) -> None:
    """PuLP's objects, and the file that CBC's process reads."""
    with unwarned(), tempfile.TemporaryDirectory() as folder:
        pulp_model(program)[0].writeMPS(str(Path(folder) / "program.mps"), rename=1)


def timed(state: Callable[[LinearProgram], object], program: LinearProgram) -> float:
    """Seconds, the median."""
    found = []
    for _ in range(TURNS):
        began = time.perf_counter()
        state(program)
        found.append(time.perf_counter() - began)
    return median(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    program = cover(parser.parse_args().rows)
    ways = {"HiGHS, by arrays": highs_model, "HiGHS, through PuLP": highs_through_pulp, "CBC, through PuLP": cbc_through_pulp}
    for name, state in ways.items():
        print(f"{name:<20} {timed(state, program) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()

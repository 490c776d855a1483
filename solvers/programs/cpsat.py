"""CP-SAT as every room uses it."""

from ortools.sat.python import cp_model

WORKERS = 2  # threads of a search, always as many, so that answers do not depend on the machine


def make_solver(seconds: float, seed: int, workers: int = WORKERS) -> cp_model.CpSolver:
    """CP-SAT, to search for so long."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.random_seed = seed
    return solver

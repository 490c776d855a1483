"""Compiling the solvers before a clock runs: the first time on a machine takes 10 to 20 seconds, later ones load in a moment.

What is compiled is called here on the smallest problems that reach it, with arguments of the types that real ones have.
"""

import time
from collections.abc import Callable
from threading import Lock

import numpy as np

from .jit.compiled import is_kept, note_kept
from .remat.anneal import anneal, make_space
from .remat.exact import find_slots
from .remat.problem import NO_TIERS, Problem, profile, score
from .remat.segments import find_segments
from .storage.canonical import PlacementSearch, make_instance
from .storage.greedy import ORDERS, first_fit, lowest_first
from .storage.problem import make_storage

STAGE = "compiling the solvers, once"
Progress = Callable[[str, float], None]

lock = Lock()
ready: set[str] = set()


def compile_planning(progress: Progress | None = None) -> float:
    """Compile or load what plans a step.

    Args:
        progress: is told, where there is something to compile.

    Returns:
        The seconds that it took; 0.0 in a process that has done so before.
    """
    return once("planning", plan_smallest, progress)


def compile_addresses(progress: Progress | None = None) -> float:
    """The same for what finds addresses."""
    return once("addresses", place_smallest, progress)


def once(what: str, work: Callable[[], None], progress: Progress | None) -> float:
    """Do some work if this process has not done it, and say how many seconds it took."""
    with lock:
        if what in ready:
            return 0.0
        if progress is not None and not is_kept(what):
            progress(STAGE, 0.0)
        began = time.monotonic()
        work()
        note_kept(what)
        ready.add(what)
        return time.monotonic() - began


def plan_smallest() -> None:
    """Plan a chain of two ops, the loss, and two ops backward."""
    problem = smallest_problem()
    solution = problem.keep_all()
    score(problem, solution, 0)
    profile(problem, solution)
    space = make_space(problem, find_segments(problem), find_slots(problem, True))
    anneal(problem, space, solution, 1 << 20, 10, 0.02, 0)


def smallest_problem() -> Problem:
    """Each op reads what the one before it made; the backward ones what the forward ones made, too."""
    reads = [[], [0], [1], [2, 1], [3, 0]]
    uses = [[at for at, read in enumerate(reads) if buffer in read] for buffer in range(5)]
    read_start, read = ragged(reads)
    write_start, write = ragged([[buffer] for buffer in range(5)])
    use_start, use = ragged(uses)
    nothing, none = ragged([[] for _ in range(5)])
    return Problem(
        seconds=np.ones(5), workspace=np.zeros(5, np.int64), size=np.full(5, 64, np.int64),
        producer=np.arange(5, dtype=np.int32), read_start=read_start, read=read, write_start=write_start, write=write,
        reuse_start=nothing, reuse_new=none, reuse_old=none, use_start=use_start, use=use,
        output=np.arange(5) == 4, repeatable=np.array([5, 5, 0, 0, 0], np.int32), resident=0, boundary=2, tiers=NO_TIERS,
        home=np.zeros(5, np.int8), changed_start=nothing, changed=none,
        kind=np.arange(5, dtype=np.int32),
    )  # fmt: skip


def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists as one array, and where each starts."""
    start = np.zeros(len(rows) + 1, np.int32)
    start[1:] = np.cumsum([len(row) for row in rows])
    return start, np.array([value for row in rows for value in row], np.int32)


def place_smallest() -> None:
    """Place three buffers in every way."""
    storage = make_storage([0, 1, 2], [2, 3, 4], [8, 16, 8])
    instance = make_instance(storage)
    first_fit(storage, instance, next(iter(ORDERS)))
    lowest_first(storage)
    PlacementSearch(storage).fit(24, time.monotonic())

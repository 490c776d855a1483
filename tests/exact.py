"""Two exact answers to "the least time within a budget", to hold the planner against. Neither shares code with it.

`optimum` is an integer program in the manner of Checkmate (Jain et al. 2020): one stage for each op in base order, in
which earlier ops may run again, in base order, before the stage's own. `cheapest` is a shortest path over all states
(ops done, buffers live), for graphs of a few ops; it checks the integer program. In both nothing is written in place,
and an output stays where it is from when it is made, for the caller holds it.

CP-SAT runs in a process of its own (this file, run as a script): ortools and highspy each bring a library named libhighs,
and a process that has loaded one cannot load the other.
"""

import heapq
import subprocess
import sys
from functools import cache
from itertools import count

import msgspec
from memplan.planner.ir.program import Program

TICK = 1e-9  # seconds; times are whole numbers of these


class Task(msgspec.Struct, frozen=True):
    """The arguments of `optimum`."""

    program: Program
    budget: int
    seconds: float
    workers: int


class Optimum(msgspec.Struct, frozen=True):
    """The least time found, and the least that it can be.

    Attributes:
        proven: whether the solver has finished: the two are one, or nothing fits.
        fits: whether a schedule was found.
        seconds: of the best schedule found.
        least: seconds that no schedule beats.
    """

    proven: bool
    fits: bool
    seconds: float
    least: float

    @property
    def time(self) -> float:
        """Seconds of the best schedule found; infinite where there is none."""
        return self.seconds if self.fits else float("inf")

    @property
    def bound(self) -> float:
        """Seconds that no schedule beats; infinite where none fits."""
        return float("inf") if self.proven and not self.fits else self.least


def owned(program: Program) -> list[int]:
    """Buffers that the step makes."""
    return [buffer for buffer, op in enumerate(program.producer) if op >= 0]


@cache
def worker() -> subprocess.Popen:
    """The process that CP-SAT lives in; it ends when its input does."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-W", "ignore", __file__], stdin=pipe, stdout=pipe)


def optimum(program: Program, budget: int, seconds: float = 10.0, workers: int = 2) -> Optimum:
    """The fastest schedule of a program within a budget: see `solve`."""
    process = worker()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(Task(program, budget, seconds, workers)) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=Optimum)


def solve(task: Task) -> Optimum:
    """The fastest schedule that runs every op first in base order and fits the budget.

    A buffer is live in stage t, while op i has its turn: before its producer's turn if it was kept from the stage
    before (`held`), after it if a reader whose turn comes, or the next stage, needs it (`needed`).
    """
    from ortools.sat.python import cp_model

    program, budget = task.program, task.budget
    ops = program.ops
    size = [buffer.bytes for buffer in program.buffers]
    ours = owned(program)
    made_by = program.producer
    readers = {buffer: [i for i, op in enumerate(ops) if buffer in op.reads] for buffer in ours}
    end = len(ops)
    model = cp_model.CpModel()
    one = model.new_constant(1)
    run = {
        (t, i): one if i == t else model.new_bool_var("")
        for t in range(end)
        for i in range(t + 1)
        if i == t or ops[i].repeatable
    }
    held = {(t, b): model.new_bool_var("") for t in range(1, end + 1) for b in ours if made_by[b] < t}
    for b in set(program.outputs) & set(ours):
        for t in range(made_by[b] + 1, end + 1):
            model.add(held[t, b] == 1)
    room = budget - program.resident_bytes
    for t in range(end):
        for i in range(t + 1):
            for b in ops[i].reads if (t, i) in run else ():
                if made_by[b] >= 0:
                    again = [run[t, made_by[b]]] if (t, made_by[b]) in run else []
                    model.add_bool_or([held[t, b], *again]).only_enforce_if(run[t, i])
        turns: list[list[tuple]] = [[] for _ in range(t + 1)]
        for b in ours:
            made = made_by[b]
            if made > t:
                continue
            if made < t:
                again = [run[t, made]] if (t, made) in run else []
                model.add_bool_or([held[t, b], *again]).only_enforce_if(held[t + 1, b])
                for i in range(made + 1):
                    turns[i].append((held[t, b], size[b]))
            needed, stop = held[t + 1, b], t
            for reader in reversed([made, *(i for i in readers[b] if i <= t and (t, i) in run)]):
                for i in range(reader + 1, stop + 1):
                    turns[i].append((needed, size[b]))
                if reader != made:
                    before, needed, stop = needed, model.new_bool_var(""), reader
                    model.add_implication(before, needed)
                    model.add_implication(run[t, reader], needed)
        for i, terms in enumerate(turns):
            if (t, i) in run:
                own = sum(size[b] for b in ops[i].writes) + ops[i].workspace
                model.add(sum(flag * bytes_ for flag, bytes_ in terms) + run[t, i] * own <= room)
    cost = [round(op.seconds / TICK) for op in ops]
    model.minimize(sum(flag * cost[i] for (t, i), flag in run.items() if i < t))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = task.seconds
    solver.parameters.num_workers = task.workers
    status = solver.solve(model)
    base = sum(cost)
    if status == cp_model.INFEASIBLE:
        return Optimum(True, False, 0.0, 0.0)
    fits = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    time = (base + round(solver.objective_value)) * TICK if fits else 0.0
    return Optimum(status == cp_model.OPTIMAL, fits, time, (base + max(0, int(solver.best_objective_bound))) * TICK)


def cheapest(program: Program, budget: int, in_turn: bool) -> float:
    """The least time by trying everything: a shortest path over (ops done, buffers live).

    Args:
        program: of a few ops.
        budget: bytes, resident ones included.
        in_turn: ops run again between two first runs only once each and in base order, as `optimum` has it; else in any
            order and as often as one likes.
    """
    ops = program.ops
    size = [buffer.bytes for buffer in program.buffers]
    ours = set(owned(program))
    room = budget - program.resident_bytes
    wanted = frozenset(program.outputs) & ours
    start = (0, -1, frozenset())
    best = {start: 0.0}
    number = count()
    queue = [(0.0, next(number), start)]
    while queue:
        time, _, state = heapq.heappop(queue)
        if time > best[state]:
            continue
        done, last, live = state
        if done == len(ops) and wanted <= live:
            return time
        moves = [(time, (done, last, live - {buffer})) for buffer in live - wanted]
        for index in range(min(done + 1, len(ops))):
            op = ops[index]
            first = index == done
            if not first and (not op.repeatable or (in_turn and index <= last) or (set(op.writes) & live) - wanted):
                continue
            fits = sum(size[b] for b in live) + sum(size[b] for b in op.writes) + op.workspace <= room
            if fits and set(op.reads) & ours <= live:
                after = (done + first, -1 if first or not in_turn else index, live | set(op.writes))
                moves.append((time + op.seconds, after))
        for cost, after in moves:
            if cost < best.get(after, float("inf")) - 1e-15:
                best[after] = cost
                heapq.heappush(queue, (cost, next(number), after))
    return float("inf")


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        print(msgspec.json.encode(solve(msgspec.json.decode(line, type=Task))).decode(), flush=True)

"""Costs of a busy hour: what is measured beside other work, and what plans make of it in quiet; and the reverse.

    python -m memplan.benchmarks.costs              some five minutes, on a machine with nothing else running
    python -m memplan.benchmarks.costs --quick      a smoke test on tiny models

Each model is planned for 60 % of its unplanned peak, each time in a fresh process: with a clean table (measured and planned in
quiet); measured beside two busy processes, and planned so; planned again in quiet from what that has left, when the ops in
doubt may be timed anew; and planned beside busy processes from the clean table. Then one process, in quiet, runs eager and all
plans in rounds, as step.py does. The busy processes multiply matrices and copy, one thread each. Each case has a cache of its
own, so the figures that you have are not touched.
"""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..planner.cost.gauge import Reference, read_pace
from ..planner.cost.local import device_key
from ..planner.cost.watch import is_quiet
from ..planner.verbs.session import Session
from ..solvers.jit.compiled import code_directory
from .command import Command, Options, each_model
from .models import TINY, Made, gpt2, resnet50
from .record import Results, Row, ask, header, markdown, note_machine, paragraph, percent, ratio, say, verdict
from .step import Arms, in_turn, paired_ratio

SIZES: dict[str, Callable[[], Made]] = {
    "gpt2": partial(gpt2, layers=4, batch=4),
    "resnet50": partial(resnet50, batch=8, size=128),
    "gpt2:tiny": partial(gpt2, **TINY["gpt2"]),
    "resnet50:tiny": partial(resnet50, **TINY["resnet50"]),
}
BUDGET = {"gpt2": "60%", "resnet50": "70%"}  # of the unplanned peak
BUSY = """
import numpy
matrix, long = numpy.ones((512, 512), numpy.float32), numpy.ones(1 << 24, numpy.float32)
while True:
    matrix @ matrix
    long.copy()
"""
# case -> (what it is, whether its table is measured beside other work, whether it is planned so)
CASES = {
    "clean": ("measured and planned in quiet", False, False),
    "busy": ("measured and planned beside two busy processes", True, True),
    "busy, then quiet": ("measured beside them, planned in quiet", True, False),
    "quiet, then busy": ("measured in quiet, planned beside them", False, True),
}
TOLD = 0.1  # how far predicted times may be off
CHOICE = 0.02  # how much longer a plan's step may take than the clean one's
PATIENCE = 60.0  # seconds to wait for neighbours to be still
NOISY = 1.1  # times as slow as at its best: no machine to time steps on


# What a process is asked for


def serve(request: Row) -> Iterator[Row]:
    """A plan (`plan`), or the times of plans in rounds (`times`)."""
    torch.manual_seed(0)
    made = SIZES[request["model"]]()
    if request["task"] == "plan":
        yield plan(made, request)
    else:
        state = {"quiet": is_quiet(), "pace": settled()}
        yield {"seconds": times(made, request["methods"], request["rounds"])} | state


def plan(made: Made, request: Row) -> Row:
    """One plan, saved, and what it says of itself; what memplan warns of is in it."""
    model, args = made
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        found = Session(model, args, time_limit=request["time_limit"]).plan(BUDGET[request["model"].partition(":")[0]])
    found.save(request["file"])
    assert found.coverage is not None
    return {
        "peak": found.peak,
        "time": found.time,
        "unplanned": found.unplanned.time,
        "measured": found.coverage.facts(),
        "told": [str(each.message) for each in told if "timed while other work" in str(each.message)],
        "took": time.monotonic() - began,
    }


def settled() -> float:
    """How many times as slow as at its best the machine is, once that is little, or the wait is over."""
    known, until = Reference(device_key()), time.monotonic() + PATIENCE
    while (pace := known.slowness(read_pace())) > NOISY and time.monotonic() < until:
        time.sleep(1.0)
    return pace


def times(made: Made, methods: list[str], rounds: int) -> dict[str, list[float]]:
    """The seconds of each method in each round."""
    arms = Arms(made)
    called = {method: arms.called(method) for method in methods}

    def once(method: str, number: int) -> float:
        seconds, _ = arms.step(method, called[method], number)
        arms.clear()
        return seconds

    for method in methods * 2:
        once(method, 0)
    return in_turn(methods, once, rounds)


# The command's side


@contextmanager
def busy(on: bool) -> Iterator[None]:
    """Two processes that keep a core each, and the memory, busy."""
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", BUSY]
    others = [subprocess.Popen(command, env=os.environ | threads) for _ in range(2)] if on else []
    try:
        if others:
            time.sleep(2.0)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure_model(results: Results, name: str, options: Options) -> None:
    """All cases of a model, one after the other, for they build on each other's caches; then their steps."""
    if results.last(task="times", model=name):
        return
    results.drop(model=name)  # what a run that was cut short has left: the cases build on one another
    note_machine(results)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, kept_environment():
        os.environ.setdefault("NUMBA_CACHE_DIR", code_directory() or "")
        caches = {True: Path(folder) / "busy", False: Path(folder) / "quiet"}
        files = {}
        for case, (what, measured_busy, planned_busy) in CASES.items():
            say(f"{name}: {what}")
            os.environ["MEMPLAN_CACHE"] = str(caches[measured_busy])
            files[case] = f"{folder}/{case}.json"
            request = {"task": "plan", "model": name, "time_limit": options.time_limit, "file": files[case]}
            with busy(planned_busy):
                for row in ask("costs", request, malloc="keeping", timeout=options.timeout):
                    results.add({"task": "plan", "model": name, "case": case} | row)
                    if "failed" in row:
                        say(f"{name}: {case} failed: {row['failed']}")
                        return
        methods = {"eager": "eager"} | {case: f"memplan:{file}" for case, file in files.items()}
        say(f"{name}: {options.rounds} rounds of eager and {len(files)} plans")
        os.environ["MEMPLAN_CACHE"] = str(caches[False])
        request = {"task": "times", "model": name, "methods": list(methods.values()), "rounds": options.rounds}
        for row in ask("costs", request, malloc="keeping", timeout=options.timeout):
            if "seconds" in row:
                row["seconds"] = {key: row["seconds"][method] for key, method in methods.items()}
            results.add({"task": "times", "model": name, "took": time.monotonic() - began} | row)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Have the environment in the end as it is now."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# For people


def render(results: Results, path: Path) -> None:
    """Write the table."""
    lines = header("Costs of a busy hour", results)
    lines += paragraph(
        f"Plans are for {' and '.join(f'{share} of the unplanned peak of {name}' for name, share in BUDGET.items())}. "
        "*Predicted* is the plan's step time over the median of its measured ones; *to eager's* the same of both over those of "
        "eager, in the same rounds, which says the same however fast the machine is then; *clean's* over what the clean plan "
        "predicts; *choice* is its measured step over the clean plan's, the median over rounds with both. *In doubt* is the "
        f"share of its predicted time that rests on ops timed beside other work. The goal is to be within {TOLD:.0%} of the "
        f"measured time (where the machine was too slow to tell, of its ratio to eager's) and {CHOICE:.0%} of the clean "
        "choice, where memplan has met a quiet machine, before or after. Two processes multiply matrices and copy where it "
        "says busy. `python -m memplan.benchmarks.costs`"
    )
    heads = (
        "model",
        "case",
        "predicted",
        "to eager's",
        "clean's",
        "choice",
        "measured share",
        "in doubt",
        "seconds",
        "goal met",
    )
    lines += markdown(heads, [row for name in SIZES for row in rows_of(results, name)])
    for row in results.all(task="times"):
        if not row["quiet"] or row["pace"] > NOISY:
            lines += paragraph(
                f"Note: the machine was not quiet while {row['model']}'s steps were timed ({row['pace']:.2f} times as slow as "
                "at its best): of the times above the ratios within rounds say most."
            )
    path.write_text("\n".join(lines).rstrip() + "\n")


def rows_of(results: Results, name: str) -> Iterator[tuple[str, ...]]:
    """A model's rows."""
    timed, clean = results.last(task="times", model=name), results.last(task="plan", model=name, case="clean")
    if timed is None or clean is None:
        return
    for case in CASES:
        found = results.last(task="plan", model=name, case=case)
        if found is None:
            continue
        seconds = timed["seconds"][case]
        told = found["time"] / sorted(seconds)[len(seconds) // 2]
        choice = paired_ratio(timed["seconds"], case, "clean")
        slower = paired_ratio(timed["seconds"], case, "eager")
        beside = found["time"] / found["unplanned"] / slower if slower else told
        still = timed["quiet"] and timed["pace"] <= NOISY
        near = abs((told if still else beside) - 1) <= TOLD
        met = near and (choice is None or choice <= 1 + CHOICE) if case != "busy" else None
        yield (
            name, case, ratio(told), ratio(beside), ratio(found["time"] / clean["time"]), ratio(choice),
            percent(found["measured"]["share"]),
            percent(found["measured"]["disturbed"]), f"{found['took']:.0f}", verdict(met),
        )  # fmt: skip


def quick(options: Options) -> None:
    """What a smoke test takes."""
    options.models = [f"{name.partition(':')[0]}:tiny" for name in options.models]
    options.rounds, options.time_limit = 2, min(options.time_limit, 15.0)


def main() -> None:
    """The command line."""
    command = Command("costs", __doc__, each_model(measure_model), render, serve, quick=quick, small="tiny models, two rounds")
    command.add_models(["gpt2", "resnet50"], known=["gpt2", "resnet50"])
    command.add("--rounds", type=int, default=5, help="of eager and all plans")
    command.add_limits(planning=30.0, process=300.0)
    command()


if __name__ == "__main__":
    main()

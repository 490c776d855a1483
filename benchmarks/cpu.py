"""Training steps on the CPU: memplan over the whole range of budgets, and what people use today.

    python -m memplan.benchmarks.cpu --models gpt2 llama bert vit resnet50
    python -m memplan.benchmarks.cpu --quick          a smoke test on tiny models
    python -m memplan.benchmarks.cpu --render         the table again, from what was measured

For each model: eager, block-by-block checkpointing and PyTorch's ratio are measured; then one process plans for budgets
from the unplanned peak to the floor, for no budget, for about 5 % of overhead, and for the measured peak of each
baseline; then every plan is measured. Each peak is of a fresh process; times are compared in rounds within one (see
step.py). Rows are kept as they come, in results/cpu.jsonl, and what is there is not measured again.
"""

import argparse
import shutil
from collections.abc import Iterator
from functools import partial

from .command import Command
from .cpu_table import render
from .models import FIVE, MODELS
from .record import Results, Row, ask, say

RATIOS = [index / 10 for index in range(11)]
AIMED_OVERHEAD = 0.04  # predicted, to find the smallest budget at which 5 % are measured


def measure_model(results: Results, name: str, options: argparse.Namespace) -> None:
    """Everything about one model that is not in the results yet."""
    baselines = ["eager", "checkpoint", *(f"torch-budget:{ratio:g}" for ratio in options.ratios)]
    for method in baselines:
        peak(results, name, method, method, options)
    plan_all(results, name, baselines[1:], options)
    plans = {row["label"]: row for row in results.all(task="plan", model=name) if "file" in row}
    for row in plans.values():
        peak(results, name, row["schedule"], f"memplan:{row['file']}", options)
    if options.rounds:
        own = [row for label, row in plans.items() if not label.startswith("at:torch-budget")]
        times(results, name, ["eager", "checkpoint"], own, options)
        for ratio in options.ratios:
            method = f"torch-budget:{ratio:g}"
            rival = plans.get(f"at:{method}")
            if results.last(task="peak", model=name, method=method):
                times(results, name, ["eager", method], [rival] if rival else [], options)


def peak(results: Results, name: str, key: str, method: str, options: argparse.Namespace) -> None:
    """The peak and the numbers of a method in a fresh process. The key of a plan is its schedule's hash.

    Eager's are taken on each processor, for the bits of others' numbers are compared with them.
    """
    where = {"on": results.on} if key == "eager" else {}
    if results.last(task="peak", model=name, method=key, **where):
        return
    say(f"{name}: peak of {key}")
    request = {"task": "peak", "model": name, "method": method, "steps": options.steps}
    for row in ask("step", request, malloc="returning", timeout=options.timeout):
        results.add({"task": "peak", "model": name, "method": key} | row)
        if "failed" in row:
            say(f"{name}: {key} failed: {row['failed']}")


def plan_all(results: Results, name: str, baselines: list[str], options: argparse.Namespace) -> None:
    """The plans that are missing, made in one process."""
    known = {row["label"] for row in results.all(task="plan", model=name)}
    folder = options.plans / name.replace(":", "-")
    request: Row = {"model": name, "folder": str(folder), "time_limit": options.time_limit}
    budgets: dict[str, int | str] = {"none": "none"}
    for method in baselines:
        found = results.last(task="peak", model=name, method=method)
        if found is not None and found["total"] is not None:
            budgets[f"at:{method}"] = found["total"]
    request["budgets"] = {label: budget for label, budget in budgets.items() if label not in known}
    if f"sweep:{options.points - 1}" not in known:
        request |= {"points": options.points, "overhead": AIMED_OVERHEAD}
    if not request["budgets"] and "points" not in request:
        return
    say(f"{name}: planning")
    for row in ask("planning", request, malloc=options.allocator, timeout=4 * options.timeout):
        results.add({"task": "plan", "model": name} | row)
        if "failed" in row:
            say(f"{name}: planning failed: {row['failed']}")


def times(results: Results, name: str, methods: list[str], plans: list[Row], options: argparse.Namespace) -> None:
    """Rounds of the methods and plans in one process. Methods that fail on their own are left out."""
    measured = {row["method"] for row in results.all(task="peak", model=name)}
    files = {row["schedule"]: f"memplan:{row['file']}" for row in plans if row["schedule"] in measured}
    members = {method: method for method in methods if method in measured} | files
    group = "+".join(methods)
    found = results.last(task="time", model=name, group=group)
    if found is not None and set(members) <= set(found["seconds"]):
        return
    say(f"{name}: {options.rounds} rounds of {len(members)} methods ({group} and plans)")
    request = {"task": "time", "model": name, "methods": list(members.values()), "rounds": options.rounds}
    limit = options.timeout * (1 + len(members) / 4)
    for row in ask("step", request, malloc=options.allocator, timeout=limit):
        if "failed" in row:
            say(f"{name}: times of {group} failed: {row['failed']}")
            results.add({"task": "time", "model": name, "group": group} | row)
            continue
        seconds = {key: row["seconds"][method] for key, method in members.items()}
        results.add({"task": "time", "model": name, "group": group, "allocator": options.allocator, "seconds": seconds})


def run(results: Results, options: argparse.Namespace) -> Iterator[None]:
    """Every model."""
    options.plans = options.out / "plans"
    for name in options.models:
        measure_model(results, name, options)
        yield


def forget(results: Results, options: argparse.Namespace) -> None:
    """Drop the models' rows and plans."""
    for name in options.models:
        results.drop(model=name)
        shutil.rmtree(options.out / "plans" / name.replace(":", "-"), ignore_errors=True)


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    chosen = options.models if options.models != list(MODELS) else ["gpt2"]
    options.models = [name.partition(":")[0] + ":tiny" for name in chosen]
    options.points, options.rounds, options.steps = min(options.points, 3), min(options.rounds, 2), 1
    options.ratios = options.ratios if options.ratios != RATIOS else [0.5]


def main() -> None:
    """The command line."""
    table = partial(render, five=list(FIVE))
    command = Command("cpu", __doc__, run, table, quick=quick, small="tiny models, few points", forget=forget)
    command.add_models(MODELS)
    command.add("--points", type=int, default=10, help="budgets of the sweep")
    command.add("--ratios", type=float, nargs="*", default=RATIOS, help="of torch's activation_memory_budget")
    command.add("--steps", type=int, default=2, help="measured for each peak")
    command.add("--rounds", type=int, default=7, help="of each comparison of times; 0: no times")
    command.add_limits(process=600.0)
    command.add(
        "--allocator", choices=("returning", "default"), default="returning",
        help="how times are taken, and what plans are made for: returning, as the peaks are (every freed block of 64 "
        "KiB goes back to the system); default, as processes run that set nothing",
    )  # fmt: skip
    command()


if __name__ == "__main__":
    main()

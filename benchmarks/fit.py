"""The largest batch that trains in a budget: what `memplan fit` says, against training there and at the next size.

    python -m memplan.benchmarks.fit
    python -m memplan.benchmarks.fit --models gpt2:tiny

The budget is eager's predicted peak at the model's own batch. One process asks `fit`; others plan for the largest batch and the
next one, the latter for its smallest schedule, and train for some steps on this CPU, whose total is measured. The answer is
confirmed where the first is within the budget and the second is not.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .command import Command, each_model
from .models import FIVE, MODELS, TINY, Made
from .record import Results, Row, ask, header, markdown, mib, paragraph, ratio, say, verdict


def sized(name: str, batch: int) -> Made:
    """A model with another batch."""
    import torch

    base, _, version = name.partition(":")
    torch.manual_seed(0)
    return MODELS[base](**(TINY[base] if version == "tiny" else {}) | {"batch": batch})


def serve(request: Row) -> Iterator[Row]:
    """Ask, or plan for one batch, or train it."""
    yield {"fit": ask_fit, "plan": plan_one, "train": train_one}[request["task"]](request)


def ask_fit(request: Row) -> Row:
    """What `fit` says."""
    from ..planner.verbs.fit import fit
    from ..planner.verbs.session import Session
    from .models import build

    model, args = build(request["model"])
    session = Session(model, args, time_limit=request["time_limit"])
    budget = session.eager_peak or session.planner.unplanned.peak
    began = time.monotonic()
    found = fit(model, budget, args, over="batch", time_limit=request["time_limit"])
    after = next((point.peak for point in found.points if not point.fits), None)
    return {"budget": budget, "batch": int(args[0].shape[0]), "largest": found.largest, "peak": found.peak, "next": after,
            "why": found.why, "seconds": time.monotonic() - began}  # fmt: skip


def plan_one(request: Row) -> Row:
    """A plan within the budget, or the smallest."""
    from ..planner.ir.errors import BudgetError
    from ..planner.verbs.session import Session

    session = Session(*sized(request["model"], request["size"]), time_limit=request["time_limit"])
    try:
        made = session.plan(request["budget"])
    except BudgetError:
        made = session.plan(session.begin().floor.peak)
    made.save(request["file"])
    return {"predicted": made.peak}


def train_one(request: Row) -> Row:
    """Steps of it, measured."""
    from ..backends.measure.training import Request, train

    trial = train(Request(request["model"], request["file"], 2), *sized(request["model"], request["size"]), {})
    return {"peak": trial.peak, "step": trial.seconds}


def measure(results: Results, name: str, options: argparse.Namespace) -> None:
    """What is missing of one model."""
    if results.last(task="fit", model=name) is None:
        say(f"{name}: fit")
        for row in ask("fit", {"task": "fit", "model": name, "time_limit": options.time_limit}, timeout=options.timeout):
            results.add({"task": "fit", "model": name} | row)
            if "failed" in row:
                say(f"{name} failed: {row['failed']}")
    found = results.last(task="fit", model=name)
    for size in () if found is None else (found["largest"], found["largest"] + 1):
        if results.last(task="train", model=name, size=size):
            continue
        say(f"{name}: batch {size}")
        with tempfile.TemporaryDirectory() as folder:
            request = {"model": name, "size": size, "budget": found["budget"], "file": f"{folder}/plan.json",
                       "time_limit": options.time_limit}  # fmt: skip
            row: Row = {"task": "train", "model": name, "size": size}
            for task in ("plan", "train"):
                for part in ask("fit", request | {"task": task}, malloc="returning", timeout=options.timeout):
                    row |= part
            results.add(row)
            say(json.dumps(row))


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("model", "batch", "budget, MiB", "largest", "predicted", "measured", "within", "next, predicted", "measured",
             "over", "next is", "seconds")  # fmt: skip
    rows = []
    for name in {row["model"]: None for row in results.all(task="fit")}:
        found = results.last(task="fit", model=name)
        if found is None:
            continue
        ends = [results.last(task="train", model=name, size=found["largest"] + more) or {} for more in (0, 1)]
        peaks, budget = [end.get("peak") for end in ends], found["budget"]
        rows.append((
            name, str(found["batch"]), mib(budget), str(found["largest"]),
            mib(ends[0].get("predicted")), mib(peaks[0]), verdict(None if peaks[0] is None else peaks[0] <= budget),
            mib(ends[1].get("predicted")), mib(peaks[1]), verdict(None if peaks[1] is None else peaks[1] > budget),
            {"bytes": "proved too large", "order": "not found, none in these orders"}.get(found["why"], "not found"),
            ratio(found["seconds"]),
        ))  # fmt: skip
    lines = header("The largest batch that fits, trained", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.fit --render`. The budget is what eager's step is predicted to take at the "
        "model's own batch; the largest batch is `memplan fit`'s; then both it and the next one were planned and trained, the "
        "next one by the smallest schedule known where none fits. Sizes are MiB; seconds are those of `fit`, tracing and "
        "measuring included, on a machine that other work held too."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *markdown(heads, rows)]).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models = ["gpt2:tiny"]


def main() -> None:
    """The command line."""
    command = Command("fit", __doc__, each_model(measure), render, serve, quick=quick)
    command.add_models([f"{name}:tiny" for name in FIVE], [*(name + ":tiny" for name in TINY), *MODELS])
    command.add_limits(planning=20.0)
    command()


if __name__ == "__main__":
    main()

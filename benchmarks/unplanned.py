"""Eager's peak: what is measured, what a plan says of it, the unplanned step, and the smallest plan beside it.

    python -m memplan.benchmarks.unplanned
    python -m memplan.benchmarks.unplanned --models gpt2:tiny fused_linear_cross_entropy

Models are those of `models.py` and of `losses.py`, whose losses make gradients in their own forward pass. Eager's peak is
measured in a fresh process; another one predicts it, and plans the smallest step with the default levers.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from .command import Command, each_model
from .losses import LOSSES
from .models import FIVE, MODELS, TINY, Made, build
from .record import Results, Row, ask, header, markdown, mib, paragraph, ratio, say, verdict

GOAL = 0.03


def made(name: str) -> Made:
    """A model by name."""
    return LOSSES[name]() if name in LOSSES else build(name)


def serve(request: Row) -> Iterator[Row]:
    """Measure eager's step, or predict it."""
    from ..backends.measure.training import Request, train
    from ..planner.verbs.session import Session

    model, args = made(request["model"])
    if request["task"] == "eager":
        yield {"peak": train(Request(request["model"], None, 2), model, args, {}).peak}
        return
    session = Session(model, args, time_limit=request["time_limit"])
    planner = session.begin()
    began = time.monotonic()
    smallest = session.plan(str(planner.floor.peak))
    figures = {"eager_peak": smallest.eager_peak, "unplanned": planner.unplanned.peak, "smallest": smallest.peak}
    yield {**figures, "seconds": time.monotonic() - began}


def measure(results: Results, name: str, options: argparse.Namespace) -> None:
    """What is missing of one model."""
    for task in ("eager", "planned"):
        if results.last(task=task, model=name):
            continue
        say(f"{name}: {task}")
        request = {"task": task, "model": name, "time_limit": options.time_limit}
        for row in ask("unplanned", request, malloc="returning", timeout=options.timeout):
            results.add({"task": task, "model": name} | row)
            if "failed" in row:
                say(f"{name} failed: {row['failed']}")


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("model", "eager, MiB", "predicted, MiB", "predicted / eager", f"within {GOAL:.0%}", "unplanned, MiB",
             "unplanned / eager", "smallest plan, MiB", "at most eager's")  # fmt: skip
    rows = []
    for name in {row["model"]: None for row in results.all(task="eager")}:
        eager, found = results.last(task="eager", model=name), results.last(task="planned", model=name)
        if eager is None or found is None or eager["peak"] is None or "eager_peak" not in found:
            continue
        peak, predicted = eager["peak"], found["eager_peak"]
        rows.append((
            name, mib(peak), mib(predicted), ratio(predicted / peak), verdict(abs(predicted / peak - 1) <= GOAL),
            mib(found["unplanned"]), ratio(found["unplanned"] / peak), mib(found["smallest"]),
            verdict(found["smallest"] <= peak),
        ))  # fmt: skip
    lines = header("Eager's peak, and the unplanned step's", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.unplanned --render`. Eager's peak is predicted from a step on fake tensors, "
        "by autograd itself. The unplanned step is another one where the model's own code decides what is held: it frees a "
        "value after its last reader, whatever variables still name it, and keeps what gradient checkpointing would drop."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *markdown(heads, rows)]).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models = ["gpt2:tiny", "kept_masks"]


def main() -> None:
    """The command line."""
    command = Command("unplanned", __doc__, each_model(measure), render, serve, quick=quick, small="two tiny models")
    known = [*(name + ":tiny" for name in TINY), *MODELS, *LOSSES]
    command.add_models([*(f"{name}:tiny" for name in FIVE), *LOSSES], known)
    command.add_limits(planning=20.0)
    command()


if __name__ == "__main__":
    main()

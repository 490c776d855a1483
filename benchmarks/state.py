"""Updates in backward, with parameters and AdamW's state in memory or on a disk, on the CPU.

    python -m memplan.benchmarks.state
    python -m memplan.benchmarks.state --models gpt2 vit --points 3 --rounds 5

For each model one process plans steps with AdamW for budgets from the unplanned peak down to the smallest: with everything in
memory, then with parameters and state at home on a disk where that helps. Each plan's peak is taken in a fresh process, which
then trains for twenty steps; its losses and parameters are compared, bit for bit, with those of as many steps of
`torch.optim.AdamW` after the backward pass. Times are taken in rounds within one process.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..backends.measure.training import LEARNING_RATE, Request, train
from ..planner.ir.plan import load
from ..planner.verbs.session import Session
from .command import Command, each_model
from .models import FIVE, build
from .offload import SLACK
from .planning import attempt
from .record import (
    ALLOCATORS,
    Results,
    Row,
    ask,
    header,
    markdown,
    mib,
    paragraph,
    ratio,
    say,
    verdict,
)
from .step import in_turn, paired_ratio

STEPS = 20
WARM = 2  # rounds before those that count
TIMED = ("keeping", "default")  # allocators that steps are timed with; predictions are for the first
LEVERS = ("reorder", "recompute", "offload")


def serve(request: Row) -> Iterator[Row]:
    """Answer a request of `measure`."""
    task = {"plan": plan_all, "train": train_one, "time": time_all}[request["task"]]
    yield from task(request)


def plan_all(request: Row) -> Iterator[Row]:
    """Plans for falling budgets, from one capture."""
    torch.manual_seed(0)
    model, args = build(request["model"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    options = {"optimizer": torch.optim.AdamW(model.parameters()), "optimizer_in_backward": True, "allow": LEVERS}
    session = Session(model, args, time_limit=request["time_limit"], **options)
    program, top, bottom = session.planner.program, session.planner.unplanned.peak, session.planner.floor.peak
    floors = {"in memory": dataclasses.replace(session.planner, homes=()).floor.peak, "on disk": bottom}
    yield {"label": "floors", "unplanned": top, "resident": program.resident_bytes, **floors}
    for index in range(request["points"]):
        budget = top - (top - bottom) * (index + 1) // request["points"]
        row = attempt(session, f"point:{index}", budget, folder)
        if "file" in row:
            row["homes"] = sum(program.buffers[buffer].bytes for buffer, _ in load(row["file"]).schedule.homes)
        yield row | {"point": index}


def train_one(request: Row) -> Iterator[Row]:
    """Twenty steps of a model as it is, or under a plan: the peak, and every step's loss and parameters."""
    model, args = build(request["model"])
    found = train(Request(request["model"], request["file"], STEPS, "adamw", in_backward=True), model, args, {})
    yield {"peak": found.peak, "losses": found.losses, "parameters": found.gradients, "seconds": found.seconds}


def time_all(request: Row) -> Iterator[Row]:
    """Seconds of steps of all plans and of eager, in turn."""
    arms = {}
    for name, file in {"eager": None, **request["files"]}.items():
        torch.manual_seed(0)
        model, args = build(request["model"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        called = model if file is None else load(file).apply(model, optimizer=optimizer)
        arms[name] = called, args, optimizer

    def once(name: str, number: int) -> float:
        called, args, optimizer = arms[name]
        torch.manual_seed(number)
        began = time.perf_counter()
        loss = called(*args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began

    for number in range(WARM):
        for name in arms:
            once(name, number)
    yield {"seconds": in_turn(list(arms), once, request["rounds"])}


def measure(results: Results, name: str, options: argparse.Namespace) -> None:
    """Everything about one model that is missing."""
    if results.last(model=name, label="floors") is None:
        say(f"{name}: planning")
        request: Row = {"task": "plan", "model": name, "folder": str(options.out / "plans" / "state"),
                        "points": options.points, "time_limit": options.time_limit}  # fmt: skip
        for row in ask("state", request, malloc="keeping", timeout=8 * options.timeout):
            results.add({"task": "plan", "model": name} | row)
    plans = [row for row in results.all(task="plan", model=name) if "file" in row]
    for row in [{"schedule": "eager", "file": None}, *plans]:
        if results.last(task="train", model=name, schedule=row["schedule"]) is None:
            say(f"{name}: training, {row['schedule']}")
            request = {"task": "train", "model": name, "file": row["file"]}
            for found in ask("state", request, malloc="returning", timeout=options.timeout):
                results.add({"task": "train", "model": name, "schedule": row["schedule"]} | found)
    for malloc in TIMED:
        if not options.rounds or not plans or results.last(task="time", model=name, malloc=malloc) is not None:
            continue
        say(f"{name}: {options.rounds} rounds, {malloc} malloc")
        request = {"task": "time", "model": name, "files": {row["schedule"]: row["file"] for row in plans},
                   "rounds": options.rounds}  # fmt: skip
        for row in ask("state", request, malloc=malloc, timeout=options.timeout):
            results.add({"task": "time", "model": name, "malloc": malloc} | row)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Updates in backward, parameters and AdamW's state in memory or on a disk", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.state`. Sizes are MiB, physical, everything counted: parameters, AdamW's "
        "state, gradients, activations. Times are over eager's, with AdamW's step after the backward pass. *On disk*: bytes of "
        f"parameters and state that are there between their uses. *Bits*: {STEPS} losses, and the parameters after each of "
        f"{STEPS} steps, are those of `torch.optim.AdamW` after eager's backward pass. {ALLOCATORS} "
        "*Default malloc*: as measured with glibc's own way, which gives back some of it, not the same in every step."
    )
    for name in dict.fromkeys(row["model"] for row in results.all(task="plan")):
        found = results.last(model=name, label="floors")
        if found is None:
            continue
        eager = results.last(task="train", model=name, schedule="eager") or {}
        lines += [f"## {name}", ""]
        lines += paragraph(
            f"Unplanned {mib(found['unplanned'])} predicted, {mib(eager.get('peak'))} measured, of which "
            f"{mib(found['resident'])} are parameters, state and inputs. Smallest: {mib(found['in memory'])} with all of them "
            f"in memory, {mib(found['on disk'])} with a disk."
        )
        heads = ("budget", "of unplanned", "on disk", "moved out", "moved in", "predicted", "measured", "off by",
                 "default malloc", "gap", "measured total", "fits", "bits")  # fmt: skip
        both = [(results.last(task="time", model=name, malloc=malloc) or {}).get("seconds", {}) for malloc in TIMED]
        seconds = both[0]
        rows = []
        for row in results.all(task="plan", model=name):
            if "point" not in row:
                continue
            if "file" not in row:
                rows.append((mib(row["budget"]), f"{row['budget'] / found['unplanned']:.0%}", *["-"] * 9, "no plan", "-"))
                continue
            done = results.last(task="train", model=name, schedule=row["schedule"])
            predicted, measured = row["time"] / row["unplanned_time"], paired_ratio(seconds, row["schedule"], "eager")
            usual = paired_ratio(both[1], row["schedule"], "eager")
            moved = [sum(size for link, size in row["moved"].items() if link.startswith(way)) for way in ("device", "disk")]
            rows.append((
                mib(row["budget"]), f"{row['budget'] / found['unplanned']:.0%}", mib(row.get("homes")), *map(mib, moved),
                ratio(predicted), ratio(measured), "-" if measured is None else f"{measured / predicted - 1:+.1%}",
                ratio(usual), f"{row['gap']:.1%}", mib(done["peak"] if done else None),
                verdict(done["peak"] <= row["budget"] * SLACK[0] + SLACK[1] if done else None),
                verdict(all(done[part] == eager[part] for part in ("losses", "parameters")) if done and eager else None),
            ))  # fmt: skip
        lines += markdown(heads, rows)
        if seconds:
            took = [statistics.median(found["eager"]) for found in both if found]
            lines += paragraph(f"Eager's step took {' and '.join(f'{value:.3f} s' for value in took)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.rounds, options.points = ["gpt2:tiny"], 2, 3
    options.time_limit = min(options.time_limit, 10.0)


def main() -> None:
    """The command line."""
    command = Command("state", __doc__, each_model(measure), render, serve, quick=quick)
    command.add_models(FIVE)
    command.add("--points", type=int, default=5, help="budgets")
    command.add("--rounds", type=int, default=5, help="of the comparison of times; 0: no times")
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

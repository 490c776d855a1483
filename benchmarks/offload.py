"""Offload to a disk on the CPU: both levers together against either alone and against MEMO's rule.

    python -m memplan.benchmarks.offload
    python -m memplan.benchmarks.offload --models gpt2 vit --points 6 --rounds 5

For each model one process plans for budgets from the unplanned peak down to the smallest that any lever reaches: with
recomputation alone, with offload alone, by MEMO's rule, and with both. Then the joint plans' peaks and numbers are taken in
fresh processes, and the times of all in rounds within one. *Limited* sets a limit on the process's address space that the
joint plan's step keeps and eager's does not.
"""

import argparse
import copy
import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..planner.ir.plan import load
from ..planner.verbs.session import Session
from .command import Command, each_model
from .models import FIVE, build
from .planning import attempt
from .record import (
    ALLOCATORS,
    MIB,
    Results,
    Row,
    ask,
    header,
    markdown,
    mean,
    mib,
    paragraph,
    percent,
    ratio,
    say,
    verdict,
)
from .step import Arms, paired_ratio

KINDS = ("both", "recompute", "offload", "memo")
SLACK = 1.03, 16 * MIB  # of a measured total over its budget
LIMIT_SLACK = 48 * MIB  # of address space over what the step needs: threads' stacks, kernels' scratch


def serve(request: Row) -> Iterator[Row]:
    """Answer a request of `measure`."""
    yield from plan_all(request) if request["task"] == "plan" else limited(request)


def plan_all(request: Row) -> Iterator[Row]:
    """All plans of a model, from one capture and one set of measurements."""
    torch.manual_seed(0)
    model, args = build(request["model"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(model, args, time_limit=request["time_limit"], allow=("reorder", "recompute", "offload"))
    sessions = {kind: copy.copy(session) for kind in KINDS}
    sessions["recompute"].planner = dataclasses.replace(session.planner, offload=False)
    sessions["offload"].planner = dataclasses.replace(session.planner, recompute=False)
    floors = {kind: sessions[kind].planner.floor.peak for kind in ("recompute", "offload", "both")}
    links = [[link.source, link.target, link.bandwidth, link.load] for link in session.machine.links]
    yield {"label": "floors", "floors": floors, "links": links, "unplanned": session.planner.unplanned.peak}
    top, bottom, points = session.planner.unplanned.peak, min(floors.values()), request["points"]
    for index in range(points):
        budget = top - (top - bottom) * index // max(points - 1, 1)
        for kind in KINDS:
            strategy = "memo" if kind == "memo" else None
            row = attempt(sessions[kind], f"{kind}:{index}", budget, folder, strategy=strategy)
            yield row | {"kind": kind, "point": index, "budget": budget}


def limited(request: Row) -> Iterator[Row]:
    """Whether a step succeeds once the process may only have as much more address space as a plan needs."""
    arms = Arms(build(request["model"]))
    plan = load(request["file"])
    called = arms.called(request["method"])
    arms.step(request["method"], called, 0)  # threads, caches, the kernel's scratch
    arms.clear()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = plan.peak - arms.fixed + LIMIT_SLACK
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        _, loss = arms.step(request["method"], called, 1)
        yield {"room": room, "loss": loss}
    except (RuntimeError, MemoryError) as error:
        yield {"room": room, "refused": str(error).splitlines()[0][:160]}


def measure(results: Results, name: str, options: argparse.Namespace) -> None:
    """Everything about one model that is missing."""
    if results.last(model=name, label="floors") is None:
        say(f"{name}: planning")
        request: Row = {"task": "plan", "model": name, "folder": str(options.out / "plans" / "offload"),
                        "points": options.points, "time_limit": options.time_limit}  # fmt: skip
        for row in ask("offload", request, malloc="keeping", timeout=8 * options.timeout):
            results.add({"task": "plan", "model": name} | row)
    plans = [row for row in results.all(task="plan", model=name) if "file" in row]
    for row in [{"schedule": "eager", "file": None}, *(row for row in plans if row["kind"] == "both")]:
        if results.last(task="peak", model=name, schedule=row["schedule"]) is None:
            say(f"{name}: peak of {row['schedule']}")
            method = "eager" if row["file"] is None else f"memplan:{row['file']}"
            for found in ask("step", {"task": "peak", "model": name, "method": method, "steps": 2}, malloc="returning",
                             timeout=options.timeout):  # fmt: skip
                results.add({"task": "peak", "model": name, "schedule": row["schedule"]} | found)
    for point in sorted({row["point"] for row in plans})[:: options.every]:
        group = {row["kind"]: f"memplan:{row['file']}" for row in plans if row["point"] == point}
        if options.rounds and results.last(task="time", model=name, point=point) is None:
            say(f"{name}: {options.rounds} rounds at point {point}")
            methods = list(dict.fromkeys(["eager", *group.values()]))
            request = {"task": "time", "model": name, "methods": methods, "rounds": options.rounds}
            for row in ask("step", request, malloc="keeping", timeout=options.timeout):
                if "seconds" in row:
                    row = {"seconds": {kind: row["seconds"][method] for kind, method in {"eager": "eager", **group}.items()}}
                results.add({"task": "time", "model": name, "point": point} | row)
    smallest = min((row for row in plans if row["kind"] == "both"), key=lambda row: row["budget"], default=None)
    for method in ("eager", "planned") if smallest else ():
        if results.last(task="limit", model=name, method=method) is None:
            request = {"task": "limit", "model": name, "file": smallest["file"],
                       "method": "eager" if method == "eager" else f"memplan:{smallest['file']}"}  # fmt: skip
            for row in ask("offload", request, malloc="returning", timeout=options.timeout):
                results.add({"task": "limit", "model": name, "method": method} | row)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Offload to a disk", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.offload`. Sizes are MiB, physical, everything counted. Times are over "
        "eager's: as predicted, and as measured within one process (median over rounds). *Off by*: the measured ratio "
        f"over the predicted one, of the joint plan; *in seconds*: the same of the step's time itself. {ALLOCATORS}"
    )
    gains: list[float] = []
    for name in dict.fromkeys(row["model"] for row in results.all(task="plan")):
        found = results.last(model=name, label="floors")
        if found is None:
            continue
        floors = ", ".join(f"{kind} {mib(size)}" for kind, size in found["floors"].items())
        rates = ", ".join(f"{source} to {target} {rate / 1e9:.2f} GB/s (load {load:.2f})"
                          for source, target, rate, load in found["links"])  # fmt: skip
        lines += [f"## {name}", "", f"Unplanned {mib(found['unplanned'])}. Smallest: {floors}. Links: {rates}.", ""]
        heads = ("budget", *(f"{kind}, predicted" for kind in KINDS), *(f"{kind}, measured" for kind in KINDS),
                 "off by", "in seconds", "moved out", "measured total", "fits", "equal to eager",
                 "no worse, predicted")  # fmt: skip
        rows = []
        for point in sorted({row["point"] for row in results.all(task="plan", model=name) if "point" in row}):
            rows.append(table_row(results, name, point, gains))
        lines += markdown(heads, rows)
        limits = {row["method"]: row for row in results.all(task="limit", model=name)}
        if len(limits) == 2:
            said = limits["eager"].get("refused", "succeeds too")
            same = "succeeds" if "loss" in limits["planned"] else f"fails: {limits['planned']['refused']}"
            lines += [f"Limited to {mib(limits['planned']['room'])} MiB more of address space: the joint plan's step {same}; "
                      f"eager's: {said}.", ""]  # fmt: skip
    if gains:
        lines += [f"Mean improvement of the predicted time over the best of the three others: {percent(mean(gains))}.", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def table_row(results: Results, name: str, point: int, gains: list[float]) -> tuple[str, ...]:
    """One budget's figures; adds the joint plan's gain to `gains`."""
    plans: dict[str, Row] = {row["kind"]: row for row in results.all(task="plan", model=name, point=point) if "time" in row}
    both = plans.get("both")
    budget = next(row["budget"] for row in results.all(task="plan", model=name, point=point))
    predicted = {kind: row["time"] / row["unplanned_time"] for kind, row in plans.items()}
    seconds = (results.last(task="time", model=name, point=point) or {}).get("seconds", {})
    measured = {kind: paired_ratio(seconds, kind, "eager") for kind in KINDS}
    others = [predicted[kind] for kind in KINDS[1:] if kind in predicted]
    peak: Any = results.last(task="peak", model=name, schedule=both["schedule"]) if both else None
    eager: Any = results.last(task="peak", model=name, schedule="eager")
    fits = equal = None
    if peak and eager:
        fits = peak["total"] <= budget * SLACK[0] + SLACK[1]
        equal = all(peak[part] == eager[part] for part in ("numbers", "trained", "state"))
    if both and others:
        gains.append(1 - predicted["both"] / min(others))
    off = measured["both"] / predicted["both"] - 1 if both and measured["both"] else None
    late = median(seconds["both"]) / both["time"] - 1 if both and "both" in seconds else None
    return (
        mib(budget), *(ratio(predicted.get(kind)) for kind in KINDS), *(ratio(measured[kind]) for kind in KINDS),
        *("-" if each is None else f"{each:+.1%}" for each in (off, late)),
        mib(max(both["moved"].values(), default=0)) if both else "-",
        mib(peak["total"]) if peak else "-", verdict(fits), verdict(equal),
        verdict(predicted["both"] <= min(others) * 1.001 if both and others else None),
    )  # fmt: skip


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.rounds, options.points = ["gpt2:tiny"], 2, 3
    options.time_limit = min(options.time_limit, 5.0)


def main() -> None:
    """The command line."""
    command = Command("offload", __doc__, each_model(measure), render, serve, quick=quick)
    command.add_models(FIVE)
    command.add("--points", type=int, default=10, help="budgets of the sweep")
    command.add("--rounds", type=int, default=5, help="of each comparison of times; 0: no times")
    command.add("--every", type=int, default=1, help="take the times at each, each second, each third budget")
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

"""Training steps in one arena: the plan with addresses against the same plan without, and against eager.

    python -m memplan.benchmarks.arena
    python -m memplan.benchmarks.arena --models gpt2 vit --budgets 50% 50%+lent

Peaks and numbers are of fresh processes, times of rounds within one, as in cpu.py. *Stated* is what the referee says the
step takes: parameters, inputs, the arena, and the most that lies outside it at once (gradients, outputs, workspaces and
the transients of operators that cannot write where they are told). With `+lent` behind a budget, gradients lie in the arena.
"""

import argparse
import dataclasses
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from torch.profiler import ProfilerActivity, profile

from ..backends.eager.arena import generate_static
from ..backends.eager.module import recapture
from ..passes.place import Place
from ..planner.ir.plan import Side, load, unlimited
from ..planner.ir.program import Op
from ..planner.ir.referee import referee
from ..planner.ir.schedule import Run
from .command import Command
from .models import FIVE, build
from .record import Results, Row, ask, header, markdown, mib, ratio, say, verdict
from .step import Arms, paired_ratio

BUDGETS = ("70%", "50%", "50%+lent")
LENT = "+lent"


def serve(request: Row) -> Iterator[Row]:
    """Answer a request of `measure`."""
    yield from describe(request) if request["task"] == "place" else count(request)


def describe(request: Row) -> Iterator[Row]:
    """What there is to say of a plan with addresses; and the same schedule without them, saved beside it."""
    plan = load(request["file"])
    bare = msgspec.structs.replace(plan.schedule, placements=(), outside=(), lent=())
    path = Path(request["file"]).with_suffix(".bare.json")
    report = referee(plan.program, unlimited(plan.machine), bare)
    dataclasses.replace(plan, budget=None, planned=Side(plan.program, bare, report)).save(path)
    began = time.perf_counter()
    _, (arena, *_) = Place()(plan.program, plan.machine, msgspec.structs.replace(plan.schedule, placements=()))
    seconds = time.perf_counter() - began
    code = generate_static(recapture(plan, build(request["model"])[0], None).traced, plan.schedule)
    yield {
        "bare": str(path), "arena": plan.arena, "live": arena.live, "method": arena.packing.method, "place_seconds": seconds,
        "buffers": len(plan.schedule.placements), "stated": plan.peak, "transients": code.arena.transients,
        "runs": sum(isinstance(step, Run) for step in plan.schedule.instructions), "outside": len(plan.schedule.outside),
    }  # fmt: skip


def count(request: Row) -> Iterator[Row]:
    """How often a steady step asks the allocator, for each method; and for what, in the arena.

    An allocation belongs to the operator at the top of the calls in which it was made. It is *copied* if some op of that
    name has a result that its kernel puts where it likes (to be copied, or to stay), *given* if some op of that name makes
    what the caller is given, a *number* if it holds 64 bytes at most, *between* if no operator made it. What is left,
    *other*, would be a planned tensor, or a kernel's workspace.
    """
    arms = Arms(build(request["model"]))
    calls = {}
    for label, method in request["methods"].items():
        called = arms.called(method)
        for seed in range(2):
            arms.step(method, called, seed)
            arms.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            arms.step(method, called, 2)
        arms.clear()
        recorded: Any = seen.profiler
        calls[label] = allocations(list(recorded.kineto_results.events()))
    plan, code = load(request["file"]), request["transients"]
    outside = set(plan.schedule.outside)
    copied = {base_name(op) for op in plan.program.ops if op.name in code or outside & set(op.writes)}
    outputs = set(plan.program.outputs) - set(plan.schedule.lent)
    given = {base_name(op) for op in plan.program.ops if set(op.writes) & outputs}
    kinds, other = dict.fromkeys(("copied", "given", "number", "between", "other"), 0), {}
    for name, size in calls["arena"]:
        if size <= 64:
            kind = "number"
        else:
            kind = "between" if not name else "copied" if name in copied else "given" if name in given else "other"
        kinds[kind] += 1
        if kind == "other":
            other[name] = other.get(name, 0) + 1
    yield {"calls": {label: len(found) for label, found in calls.items()}, "kinds": kinds, "other": other}


def base_name(op: Op) -> str:
    """The operator's name without its overload."""
    return op.target.removeprefix("aten.").partition(".")[0]


def allocations(events: list[Any]) -> list[tuple[str, int]]:
    """The allocations among a profiler's events: the name of the operator at the top, or nothing, and the bytes."""
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns(), event.name()[6:], event.start_thread_id())
                   for event in events if event.name().startswith("aten::"))  # fmt: skip
    tops: dict[int, list[tuple[int, int, str]]] = {}
    for begin, end, name, thread in spans:
        mine = tops.setdefault(thread, [])
        if not mine or begin >= mine[-1][1]:
            mine.append((begin, end, name))
    found = []
    for event in events:
        if event.name() == "[memory]" and event.nbytes() > 0:
            mine = tops.get(event.start_thread_id(), [])
            at = bisect_right(mine, (event.start_ns(), 2**63, "")) - 1
            inside = at >= 0 and event.start_ns() <= mine[at][1]
            found.append((mine[at][2] if inside else "", event.nbytes()))
    return found


def measure(results: Results, name: str, budget: str, options: argparse.Namespace) -> None:
    """Everything about one plan of one model that is missing."""
    keys = {"model": name, "asked": budget}

    def once(module: str, request: Row, **more: Any) -> Row | None:
        found = results.last(**keys, **more)
        if found is None:
            say(", ".join([name, budget, *map(str, more.values())]))
            for row in ask(module, request, malloc="returning", timeout=options.timeout):
                found = results.add(keys | more | row)
        return None if found is None or "failed" in found else found

    request: Row = {"model": name, "folder": str(options.out / "plans" / "arena"), "time_limit": options.time_limit,
                    "budgets": {budget: budget.removesuffix(LENT)}, "arena": True, "lend": budget.endswith(LENT)}  # fmt: skip
    plan = once("planning", request, task="plan")
    if plan is None or "file" not in plan:
        return
    made = once("arena", {"task": "place", "model": name, "file": plan["file"]}, task="place")
    if made is None:
        return
    methods = {"eager": "eager", "plan": f"memplan:{made['bare']}", "arena": f"memplan:{plan['file']}"}
    for label, method in methods.items():
        once("step", {"task": "peak", "model": name, "method": method, "steps": 2}, task="peak", method=label)
    request = {"task": "count", "model": name, "file": plan["file"], "methods": methods, "transients": list(made["transients"])}
    once("arena", request, task="count")
    request = {"task": "time", "model": name, "methods": list(methods.values()), "rounds": options.rounds}
    if results.last(**keys, task="time") is None:
        say(f"{name}, {budget}: {options.rounds} rounds")
        for row in ask("step", request, timeout=options.timeout):
            if "seconds" in row:
                row = {"seconds": {label: row["seconds"][method] for label, method in methods.items()}}
            results.add(keys | {"task": "time"} | row)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("model", "budget", "arena", "over live", "buffers", "placed in", "stated", "measured", "off by", "without",
             "outside", "ops that copy", "of", "equal to eager", "time / plan's", "time / eager", "within 2 %",
             "<= 1.05")  # fmt: skip
    rows = []
    for made in {(row["model"], row["asked"]): row for row in results.all(task="place")}.values():
        keys = {"model": made["model"], "asked": made["asked"]}
        peaks = {label: results.last(**keys, task="peak", method=label) for label in ("eager", "plan", "arena")}
        times = results.last(**keys, task="time")
        if any(row is None for row in peaks.values()) or times is None:
            continue
        eager, plan, arena = (peaks[label] or {} for label in ("eager", "plan", "arena"))
        against = paired_ratio(times["seconds"], "arena", "plan")
        off = arena["total"] / made["stated"] - 1
        equal = all(arena[part] == eager[part] for part in ("numbers", "trained", "state"))
        rows.append((
            made["model"], made["asked"], mib(made["arena"]), ratio(made["arena"] / made["live"]), str(made["buffers"]),
            f"{made['place_seconds']:.2f} s", mib(made["stated"]), mib(arena["total"]), f"{off:+.1%}", mib(plan["total"]),
            str(made.get("outside", 0)), str(len(made["transients"])), str(made["runs"]), verdict(equal), ratio(against),
            ratio(paired_ratio(times["seconds"], "arena", "eager")), verdict(abs(off) <= 0.02),
            verdict(against is not None and against <= 1.05),
        ))  # fmt: skip
    lines = header("Training in one arena", results)
    lines += ["Written by `python -m memplan.benchmarks.arena`. Sizes are MiB. *Without*: the same plan's measured total"]
    lines += ["without addresses. *Outside*: short-lived results that stay where their kernels make them, in room that is"]
    lines += ["needed beside the arena anyway. *Ops that copy*: whose other results pass through memory of their own.", ""]
    lines += markdown(heads, rows)
    counts = [(row["model"], row["asked"], *(str(row["calls"][label]) for label in ("eager", "plan", "arena")),
               *(str(row["kinds"][kind]) for kind in ("copied", "given", "number", "between", "other")),
               ", ".join(f"{name} {times}" for name, times in row["other"].items()) or "-")
              for row in {(row["model"], row["asked"]): row for row in results.all(task="count")}.values()]  # fmt: skip
    if counts:
        lines += ["## Calls of the allocator in a steady step", ""]
        lines += [
            "In the arena, by what they were for: results that are *copied* or stay outside, gradients and outputs that the"
        ]
        lines += [
            "caller is *given*, single *numbers* (64 bytes at most), *between* operators (autograd's), and *other*, which are"
        ]
        lines += ["workspaces of kernels or would be planned tensors.", ""]
        lines += markdown(("model", "budget", "eager", "plan without addresses", "arena", "copied", "given", "numbers",
                           "between", "other", "by"), counts)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def run(results: Results, options: argparse.Namespace) -> Iterator[None]:
    """Every model within every budget."""
    for name in options.models:
        for budget in options.budgets:
            measure(results, name, budget, options)
            yield


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.rounds = ["gpt2:tiny"], 2


def main() -> None:
    """The command line."""
    command = Command("arena", __doc__, run, render, serve, quick=quick)
    command.add_models(FIVE)
    command.add("--budgets", nargs="+", default=list(BUDGETS), help="as in memplan.plan; none for no budget")
    command.add("--rounds", type=int, default=7)
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

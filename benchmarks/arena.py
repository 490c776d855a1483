"""Training steps in one arena: the plan with addresses against the same plan without, and against eager.

    python -m memplan.benchmarks.arena
    python -m memplan.benchmarks.arena --models gpt2 vit --budgets 50%

Peaks and numbers are of fresh processes, times of rounds within one, as in cpu.py. *Stated* is what the referee says the
step takes: parameters, inputs, the arena, and the most that lies outside it at once (gradients, outputs, workspaces and
the transients of operators that cannot write where they are told).
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..backends.arena import generate_static
from ..backends.eager import recapture
from ..passes.addresses import Place
from ..planner.plan import Side, load, unlimited
from ..planner.referee import referee
from ..planner.schedule import Run
from .models import FIVE, MODELS, build
from .record import RESULTS, Results, Row, answer, ask, header, markdown, mib, note_machine, ratio, say, verdict
from .step import paired_ratio

BUDGETS = ("none", "50%")


def serve(request: Row) -> Iterator[Row]:
    """What there is to say of a plan with addresses; and the same schedule without them, saved beside it."""
    plan = load(request["file"])
    bare = msgspec.structs.replace(plan.schedule, placements=())
    path = Path(request["file"]).with_suffix(".bare.json")
    report = referee(plan.program, unlimited(plan.machine), bare)
    dataclasses.replace(plan, budget=None, planned=Side(plan.program, bare, report)).save(path)
    began = time.perf_counter()
    _, (arena, *_) = Place()(plan.program, plan.machine, bare)
    seconds = time.perf_counter() - began
    code = generate_static(recapture(plan, build(request["model"])[0], None).traced, plan.schedule)
    yield {
        "bare": str(path), "arena": plan.arena, "live": arena.live, "method": arena.packing.method, "place_seconds": seconds,
        "buffers": len(plan.schedule.placements), "stated": plan.peak, "transients": code.arena.transients,
        "runs": sum(isinstance(step, Run) for step in plan.schedule.instructions),
    }  # fmt: skip


def measure(results: Results, name: str, budget: str, options: argparse.Namespace) -> None:
    """Everything about one plan of one model that is missing."""
    keys = {"model": name, "asked": budget}

    def once(module: str, request: Row, **more: Any) -> Row | None:
        found = results.last(**keys, **more)
        if found is None:
            say(", ".join([name, budget, *map(str, more.values())]))
            for row in ask(module, request, returning=True, timeout=options.timeout):
                found = results.add(keys | more | row)
        return None if found is None or "failed" in found else found

    request: Row = {"model": name, "folder": str(options.out / "plans" / "arena"), "time_limit": options.time_limit,
                    "budgets": {budget: budget}, "arena": True}  # fmt: skip
    plan = once("planning", request, task="plan")
    if plan is None or "file" not in plan:
        return
    made = once("arena", {"model": name, "file": plan["file"]}, task="place")
    if made is None:
        return
    methods = {"eager": "eager", "plan": f"memplan:{made['bare']}", "arena": f"memplan:{plan['file']}"}
    for label, method in methods.items():
        once("step", {"task": "peak", "model": name, "method": method, "steps": 2}, task="peak", method=label)
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
             "ops that copy", "of", "equal to eager", "time / plan's", "time / eager", "within 2 %", "<= 1.05")  # fmt: skip
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
            str(len(made["transients"])), str(made["runs"]), verdict(equal), ratio(against),
            ratio(paired_ratio(times["seconds"], "arena", "eager")), verdict(abs(off) <= 0.02),
            verdict(against is not None and against <= 1.05),
        ))  # fmt: skip
    lines = header("Training in one arena", results)
    lines += ["Written by `python -m memplan.benchmarks.arena`. Sizes are MiB. *Without*: the same plan's measured total"]
    lines += ["without addresses. *Ops that copy*: whose results torch can only give memory of their own.", ""]
    lines += markdown(heads, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FIVE), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="as in memplan.plan; none for no budget")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of planning for each, at most")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of arena.jsonl and arena.md")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one tiny model, results/quick")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured of these models")
    parser.add_argument("--render", action="store_true", help="only write the table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return answer(serve)
    if options.quick:
        options.models, options.rounds, options.out = ["gpt2:tiny"], 2, options.out / "quick"
    results = Results(options.out / "arena.jsonl")
    if not options.render:
        for name in options.models if options.fresh else ():
            results.drop(model=name)
        note_machine(results)
        for name in options.models:
            for budget in options.budgets:
                measure(results, name, budget, options)
                render(results, options.out / "arena.md")
    render(results, options.out / "arena.md")
    print(options.out / "arena.md")
    return None


if __name__ == "__main__":
    main()

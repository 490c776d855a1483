"""MEMO's setting, simulated: GPT-7B with long sequences on eight A800 taken as one, 2 TB of host memory.

    python -m memplan.benchmarks.memo
    python -m memplan.benchmarks.memo --sequences 256 1024

Every figure is a prediction of the machine's description (`planner/machines/a800-8x80gb.toml`): a roofline at 75 % of the peak
rate, tensor and sequence parallelism as shapes, communication free, no fragmentation. MFU counts a step's own FLOPs,
attention in full though it is causal, never recomputation. In the same simulator: *joint*, the fastest plan found; *memo*,
MEMO's rule; *full*, every layer recomputed from its input; *offload all*, everything that the backward pass reads is moved.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..planner.ir.errors import InvalidSchedule, MemplanError
from ..planner.ir.machine import load_machine
from ..planner.ir.plan import Side
from ..planner.pipeline.planner import Planner
from ..planner.verbs.session import Session
from ..solvers.remat.memo_rule import find_layers
from ..solvers.remat.problem import EAGER, HOLD, SINCE
from .command import Command
from .models import gpt_7b
from .record import (
    GIB,
    Results,
    Row,
    ask,
    header,
    markdown,
    percent,
    ratio,
    say,
    verdict,
)

MACHINE = "a800-8x80gb"
SEQUENCES = (64, 128, 256, 512, 1024, 1536, 2048)  # thousands of tokens, of 1024
PEAK = 8 * 312e12  # FLOP/s in bfloat16, A800 as A100
MORE_STATE = 8  # bytes a parameter beside bfloat16 weights, gradients and moments: 32-bit weights and moments' other halves
KINDS = ("joint", "memo", "full", "offload all")
PUBLISHED_MFU = 0.523  # 7B, 1M tokens, 8 GPUs (abstract)


def serve(request: Row) -> Iterator[Row]:
    """Plan one sequence length in every way."""
    began = time.monotonic()
    model, args = gpt_7b(request["sequence"] << 10)
    more = MORE_STATE * sum(parameter.numel() for parameter in model.parameters())
    machine = load_machine(MACHINE)
    session = Session(model, args, machine=machine, optimizer="adamw", allow=("reorder", "recompute", "offload"))
    planner = session.planner
    flops = sum(op.flops for op in planner.program.ops)
    room = machine.tiers[0].capacity - more
    common = {"sequence": request["sequence"], "flops": flops, "unplanned": planner.unplanned.peak + more,
              "tracing": time.monotonic() - began}  # fmt: skip
    for kind in KINDS:
        began = time.monotonic()
        row = common | {"kind": kind}
        try:
            side, gap = solved(kind, planner, room, request["time_limit"])
        except MemplanError as error:
            beyond = isinstance(error, InvalidSchedule) and error.rule == "capacity"
            yield row | {"refused": "more than the host has" if beyond else str(error)[:200]}
            continue
        mfu = flops / side.time / PEAK
        yield row | {
            "total": side.peak + more, "fits": side.peak <= room and side.report.peak[1] <= machine.tiers[1].capacity,
            "time": side.time, "mfu": mfu, "host": side.report.peak[1], "recompute": side.report.recompute / side.time,
            "gap": gap, "solving": time.monotonic() - began,
        }  # fmt: skip


def solved(kind: str, planner: Planner, room: int, time_limit: float) -> tuple[Side, float | None]:
    """A schedule of one kind, and the gap of the joint one."""
    if kind == "joint":
        planner.deadline = time.monotonic() + time_limit
        answer = planner.solve(room)
        return answer.found, max(0.0, 1 - answer.bound / answer.found.time)
    if kind == "memo":
        return planner.solve_memo(room).found, None
    if kind == "full":
        return within(planner, full_recomputation(planner), room), None
    alone = dataclasses.replace(planner, recompute=False)
    return within(alone, alone.all_moved(), room), None


def within(planner: Planner, solution: np.ndarray, room: int) -> Side:
    """A solution's schedule, which waits for copies only as the room asks for it; the smallest, if it does not fit."""
    fits = planner.rated(solution, room).solution is not None
    return planner.finish(solution, room if fits else None)


def full_recomputation(planner: Planner) -> np.ndarray:
    """Every layer is run again from its input, just before its backward pass."""
    problem, segments, slots = planner.flat.problem, planner.segments, planner.master.slots
    layers = find_layers(segments)
    solution = problem.keep_all()
    segment = segments.of_buffer[slots.buffer]
    crossing = (slots.before <= problem.boundary) & (slots.at > problem.boundary) & (slots.last == 0)
    for layer in range(layers.count):
        own = layers.segments(layer)
        inside = crossing & (segment >= own.start) & (segment < own.stop)
        inside &= ~((segment == own.stop - 1) & segments.crosses[slots.buffer])
        solution[SINCE, slots.gap[inside]] = segments.opened[own.stop - 1]
        solution[EAGER, slots.gap[inside]] = 1
    kept = segments.crosses & np.isin(segments.of_buffer, [layers.segments(n).start - 1 for n in range(layers.count)])
    held = (slots.last == 1) & kept[slots.buffer]
    following = segments.opened[np.minimum(segment[held] + layers.length, len(segments.opened) - 1)]
    solution[HOLD, slots.gap[held]] = following
    return solution


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("MEMO's setting, simulated", results)
    lines += [*(__doc__ or "").splitlines()[5:], ""]
    lines += [
        f"Machine: {MACHINE}. Totals count {MORE_STATE} bytes a parameter more, for 32-bit weights and moments. Sizes: GiB."
    ]
    lines += [
        "Published: 52.3 % at 1024K tokens, on average 1.97 times Megatron-LM's MFU and 1.80 times DeepSpeed's. What those two"
    ]
    lines += [
        "lose to fragmentation, reorganising memory, communication and uneven work is not simulated, so the column *joint is"
    ]
    lines += ["faster by* compares rules of placing alone.", ""]
    heads = ("tokens", "kind", "total", "fits", "host", "recomputed", "step", "MFU", "joint is faster by", "gap", "solving")
    rows = []
    for sequence in dict.fromkeys(row["sequence"] for row in results.all(task="memo")):
        found = {row["kind"]: row for row in results.all(task="memo", sequence=sequence)}
        joint = found.get("joint", {})
        for kind in KINDS:
            row = found.get(kind, {})
            if "time" not in row:
                rows.append((f"{sequence}K", kind, row.get("refused", "-")[:60], verdict(False), *["-"] * 7))
                continue
            faster = row["time"] / joint["time"] if "time" in joint else None
            rows.append((f"{sequence}K", kind, f"{row['total'] / GIB:.1f}", verdict(row["fits"]), f"{row['host'] / GIB:.0f}",
                         percent(row["recompute"]), f"{row['time']:.2f} s", percent(row["mfu"]), ratio(faster),
                         percent(row["gap"]), f"{row['solving']:.1f} s"))  # fmt: skip
    lines += markdown(heads, rows)
    joint = [row for row in results.all(task="memo", kind="joint") if row.get("fits")]
    if joint:
        longest = max(row["sequence"] for row in joint)
        million = next((row["mfu"] for row in joint if row["sequence"] == 1024), None)
        lines += [
            f"Longest sequence tried that fits: {longest}K tokens (MEMO: 1024K). Predicted MFU at 1024K: {percent(million)};"
        ]
        lines += [f"MEMO measured {percent(PUBLISHED_MFU)}.", ""]
    path.write_text("\n".join(lines).rstrip() + "\n")


def run(results: Results, options: argparse.Namespace) -> None:
    """Every length that is missing."""
    for sequence in options.sequences:
        if results.last(task="memo", sequence=sequence) is None:
            say(f"{sequence}K tokens")
            for row in ask("memo", {"sequence": sequence, "time_limit": options.time_limit}, timeout=options.timeout):
                results.add({"task": "memo"} | row)


def main() -> None:
    """The command line."""
    command = Command("memo", __doc__, run, render, serve)
    command.add("--sequences", type=int, nargs="+", default=list(SEQUENCES), help="thousands of tokens")
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

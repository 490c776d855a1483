"""The longest sequence that a Llama can be trained on, on one GPU: memplan, and what people use today.

    python -m memplan.benchmarks.longest --minutes 15

One sequence through a Llama of 1B or 7B parameters in bfloat16: forward, backward and an AdamW step. For each method the length
is doubled until a step fails and then searched between, each trial in a fresh process; a trial that runs out of memory, or for
which there is no plan, is a row. One that fails otherwise ends the search of its method, for it says nothing of lengths. Rows
are kept as they come: a run that its time limit cut short goes on where it stopped. Methods are those of `cuda.py`. Plans rest
on the roofline: each length has ops of its own, and to measure those would take longer than the steps.
"""

import argparse
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..backends.measure.meters import cuda_environment
from ..planner.cost.local import local_machine
from ..planner.ir.errors import BudgetError
from . import cuda
from .command import Command, without_cuda
from .models import SHAPES
from .record import MIB, Results, Row, ask, header, markdown, mib, paragraph, percent, say

METHODS = (
    "memplan:none", "checkpoint", "memplan-offload:none", "checkpoint-on-cpu", "compile-budget:0", "save-on-cpu", "eager"
)  # fmt: skip
# How the outcomes of sequences that are too long begin; the last is what a host does to a process that takes its memory.
TOO_LONG = (cuda.OUT_OF_MEMORY, BudgetError.__name__, "killed by signal 9")
CLOSE = 1 / 8  # a search is over when the shortest length that fails is this much longer than the longest that does not


def serve(request: Row) -> Iterator[Row]:
    """Answer one trial in this process, with only so much more address space if the request says how much; or the peak rate."""
    if request["task"] == "rate":
        yield {"rate": rate_of(request["device"])}
        return
    if request["room"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + request["room"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    yield from cuda.serve(request)


def next_length(tried: Mapping[int, bool], first: int, step: int) -> int | None:
    """The length to try next, or None where the search is over.

    Args:
        tried: length -> whether a step of it succeeded.
        first: the length to begin with.
        step: lengths are multiples of it.
    """
    longest = max((length for length, good in tried.items() if good), default=0)
    shortest = min((length for length, good in tried.items() if not good), default=0)
    if not tried:
        return first
    if not shortest:
        return 2 * longest
    if shortest - longest <= max(step, CLOSE * longest):
        return None
    return max(step, (longest + shortest) // 2 // step * step)


def search(results: Results, name: str, method: str, end: float, options: argparse.Namespace) -> bool:
    """Try lengths of one model with one method until the longest is found, and say whether there was time for that."""
    while True:
        rows = results.all(task="longest", model=name, method=method)
        if not all(row["outcome"] == "ok" or is_too_long(row["outcome"]) for row in rows):
            return True
        length = next_length({row["seq"]: row["outcome"] == "ok" for row in rows}, options.first, options.step)
        left = end - time.monotonic()
        if length is None or left < 15:
            return length is None
        request: Row = {
            "task": "longest", "model": name, "method": method, "seq": length, "budget": options.room, "room": options.room,
            "scale": 1.0, "device": options.device, "steps": options.steps, "seconds": 60.0, "time_limit": options.time_limit,
            "optimizer": "adamw", "warm_up": 1, "roofline": True,
        }  # fmt: skip
        for row in ask("longest", request, timeout=min(left, options.timeout)):
            why = row.get("failed")
            if why is not None and left < options.timeout and why.startswith("took more than"):
                return False
            row = row if why is None else {"outcome": why}
            results.add(request | row)
            say(f"{name}: {method}: {length} tokens: {row['outcome']}")


def is_too_long(outcome: str) -> bool:
    """Whether a trial failed because its sequence was too long."""
    return outcome.startswith(TOO_LONG)


def flops_of(name: str, length: int) -> float:
    """Of a step without recomputation: six for each token and weight that is multiplied, and attention's below its mask."""
    layers, width, heads, key_heads, inner = SHAPES[name]
    weights = layers * (2 * width * width * (1 + key_heads / heads) + 3 * width * inner) + 32000 * width
    return 6 * weights * length + 6 * layers * width * length**2


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("The longest sequence that fits one GPU", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.longest`. One sequence, bfloat16, AdamW; sizes are MiB. *Fails at*: the "
        "shortest length that was tried and did not fit. MFU counts the operations of a step without recomputation, those of "
        "attention halved for its mask, against the peak rate of the device."
    )
    rate = (results.last(task="rate") or {}).get("rate")
    for name in dict.fromkeys(row["model"] for row in results.all(task="longest")):
        rows = []
        for method in dict.fromkeys(row["method"] for row in results.all(task="longest", model=name)):
            tried = results.all(task="longest", model=name, method=method)
            good = max((row for row in tried if row["outcome"] == "ok"), key=lambda row: row["seq"], default=None)
            bad = min((row for row in tried if row["outcome"] != "ok"), key=lambda row: row["seq"], default=None)
            fails = [f"{bad['seq']}" if bad else "-", bad["outcome"].replace("|", "/")[:60] if bad else "-"]
            if good is None:
                rows.append([method, "none", *["-"] * 5, *fails])
                continue
            share = flops_of(name, good["seq"]) / good["seconds"] / rate if rate else None
            rows.append([method, f"{good['seq']}", f"{good['seconds'] * 1e3:.0f} ms", f"{good['seq'] / good['seconds']:.0f}",
                         percent(share), mib(good["allocated"]), mib(good["reserved"]), *fails])  # fmt: skip
        heads = ("method", "longest", "step", "tokens / s", "MFU", "allocated", "reserved", "fails at", "for")
        lines += [f"## {name}", "", *markdown(heads, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def note_rate(results: Results, device: str) -> None:
    """Keep the device's peak rate in bfloat16. A process of its own asks: what it takes of a GPU, each trial would miss."""
    request = {"task": "rate", "device": device}
    for row in ask("longest", request):
        results.add(request | row)


def rate_of(device: str) -> float:
    """Operations a second, at most, in bfloat16."""
    rates = local_machine(device).units[0].flops
    return rates.get("bfloat16", rates["default"])


def run(results: Results, options: argparse.Namespace) -> Iterator[None]:
    """Every trial that is missing, while there is time."""
    if options.device == "cuda":
        os.environ.update(cuda_environment())  # of the trials
    if results.last(task="rate") is None:
        note_rate(results, options.device)
    end = time.monotonic() + 60 * options.minutes
    for name in options.models:
        for method in options.methods:
            if not search(results, name, method, end, options):
                say("time is up; start again to go on")
                return
            yield


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.first, options.step, options.room = ["llama-tiny"], 2048, 2048, 2048 * MIB
    options.methods, options.steps = ["memplan:none", "checkpoint"], 1


def main() -> None:
    """The command line."""
    small = "a tiny model, in 2 GiB of address space"
    command = Command("longest", __doc__, run, render, serve, quick=quick, small=small, unable=without_cuda)
    command.parser.set_defaults(room=None)
    command.add("--models", nargs="+", default=["llama-1b", "llama-7b"], choices=list(SHAPES), metavar="NAME")
    command.add("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    command.add("--first", type=int, default=16384, help="tokens to begin with")
    command.add("--step", type=int, default=1024, help="lengths are multiples of so many tokens")
    command.add("--minutes", type=float, default=15.0, help="for all of it")
    command.add("--steps", type=int, default=3, help="timed in each trial")
    command.add_limits(planning=30.0, process=300.0)
    command.add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command itself")
    command()


if __name__ == "__main__":
    main()

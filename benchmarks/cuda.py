"""Training steps on one GPU: memplan, and what people use today.

    python -m memplan.benchmarks.cuda --minutes 8

Each method runs in a fresh process: forward, backward and an AdamW step, warmed up, then timed by events. A method that
runs out of memory, or fails otherwise, is a row. Rows are kept as they come, in results/cuda.jsonl; a run that its time
limit cut short goes on where it stopped when it is started again. The methods that matter most come first.

Methods: `eager`; `eager-again`, the same once more, for what differs between two runs of eager says nothing of a method;
`checkpoint` (block by block); `save-on-cpu` (activations in pinned host memory); `checkpoint-on-cpu`
(what checkpointing saves, there); `compile` (inductor); `compile-budget:R` (inductor with PyTorch's
activation_memory_budget); `memplan:BUDGET` (planned, eager's kernels), `memplan-offload:BUDGET` (to pinned host memory
as well), `memplan-arena:BUDGET` (in one arena, gradients too), `memplan-graphs:BUDGET` (that, recorded as CUDA graphs)
and `memplan-compile:BUDGET` (`torch.compile(backend="memplan")`), with a budget as in `memplan.plan`, or `@checkpoint`:
what checkpointing was measured to take.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..backends.eager.graphs import WARM, extra_bytes
from ..backends.measure.meters import cuda_environment
from ..backends.measure.worker import is_lack_of_memory
from ..planner.cost.local import local_machine
from ..planner.ir.machine import Machine
from .command import Command, without_cuda
from .models import GPU, MODELS, SHAPES, build_gpu, checkpointing, llama_shape, on_cpu
from .record import Results, Row, ask, header, markdown, mib, percent, ratio, say

METHODS = (
    "eager", "eager-again", "checkpoint", "memplan:@checkpoint", "memplan:none", "memplan:60%", "memplan-offload:@checkpoint",
    "memplan-arena:60%", "memplan-graphs:60%", "memplan:40%", "memplan-offload:40%", "memplan:80%", "memplan:25%",
    "memplan-offload:25%", "compile", "save-on-cpu", "checkpoint-on-cpu", "memplan-compile:60%", "compile-budget:0.5",
    "compile-budget:0", "compile-budget:1", "compile-budget:0.25", "compile-budget:0.75",
)  # fmt: skip
WARM_UP = 5  # steps, unless the request says how many
GRAPHS = "memplan-graphs"
OUT_OF_MEMORY = "out of memory"
ON_CPU = ("save-on-cpu", "checkpoint-on-cpu")
OPTIONS = {
    "memplan": {},
    "memplan-offload": {"allow": ("reorder", "recompute", "offload")},
    "memplan-arena": {"arena": True, "lend_gradients": True},
    GRAPHS: {"arena": True, "lend_gradients": True},
}  # of memplan.plan


# In the process of one method


def prepare(method: str, model: torch.nn.Module, args: tuple[Any, ...], request: Row) -> tuple[Callable[..., Any], Row]:
    """What to call for a method, and what is known of its plan."""
    kind, _, value = method.partition(":")
    budget: Any = request["budget"]
    if kind in ("eager", "eager-again", "save-on-cpu"):
        return model, {}
    if kind in ("checkpoint", "checkpoint-on-cpu"):
        checkpointing(model, True)
        return model, {}
    if kind in ("compile", "compile-budget"):
        if value:
            import torch._functorch.config as config

            config.activation_memory_budget = float(value)
        return torch.compile(model), {}
    if kind in OPTIONS:
        from ..planner.verbs.plan import plan
        from .planning import facts_of

        options = OPTIONS[kind] | ({"machine": unmeasured(kind, request["device"])} if request.get("roofline") else {})
        made = plan(model, budget, args, optimizer=request["optimizer"], time_limit=request["time_limit"], **options)
        return made.apply(model, cuda_graphs=kind == GRAPHS), {"plan": facts_of(made)}
    if kind == "memplan-compile":
        return torch.compile(model, backend="memplan", options={"budget": budget}), {}
    raise ValueError(f"unknown method {method}")


def unmeasured(kind: str, device: str) -> Machine:
    """The machine at hand, as one that is named: its ops are then planned from the roofline, not run."""
    return local_machine(device, offload="offload" in OPTIONS[kind].get("allow", ()))


def serve(request: Row) -> Iterator[Row]:
    """Measure one method in this process; running out of memory is an answer."""
    try:
        yield measure(request)
    except Exception as error:  # one method's failure is a row, whatever it is
        text = " ".join(str(error).split())
        yield {"outcome": OUT_OF_MEMORY if is_lack_of_memory(error) else f"{type(error).__name__}: {text[:200]}"}


def measure(request: Row) -> Row:
    """Peaks and times of a training step."""
    device, method = request["device"], request["method"]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if "seq" in request:
        model, args = llama_shape(*SHAPES[request["model"]], seq=request["seq"], device=device)
    else:
        model, args = build_gpu(request["model"], device, request["scale"])
    optimizer = None
    if request["optimizer"] is not None:
        fused = True if device == "cuda" else None  # without temporaries, as plans take the name of an optimizer there
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    began = time.perf_counter()
    called, facts = prepare(method, model, args, request)

    def step(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with on_cpu(method in ON_CPU):
            loss = called(*args)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    first_loss = step(0).item()
    first = time.perf_counter() - began
    recorded = method.startswith(GRAPHS)
    warm_up = max(request.get("warm_up", WARM_UP), WARM + 1 if recorded else 0)
    for seed in range(1, warm_up):
        if recorded and seed == WARM:
            begin_peak(device)  # this step is recorded, and takes what later ones use: a replay allocates next to nothing
        step(seed)
    if not recorded:
        begin_peak(device)
    seconds, losses = [], []
    while len(seconds) < request["steps"] and sum(seconds) < request["seconds"]:
        clock = Clock(device)
        losses.append(step(len(seconds)))
        seconds.append(clock.stop())
    median = statistics.median(seconds)
    ordered = sorted(seconds)
    return {
        "outcome": "ok",
        "seconds": median,
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[len(ordered) * 9 // 10],
        "steps": len(seconds),
        "first": first,
        "losses": [first_loss.hex(), *(loss.item().hex() for loss in losses[:3])],
        **peaks(device),
        **facts,
        **({"extra": extra_bytes(called.forward.code)} if recorded else {}),
        **(flops_of(model, args, device) if method == "eager" else {}),
    }


def flops_of(model: torch.nn.Module, args: tuple[Any, ...], device: str) -> Row:
    """Floating-point operations of an eager step, and the peak rate of the device for the model's type."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(*args).backward()
    rate = None
    with contextlib.suppress(Exception):
        rates = local_machine(device).units[0].flops
        rate = rates.get(str(next(model.parameters()).dtype)[6:], rates["default"])
    return {"flops": counter.get_total_flops(), "rate": rate}


class Clock:
    """Seconds since it was made: by events on a GPU."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.began = time.perf_counter()

    def stop(self) -> float:
        """The seconds."""
        if self.device != "cuda":
            return time.perf_counter() - self.began
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def begin_peak(device: str) -> None:
    """Start counting anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> Row:
    """What torch was asked for, allocated and reserved at most, what the driver says is taken, and how often the allocator
    retried; and what of it cuBLAS works in, which no plan counts."""
    if device != "cuda":
        return {"allocated": None, "reserved": None}
    free, total = torch.cuda.mem_get_info()
    known = torch.cuda.memory_stats()
    return {
        "requested": known.get("requested_bytes.all.peak"),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "taken": total - free,
        "retries": known.get("num_alloc_retries", 0),
        "cublas": cublas_workspaces(),
    }


def cublas_workspaces() -> int:
    """Bytes that cuBLAS has got from torch to work in; they are given back."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated()


# The command


def budget_of(results: Results, name: str, method: str) -> int | str | None:
    """The budget in a method's name; what checkpointing took, but for cuBLAS, for `@checkpoint`; and None for `none`.

    Raises:
        LookupError: checkpointing was not measured.
    """
    value = method.partition(":")[2]
    if value == "@checkpoint":
        row = results.last(task="cuda", model=name, method="checkpoint")
        if row is None or not row.get("allocated"):
            raise LookupError
        return row["allocated"] - row.get("cublas", 0)
    return None if value == "none" or not method.startswith("memplan") else value


def run(results: Results, options: argparse.Namespace) -> None:
    """Every method of every model that is missing, while there is time."""
    if options.device == "cuda":
        os.environ.update(cuda_environment())  # of the processes that measure, and of those that they start
    end = time.monotonic() + 60 * options.minutes
    for method in options.methods:
        for name in options.models:
            if results.last(task="cuda", model=name, method=method):
                continue
            left = end - time.monotonic()
            if left < 15:
                say("time is up; start again to go on")
                return
            try:
                budget = budget_of(results, name, method)
            except LookupError:
                say(f"{name}: {method} skipped, for checkpoint has no figure")
                continue
            say(f"{name}: {method}")
            request = {
                "model": name,
                "method": method,
                "budget": budget,
                "device": options.device,
                "steps": options.steps,
                "seconds": options.seconds,
                "scale": options.scale,
                "time_limit": options.time_limit,
                "optimizer": None if options.optimizer == "none" else options.optimizer,
            }
            for row in ask("cuda", request, timeout=min(left, options.timeout)):
                why = row.get("failed")
                if why is not None and not (left < options.timeout and why.startswith("took more than")):
                    row = {"outcome": why}  # its own doing, not that of the time left: not to be tried again
                results.add({"task": "cuda"} | request | row)
                say(f"{name}: {method}: {row.get('outcome', why)}")


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Training steps on one GPU", results)
    lines += [
        "Written by `python -m memplan.benchmarks.cuda --render`. Forward, backward and optimizer step; sizes are MiB.",
        "MFU counts the operations of an eager step against the peak rate of the device: what a method recomputes",
        "counts as time, not as work. *Requested* is what was asked of the allocator, *allocated* that in its blocks, and",
        "*reserved* what it took from the device. For CUDA graphs the step that is recorded counts as well. *Predicted* is",
        "without cuBLAS's workspaces (`cublas` in the rows), which *allocated* has.",
        "",
    ]
    heads = ("method", "budget", "predicted", "requested", "allocated", "reserved", "step", "p10-p90", "time / eager", "MFU",
             "first step", "losses equal")  # fmt: skip
    rows_of: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        if row["task"] == "cuda" and "outcome" in row:
            rows_of.setdefault(row["model"], {})[row["method"]] = row
    for name, found in rows_of.items():
        eager = found.get("eager", {})
        ordered = [*(method for method in METHODS if method in found), *sorted(set(found) - set(METHODS))]
        lines += [f"## {name}", "", *markdown(heads, [cells(found[method], eager) for method in ordered])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def cells(row: Row, eager: Row) -> tuple[str, ...]:
    """One row of the table."""
    if row["outcome"] != "ok":
        return (row["method"], "", "", row["outcome"].replace("|", "/"), *[""] * 8)
    plan, base, rate = row.get("plan", {}), eager.get("seconds"), eager.get("rate")
    mfu = eager["flops"] / row["seconds"] / rate if rate and eager.get("flops") else None
    same = "-" if not eager.get("losses") else "yes" if row["losses"] == eager["losses"] else "no"
    return (
        row["method"], mib(plan.get("budget")) if plan else "", mib(plan.get("peak")) if plan else "",
        mib(row.get("requested")), mib(row["allocated"]), mib(row["reserved"]), f"{row['seconds'] * 1e3:.1f} ms",
        f"{row['p10'] * 1e3:.1f}-{row['p90'] * 1e3:.1f}",
        ratio(row["seconds"] / base if base else None), percent(mfu), f"{row['first']:.1f} s", same,
    )  # fmt: skip


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.steps = ["gpt2:tiny"], 3


def main() -> None:
    """The command line."""
    small = "one tiny model, three steps"
    command = Command("cuda", __doc__, run, render, serve, quick=quick, small=small, unable=without_cuda)
    command.add_models(GPU, [*GPU, *MODELS])
    command.add("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    command.add("--minutes", type=float, default=8.0, help="for all of it")
    command.add("--steps", type=int, default=20, help="timed")
    command.add("--seconds", type=float, default=10.0, help="of timed steps of each method, at most")
    command.add("--scale", type=float, default=1.0, help="multiplies the batches: 0.25 for a small GPU")
    command.add("--optimizer", choices=("adamw", "none"), default="adamw")
    command.add_limits(process=240.0)
    command.add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command itself")
    command()


if __name__ == "__main__":
    main()

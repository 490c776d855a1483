"""One training step on the CPU, measured in a process of its own: its physical peak, its numbers, its time.

    python -m memplan.benchmarks.step gpt2 eager checkpoint torch-budget:0.5 memplan:60% memplan:300MiB

A method is `eager`; `checkpoint`, which recomputes block by block; `torch-budget:R`, PyTorch's
`activation_memory_budget` with the backend `aot_eager_decomp_partition`; or `memplan:BUDGET`, where the budget is as in
`memplan.plan`, `none`, or a plan file.

The peak is what a step adds to the process at its highest, VmHWM after a reset less the resident size before, plus the
bytes of parameters, buffers and inputs. Planning happens in another process, which saves the plan: what planning leaves
behind in the heap would be used again by the step, and not be seen.

Times are compared in rounds: one process holds every method, all on the same parameters, and each round runs each
once, starting with another one each time. The ratio of two methods is the median over the rounds of their ratios. What
else runs on the machine slows neighbours alike; of two processes after one another it would slow one.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.eager.module import recapture
from ..backends.measure.training import Meter, arena_bytes, checksum, tensors
from ..planner.cost.watch import Watch
from ..planner.ir.plan import load
from .models import Made, build, checkpointing
from .record import MIB, Row, answer, ask

LEARNING_RATE = 1e-3
TRAINED_STEPS = 3


# Methods


class Arms:
    """A model with several methods of running it, which share its parameters."""

    def __init__(self, made: Made):
        self.model, self.args = made
        self.captured: Any = None
        self.checkpointed = False

    def called(self, method: str) -> Callable[..., Tensor]:
        """What to call for a method: `eager`, `checkpoint`, `torch-budget:R` or `memplan:FILE`."""
        kind, _, value = method.partition(":")
        if kind in ("eager", "checkpoint"):
            return self.model
        if kind == "torch-budget":
            import torch._functorch.config as config

            config.activation_memory_budget = float(value)
            return torch.compile(self.model, backend="aot_eager_decomp_partition")
        if kind == "memplan":
            return self.planned(value)
        raise SystemExit(f"unknown method {method}: eager, checkpoint, torch-budget:R or memplan:BUDGET")

    def planned(self, file: str) -> nn.Module:
        """The model under a saved plan. All plans of a model share one capture."""
        plan = load(file)
        if self.captured is None:
            self.switch(False)
            self.captured = recapture(plan, self.model, None), plan.program.digest
        captured, digest = self.captured
        if plan.program.digest != digest:
            captured = recapture(plan, self.model, None)
        return dataclasses.replace(plan, captured=captured).apply(self.model)

    def switch(self, on: bool) -> None:
        """Checkpointing on or off."""
        if on != self.checkpointed:
            checkpointing(self.model, on)
            self.checkpointed = on

    def step(self, method: str, called: Callable[..., Tensor], seed: int) -> tuple[float, str]:
        """Forward and backward: the seconds taken, and the loss exactly."""
        self.switch(method == "checkpoint")
        torch.manual_seed(seed)
        began = time.perf_counter()
        loss = called(*self.args)
        loss.backward()
        value = loss.item()
        return time.perf_counter() - began, value.hex()

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    @property
    def fixed(self) -> int:
        """Bytes of parameters, buffers and inputs, shared storages once."""
        resident = [*self.model.parameters(), *self.model.buffers(), *tensors(self.args)]
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in resident}
        return sum(storages.values())


# What a process is asked for


def measure_peak(model: str, method: str, steps: int) -> Row:
    """The physical peak of a step and the numbers that it gives, in this process.

    The peak is of steps without an optimizer. Then some steps of SGD follow, for their numbers: gradients of steps on
    changed parameters, parameters and buffers at the end.
    """
    arms = Arms(build(model))
    began = time.perf_counter()
    called = arms.called(method)
    arms.step(method, called, 0)
    first = time.perf_counter() - began
    arms.clear()
    meter, peaks, times, losses, gradients = Meter("cpu"), [], [], [], []
    for seed in range(1, steps + 1):
        meter.reset()
        seconds, loss = arms.step(method, called, seed)
        peaks.append(meter.peak(arms.fixed + arena_bytes(called)))
        times.append(seconds)
        losses.append(loss)
        gradients.append(checksum(arms.model))
        arms.clear()
    known = [peak for peak in peaks if peak is not None]
    row = {
        "total": max(known, default=None),
        "peaks": peaks,
        "fixed": arms.fixed,
        "seconds": statistics.median(times),
        "first": first,
        "loss": losses[-1],
        "numbers": numbers(losses, gradients),
    }
    optimizer = torch.optim.SGD(arms.model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], []
    for seed in range(TRAINED_STEPS):
        losses.append(arms.step(method, called, 100 + seed)[1])
        gradients.append(checksum(arms.model))
        optimizer.step()
        arms.clear()
    return row | {"trained": numbers(losses, gradients), "state": state_checksum(arms.model)}


def numbers(losses: list[str], gradients: list[str]) -> Row:
    """Losses, exactly, and a checksum of the gradients of all steps."""
    return {"losses": losses, "gradients": hashlib.sha256("".join(gradients).encode()).hexdigest()}


def state_checksum(model: nn.Module) -> str:
    """A hash of the bits of every parameter and buffer."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def measure_times(model: str, methods: list[str], rounds: int) -> Row:
    """The seconds of each method in each round, all in this process."""
    arms = Arms(build(model))
    called = {method: arms.called(method) for method in methods}
    for method in methods:
        for _ in range(2):  # a compiler's first step is not its second
            arms.step(method, called[method], 0)
            arms.clear()

    def once(method: str, number: int) -> float:
        seconds, _ = arms.step(method, called[method], number)
        arms.clear()
        return seconds

    return {"seconds": in_turn(methods, once, rounds)}


def in_turn(arms: Sequence[str], once: Callable[[str, int], float], rounds: int) -> dict[str, list[float]]:
    """The seconds of each arm in each round, each round beginning with another arm.

    A round is repeated, as many times as there are rounds at most, where other work on the machine got in the way of the
    first arm; the others may have threads of their own in each other's way.
    """
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    spare, number = rounds, 0
    while number < rounds:
        gc.collect()
        turn, disturbed = number % len(arms), False
        found = {}
        for arm in [*arms[turn:], *arms[:turn]]:
            with Watch() as watch:
                found[arm] = once(arm, number)
            disturbed |= arm == arms[0] and watch.disturbed
        if disturbed and spare:
            spare -= 1
            continue
        for arm, took in found.items():
            seconds[arm].append(took)
        number += 1
    return seconds


def serve(request: Row) -> Iterator[Row]:
    """Answer a request of `record.ask`."""
    if request["task"] == "peak":
        yield measure_peak(request["model"], request["method"], request["steps"])
    else:
        yield measure_times(request["model"], request["methods"], request["rounds"])


def paired_ratio(seconds: Row, method: str, against: str) -> float | None:
    """The median over the rounds of a method's time over another's; None where one of them was not measured."""
    if not seconds.get(method) or against not in seconds:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(seconds[method], seconds[against], strict=True))


# For people


def run(model: str, methods: list[str], steps: int, rounds: int, time_limit: float) -> Iterator[Row]:
    """Measure each method, planning first where that is needed."""
    with tempfile.TemporaryDirectory() as folder:
        ready = {}
        for method in methods:
            kind, _, budget = method.partition(":")
            if kind == "memplan" and not Path(budget).is_file():
                request = {"model": model, "folder": folder, "time_limit": time_limit, "budgets": {method: budget}}
                (plan,) = ask("planning", request, malloc="returning")
                yield {"model": model, "method": method, **plan}
                if "file" not in plan:
                    continue
                ready[method] = f"memplan:{plan['file']}"
            else:
                ready[method] = method
        for method, prepared in ready.items():
            request = {"task": "peak", "model": model, "method": prepared, "steps": steps}
            for row in ask("step", request, malloc="returning"):
                yield {"model": model, "method": method, **row}
        first = next(iter(ready), None)
        for method, prepared in ready.items() if rounds else ():
            pair = list(dict.fromkeys([ready[str(first)], prepared]))
            request = {"task": "time", "model": model, "methods": pair, "rounds": rounds}
            for row in ask("step", request, malloc="returning"):
                found = paired_ratio(row.get("seconds", {}), prepared, pair[0])
                failed = {"failed": row["failed"]} if "failed" in row else {}
                yield {"model": model, "method": method, "against": first, "ratio": found, **failed}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name in models.py; with :tiny for its tiny version")
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--steps", type=int, default=2, help="measured for the peak")
    parser.add_argument("--rounds", type=int, default=5, help="of the first method and each other; 0: no times")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of planning")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return answer(serve)
    if options.model is None or not options.methods:
        parser.error("name a model and at least one method")
    for row in run(options.model, options.methods, options.steps, options.rounds, options.time_limit):
        shown = {key: value for key, value in row.items() if key not in ("numbers", "trained", "state", "peaks")}
        if isinstance(shown.get("total"), int):
            shown["total_mib"] = round(shown["total"] / MIB, 1)
        print(json.dumps(shown), flush=True)
    return None


if __name__ == "__main__":
    main()

"""The verb: `fit(model, budget, over="batch")`, the largest size that trains within a budget."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...solvers.remat.descent import least_of
from ...solvers.remat.problem import score
from ...solvers.warm import compile_planning
from ..cost.table import coverage
from ..ir.errors import MemplanError
from ..ir.fit import Fit, FitPoint
from ..ir.machine import Machine
from ..ir.plan import Side
from ..ir.schedule import Run, check_levers
from ..ir.units import parse_bytes, shorten
from ..pipeline.peak import modules_at_peak
from ..pipeline.planner import Planner
from .arguments import Progress, check_asked, check_model, check_numbers
from .fitsearch import SHORT, FitSearch
from .levers import estimate, in_one_order, ways_beyond
from .solver import solving
from .steps import LEAST, Make, Steps, leaves_of, resized, takes_sizes

if TYPE_CHECKING:
    from torch import nn

MOST = {"batch": 2**16, "seq": 2**20, "layers": 2**10}  # sizes that are tried where nothing is said
POINTS = 6
ROUNDS = 2  # times that ops are measured at the largest size found
LEVER = 2.0  # seconds for what one lever gives


@solving()
def fit(
    model: "nn.Module | str | Callable[[int], Any]",
    budget: int | str | None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    over: str = "batch",
    start: int | None = None,
    most: int | None = None,
    points: int = POINTS,
    train: bool = True,
    loss: Callable[[Any], Any] | None = None,
    optimizer: Any = None,
    machine: str | Machine | None = None,
    allow: Iterable[str] | None = None,
    time_limit: float = 30.0,
    seed: int = 0,
    host_budget: int | str | None = None,
    optimizer_in_backward: bool = False,
    solver: str | None = None,
    progress: Progress | None = None,
) -> Fit:
    """The largest batch, sequence or depth that trains within a number of bytes.

    It is found without training, and for any machine. The schedule of the largest size has been accepted by the referee; of the
    next one it is said whether it cannot fit, or whether no schedule was found (`Fit.why`).

    Args:
        model: parameters on cpu, cuda or meta; or its name as on the command line, `"hf:gpt2?n_layer=6&seq=256"`; or a function
            from a size to `(model, args)` or `(model, args, kwargs)`, where the model changes with the size.
        budget: bytes of physical peak, everything counted: 17179869184, "16GiB", "16GB"; None for all that the machine has.
        args: example inputs of a module: real, fake or meta tensors; their rows are repeated for other sizes.
        kwargs: likewise.
        over: "batch", "seq" (the length of a sequence) or "layers"; with a function, what the size is called.
        start: the size to begin with; default: that of the example.
        most: the largest size to try; default: 65536 samples, 2^20 tokens, 1024 layers.
        points: how many sizes to plan for, from the smallest to the largest.
        train: as for `plan`, as the others that are not here.
        loss: likewise.
        optimizer: likewise, but by name where `model` is a name or a function: torch's optimizers have parameters.
        machine: likewise.
        allow: likewise.
        time_limit: seconds of search, about: tracing, measuring and a size that has begun come on top.
        seed: likewise.
        host_budget: likewise.
        optimizer_in_backward: likewise.
        solver: likewise.
        progress: is told (stage, fraction of it).

    Raises:
        BudgetError: not even a size of 1 fits; `.minimum` is the smallest budget known to work there.
        CaptureError: the model cannot be traced.
        MachineError: no such machine.
        MemplanError: an argument that makes no sense, a model that has no such size.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> found = memplan.fit(model, "1MiB", (torch.randn(8, 64),), loss=lambda out: out.sum(), machine="h100-80gb")
        >>> found.peak <= found.budget
        True
    """
    check_asked(budget, host_budget, False, False, None)
    limit = None if budget is None else parse_bytes(budget)
    check_numbers(time_limit, seed)
    check_count("points", points)
    for name, size in (("start", start), ("most", most)):
        if size is not None:
            check_count(name, size)
    base, make = made_of(model, args, kwargs, over)
    options = {
        "train": train, "loss": loss, "optimizer": optimizer, "machine": machine, "allow": allow, "time_limit": time_limit,
        "seed": seed, "host_budget": host_budget, "optimizer_in_backward": optimizer_in_backward, "solver": solver,
        "progress": progress,
    }  # fmt: skip
    began = time.monotonic()
    most = most or MOST.get(over, max(MOST.values()))
    base = min(start or base, most)
    if over == "layers":  # from two shallow ones it is known what a layer takes
        base = min(start or LEAST, base)
    steps = Steps(make, base, over, options)
    compile_planning(progress)
    return _Fitting(steps, limit, most, points, time_limit, progress).run(base, began)


def check_count(name: str, count: Any) -> None:
    """Refuse what is no number of things.

    Raises:
        MemplanError: which.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise MemplanError(f"{name}={shorten(count)}: give a whole number, 1 or more")


def made_of(model: Any, args: tuple, kwargs: Mapping[str, Any] | None, over: Any) -> tuple[int, Make]:
    """The size of the example, and the model at any.

    Raises:
        MemplanError: it has no such size.
    """
    from torch import nn

    from ..models.byname import load_model
    from ..models.knobs import KNOBS, knob_of

    if not isinstance(model, nn.Module) and not isinstance(model, str) and callable(model) and takes_sizes(model):
        return LEAST, lambda size: loaded(model(size))
    if over not in KNOBS:
        raise MemplanError(f"over={shorten(over)}: it is {', '.join(KNOBS[:-1])} or {KNOBS[-1]}")
    if isinstance(model, str):
        knob = knob_of(model, over)
        if knob is not None:
            return knob.base, knob.make
        named, (model, args, kwargs) = model, load_model(model, meta=True)
    else:
        named = "a module"
    check_model(model, kwargs)
    if over == "layers":
        raise MemplanError(f"over='layers': {named} has a depth of its own: give a function from a number of layers to "
                           "(model, args)")  # fmt: skip
    module: Any = model
    return resized(module, tuple(args), dict(kwargs or {}), over)


def loaded(made: Any) -> Any:
    """What a user's function returns, with keyword arguments.

    Raises:
        MemplanError: it returns something else.
    """
    parts = (*made, {}) if isinstance(made, tuple) and len(made) == 2 else made
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise MemplanError(
            f"a function from sizes to models returns (model, args) or (model, args, kwargs), not {shorten(made)}"
        )
    return parts


class _Fitting:
    """One question, from the steps to the answer."""

    def __init__(self, steps: Steps, limit: int | None, most: int, points: int, seconds: float, progress: Progress | None):
        self.steps, self.points, self.seconds, self.progress = steps, points, seconds, progress
        self.machine = steps.machine
        capacity = self.machine.tiers[0].capacity
        self.budget = capacity if limit is None else min(limit, capacity)
        self.search = FitSearch(steps, self.budget, most, seconds)

    def run(self, base: int, began: float) -> Fit:
        """The answer."""
        self.tell("looking for the largest size", 0.0)
        largest = self.search.run(base)
        for _ in range(ROUNDS if self.measures else 0):
            self.steps.learn(largest)
            self.search.trials.clear()
            again = self.search.run(largest)
            if again == largest:
                break
            largest = again
        after = self.search.trials[largest + 1]
        why = after.why or "search"
        self.tell("planning for single sizes", 0.0)
        found = list(self.made_points(largest))
        side, step = found[-1][1], self.steps.at(largest)
        rows = [point for point, _ in found]
        if after.side is not None:
            rows.append(self.point(largest + 1, after.side, False))
        self.tell("looking for what levers give", 0.0)
        levers = self.levers(largest + (after.side is not None))
        runs = [each.op for each in side.schedule.instructions if isinstance(each, Run)]
        return Fit(
            name=step.planner.program.name,
            over=self.steps.over,
            budget=self.budget,
            machine=self.machine.name,
            points=tuple(rows),
            why=why,
            beyond=self.search.beyond.get(largest + 1, ""),
            unplanned=self.unplanned(largest),
            levers=levers,
            allowed=frozenset(name for name in levers if self.is_used(name)),
            modules=modules_at_peak(step.planner.program, side),
            unit=self.counted(largest)[1],
            estimated=not coverage(side.program, step.session.table, runs, 0, False).measured,
            traces=self.steps.traces,
            capture_seconds=self.steps.capture_seconds,
            search_seconds=time.monotonic() - began - self.steps.capture_seconds,
        )

    def tell(self, stage: str, done: float) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(stage, done)

    @property
    def measures(self) -> bool:
        """Whether ops can be measured: the model and the machine are here."""
        plans = self.steps.plans
        real = all(value.device.type != "meta" for value in self.steps.model[0].parameters())
        return plans is not None and plans.session.table is not None and real

    def made_points(self, largest: int) -> "list[tuple[FitPoint, Side]]":
        """Sizes up to the largest, planned for: evenly spaced, where they take no traces of their own."""
        count = max(self.points - 1, 1)
        sizes = {1 + (largest - 1) * at // count for at in range(count)} | {LEAST, largest}
        if self.steps.plans is None:
            sizes = {size for size, trial in self.search.trials.items() if trial.fits} | {largest}
        smaller = sorted(size for size in sizes if size < largest and self.steps.is_cheap(size))
        wanted = [*smaller, largest][-self.points :]
        found: dict[int, Side] = {}
        for size in reversed(wanted):  # the largest matters most, and its schedules serve the others
            self.tell("planning for single sizes", len(found) / len(wanted))
            left = self.search.ends - time.monotonic()
            found[size] = self.search.fastest(size, max(left, 2 * SHORT) / 3 if size == largest else left / len(wanted))
        return [(self.point(size, found[size], True), found[size]) for size in wanted]

    def point(self, size: int, side: Side, fits: bool) -> FitPoint:
        """A size's row."""
        count, _ = self.counted(size)
        rate = count / side.time if side.time > 0 else 0.0
        return FitPoint(size, side.peak, side.time, fits, rate, self.unplanned_peak(size))

    def unplanned_peak(self, size: int) -> int:
        """Bytes of the step as eager PyTorch runs it."""
        return Planner(self.steps.program(size), self.machine).unplanned.peak

    def counted(self, size: int) -> tuple[int, str]:
        """How many tokens, or samples, a step takes, and which of the two."""
        tensors = [leaf for leaf in leaves_of(self.steps.make(size)) if hasattr(leaf, "shape")]
        first = tensors[0]
        if not first.is_floating_point() and first.dim() == 2:
            return first.numel(), "tokens"
        return int(first.shape[0]) if first.dim() else 1, "samples"

    def unplanned(self, largest: int) -> int | None:
        """The largest size of two or more whose step fits as eager PyTorch runs it, up to the largest planned; 0 for none."""
        if self.steps.plans is None:
            return None
        low, high = LEAST - 1, largest + 1
        while high - low > 1:
            size = (low + high) // 2
            fits = self.steps.is_cheap(size) and self.unplanned_peak(size) <= self.budget
            low, high = (size, high) if fits else (low, size)
        return low if low >= LEAST else 0

    # --- levers

    def is_used(self, name: str) -> bool:
        """Whether a lever was allowed."""
        return name in check_levers(self.steps.options["allow"])

    def levers(self, size: int) -> dict[str, int]:
        """Bytes that each lever takes off at a size."""
        step = self.steps.at(size)
        planner, traced = step.planner, step.session.captured.traced
        trial = self.search.trials.get(size)
        known: list[int] = [side.peak for side in self.search.replays(size, None)]
        known.append(self.floor(in_one_order(planner, traced)))
        if trial is not None and trial.side is not None:
            known.append(trial.side.peak)
        now = min(known)
        ways = ways_beyond(planner, traced, step.session.captured.counted, self.machine.device)
        found = {name: now - self.floor(in_one_order(way(planner), traced)) for name, way in ways.items()}
        for name in sorted(step.session.allowed):
            without = dataclasses.replace(planner, **{name: False}, homes=() if name == "offload" else planner.homes)
            found[name] = self.floor(in_one_order(without, traced)) - now
        return {name: max(0, size) for name, size in found.items()}

    def floor(self, planner: Planner) -> int:
        """Bytes of the smallest schedule found without much search: by rules, by linear relaxations, by a few rounds."""
        planner.deadline = time.monotonic() + min(LEVER, self.seconds / 20)
        if not planner.recompute and not planner.moves:
            return planner.kept.peak
        problem, peaks = planner.flat.problem, [estimate(planner)]
        if planner.recompute and not planner.homes:
            least = max(least_of(problem), self.budget // 2)
            targets = [self.budget, (least + self.budget) // 2]
            while targets and targets[0] < min(peaks) and time.monotonic() < planner.deadline:
                target = targets.pop(0)
                peaks += [score(problem, each, 0).peak for each in planner.search.starts(target)]
        _ = planner.search.smallest
        return min(*peaks, estimate(planner))

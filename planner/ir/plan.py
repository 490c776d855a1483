"""`Plan`: what `plan()` returns. A schedule the referee has accepted, with the program and machine it was made for."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .coverage import Coverage
from .errors import PlanMismatch
from .files import write_file
from .machine import Machine
from .program import Program
from .referee import Report, referee
from .schedule import Run, Schedule, Start
from .summary import one_line, summary
from .units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from torch import nn

    from ...backends.eager.witness import Seen
    from ..capture.capture import Captured

FORMAT = 1


class Made(msgspec.Struct, frozen=True):
    """What an optimizer makes for one parameter, found out by a step of it.

    Attributes:
        states: bytes of each state tensor of the parameter's shape, in the order in which the optimizer makes them.
        others: bytes of all other state.
        temporaries: most bytes that a step has made at once and frees again.
        left: bytes of them that are there until those of the next parameter are made.
        traffic: bytes that a step reads and writes.
        flops: beside what is as fast as that.
    """

    states: tuple[int, ...]
    others: int
    temporaries: int
    left: int
    traffic: int
    flops: float = 0.0


class Kept(msgspec.Struct, frozen=True):
    """An optimizer's figures: those of its class, per parameter's size, or, found out by a step, per parameter.

    Attributes:
        name: of its class, in small letters.
        states: tensors of the parameter's size that it keeps for each.
        temporaries: such tensors that a step makes and frees again.
        together: whether a step makes those of all parameters at once.
        passes: how often a step reads or writes such a tensor.
        left: such tensors of a parameter that are there until those of the next one are made.
        made: figures found out by steps; then those above per size say nothing.
        which: for each parameter's name the index of its figures in `made`.
    """

    name: str
    states: int
    temporaries: int
    together: bool
    passes: int
    left: int = 0
    made: tuple[Made, ...] = ()
    which: dict[str, int] = {}

    def workspace_of(self, sizes: Mapping[str, int]) -> int:
        """Bytes that a step allocates and frees for parameters, given each one's name and bytes."""
        if not self.made:
            return self.workspace(sizes.values())
        figures = [self.made[self.which[name]] for name in sizes]
        if self.together:
            return sum(each.temporaries for each in figures)
        most = max((each.temporaries for each in figures), default=0)
        return most + sum(sorted((each.left for each in figures), reverse=True)[:1] if len(figures) > 1 else [])

    def traffic_of(self, sizes: Mapping[str, int]) -> int:
        """Bytes that a step reads and writes for parameters, given each one's name and bytes."""
        return sum(self.made[self.which[name]].traffic if self.made else self.passes * size for name, size in sizes.items())

    def flops_of(self, sizes: Mapping[str, int]) -> float:
        """FLOPs of matrix products in a step for parameters, given each one's name and bytes."""
        return sum(self.made[self.which[name]].flops for name in sizes) if self.made else 0.0

    def workspace(self, sizes: Iterable[int]) -> int:
        """Bytes that a step allocates and frees for parameters of these sizes."""
        largest = sorted(sizes, reverse=True)
        if self.together or not largest:
            return self.temporaries * sum(largest)
        return self.temporaries * largest[0] + sum(self.left * size for size in largest[1:2])


class Counted(msgspec.Struct, frozen=True):
    """What a plan keeps of a torch optimizer: its figures, and the names of the parameters that it updates."""

    kept: Kept
    trainable: tuple[str, ...]


class Varying(msgspec.Struct, frozen=True):
    """A size of a call's tensors that varies.

    Attributes:
        leaf: the argument.
        dim: which of its dimensions.
        name: of the size; equal names are equal sizes.
        least: it may be.
        most: it may be; None for no bound.
    """

    leaf: str
    dim: int
    name: str
    least: int = 0
    most: int | None = None


def dynamic_of(sizes: Iterable[Varying]) -> dict[int | str, dict[int, str]] | None:
    """Sizes that vary, as `planner.capture.capture.capture` takes them; None for none."""
    found: dict[int | str, dict[int, str]] = {}
    for size in sizes:
        found.setdefault(size.leaf, {})[size.dim] = size.name
    return found or None


class Recipe(msgspec.Struct, frozen=True):
    """How the program was captured, so that a loaded plan can be applied: see `planner.capture.capture.recapture`.

    Attributes:
        inputs: a JSON description of the example inputs (shapes, types and how they are nested).
        train: whether the program holds a backward pass.
        loss: the loss was the caller's own function, which a file cannot carry.
        optimizer: the name of the optimizer counted in, or None.
        counted: what was counted of it, where it was an optimizer and not only its name.
        gap: of a mapping, how far the bytes that it moves are above a bound on them, as a share.
        in_backward: the step runs the optimizer's updates itself.
        mapped: ops are joined for a scratchpad, whose machine runs the schedule (`planner/verbs/map.py`).
        accumulate: gradients are added to those that are there, one at a time.
        calls: how many calls come before one backward pass.
        reserved: bytes of the budget that are left to others.
        sizes: that vary from call to call.
    """

    inputs: str
    train: bool
    loss: bool
    optimizer: str | None
    in_backward: bool = False
    mapped: bool = False
    counted: Counted | None = None
    gap: float | None = None
    accumulate: bool = False
    calls: int = 1
    reserved: int = 0
    sizes: tuple[Varying, ...] = ()

    @property
    def missing(self) -> str:
        """What of the inputs a file cannot hold; empty where it holds them all."""
        try:
            return msgspec.json.decode(self.inputs, type=Missing).missing
        except msgspec.MsgspecError:  # not memplan's: applying the plan tells
            return ""


class Missing(msgspec.Struct, frozen=True):
    """The part of a description of inputs that says what could not be described."""

    missing: str = ""


class Counts(msgspec.Struct, frozen=True):
    """What the backward pass reads of the forward pass, by what the plan does with it; the sum is how many buffers that is."""

    keep: int
    recompute: int
    offload: int


@dataclass(frozen=True, repr=False)
class Side:
    """One schedule's figures: peak bytes and seconds, as the referee predicts them.

    Attributes:
        program: what is scheduled; for the unplanned step, the program as eager PyTorch runs it.
        schedule: of that program.
        report: the referee's.
    """

    program: Program
    schedule: Schedule
    report: Report

    def __repr__(self) -> str:
        what = f"{show_count(len(self.schedule.instructions), 'instruction')} for {self.program.name}"
        return f"<memplan.Side: {what}, peak {show_bytes(self.peak)}, {show_seconds(self.time)}>"

    @property
    def peak(self) -> int:
        """Largest number of bytes live on the device."""
        return self.report.peak[0]

    @property
    def time(self) -> float:
        """Seconds a step takes."""
        return self.report.time


@dataclass(frozen=True, repr=False)
class Plan:
    """A schedule that fits a budget.

    Attributes:
        program: the step.
        machine: what it was planned for.
        budget: bytes allowed; None where none was asked for.
        planned: the schedule and what the referee says of it.
        unplanned: the same for the step as eager PyTorch runs it.
        status: `optimal` when `gap` is zero: nothing better is possible; else `feasible`: it fits, and may not be the best.
        gap: how much faster than this plan the best schedule can be at most: `(time - bound) / time`; of a mapping onto a
            scratchpad, how many fewer bytes it can move.
        bound: a lower bound on the time of any schedule within the budget.
        minimum: the smallest budget known to work.
        capture_seconds: time spent tracing.
        solve_seconds: time spent planning.
        compile_seconds: time spent before that on compiling the solvers, or on loading what was compiled before.
        coverage: how much of the predicted time was measured, on what and when; None where that is not known, as of a plan
            that an older memplan saved.
        eager_peak: bytes at the peak of the step as the model is written, in eager mode. It is above the unplanned schedule's
            where variables of the model's code outlive their use, and below it where the model itself checkpoints. None of
            an inference, where the caller computes the loss, and in a plan that an older memplan saved.
        seen: what the steps of its planned modules have had beside the budget: see `memplan.backends.eager.witness`.
    """

    program: Program
    machine: Machine
    budget: int | None
    planned: Side
    unplanned: Side
    status: Literal["optimal", "feasible"]
    gap: float
    bound: float
    minimum: int
    capture_seconds: float
    solve_seconds: float
    recipe: Recipe
    compile_seconds: float = 0.0
    coverage: Coverage | None = None
    eager_peak: int | None = None
    captured: "Captured | None" = field(default=None, repr=False, compare=False)
    seen: "list[Seen]" = field(default_factory=list, repr=False, compare=False)

    @property
    def schedule(self) -> Schedule:
        """The planned schedule."""
        return self.planned.schedule

    @property
    def peak(self) -> int:
        """Predicted peak of device memory in bytes, everything counted."""
        return self.planned.peak

    @property
    def time(self) -> float:
        """Predicted seconds of a step."""
        return self.planned.time

    @property
    def counts(self) -> Counts:
        """How many activations are kept, recomputed, offloaded: moved, for a value that is both."""
        again, seen, moved = set(), set(), set()
        for step in self.schedule.instructions:
            if isinstance(step, Start) and self.program.producer[step.buffer] >= 0:
                moved.add(step.buffer)
            elif isinstance(step, Run):
                again.update(buffer for buffer in step.keep if buffer in seen)
                seen.update(step.keep)
        program = self.program
        late = [op for op in program.ops[program.boundary :]]
        used = {buffer for op in late for buffer in op.reads if 0 <= program.producer[buffer] < program.boundary}
        again, moved = again & used, moved & used
        return Counts(keep=len(used - again - moved), recompute=len(again - moved), offload=len(moved))

    @property
    def moved(self) -> dict[str, int]:
        """Bytes that a step carries over each link, by `source to target`; links that carry nothing are left out."""
        links = zip(self.machine.links, self.planned.report.moved, strict=True)
        return {f"{link.source} to {link.target}": size for link, size in links if size}

    def summary(self) -> str:
        """Some lines for people: peak and time beside the unplanned ones, the budget, and how good the plan is."""
        return summary(self)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return one_line(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: program, machine, schedule, and how to capture the model again.

        Raises:
            OSError: the file cannot be written, as on a full disk; a plan that was there is as it was.
        """
        if self.recipe.missing:
            warnings.warn(f"{path} cannot be applied by another process: {self.recipe.missing}, which no file can hold",
                          stacklevel=2)  # fmt: skip
        body = PlanBody(
            program=self.program,
            machine=self.machine,
            recipe=self.recipe,
            budget=self.budget,
            planned=self.planned.schedule,
            unplanned=self.unplanned.schedule,
            bound=self.bound,
            minimum=self.minimum,
            capture_seconds=self.capture_seconds,
            solve_seconds=self.solve_seconds,
            compile_seconds=self.compile_seconds,
            coverage=self.coverage,
            eager_peak=self.eager_peak,
        )
        raw = msgspec.json.encode(body)
        head = msgspec.json.encode({"format": FORMAT, "sha256": hashlib.sha256(raw).hexdigest()})
        write_file(path, head[:-1] + b',"plan":' + raw + b"}\n")

    @property
    def arena(self) -> int:
        """Bytes of the arena that the step runs in, where addresses have been planned, else 0."""
        sizes = self.program.buffers
        return max(
            (place.offset + sizes[place.buffer].bytes for place in self.schedule.placements if not place.tier), default=0
        )

    def apply(self, model: "nn.Module", loss: Any = None, optimizer: Any = None, cuda_graphs: bool = False) -> "nn.Module":
        """The planned model: same call, same numbers, same parameters.

        Args:
            model: the model the plan was made for, or one of the same structure.
            loss: the loss function, for a plan that was made with one and then loaded from a file.
            optimizer: the torch optimizer whose updates the planned step runs, for a plan with `optimizer_in_backward`.
            cuda_graphs: record the step's kernels once and replay them, for a plan with `arena` on a GPU. Inputs and outputs,
                and gradients that are not lent, are then there twice.

        Raises:
            PlanMismatch: the model does not trace to the plan's program.
        """
        from ...backends.eager.module import apply

        return apply(self, model, loss, optimizer, cuda_graphs)


class PlanBody(msgspec.Struct, frozen=True):
    """The part of a plan file that its checksum covers."""

    program: Program
    machine: Machine
    recipe: Recipe
    budget: int | None
    planned: Schedule
    unplanned: Schedule
    bound: float
    minimum: int
    capture_seconds: float
    solve_seconds: float
    compile_seconds: float = 0.0
    coverage: Coverage | None = None
    eager_peak: int | None = None


def load(path: str | Path) -> Plan:
    """Read a plan that `Plan.save` wrote, and have the referee check it again.

    Raises:
        PlanMismatch: not a plan file, truncated, changed since it was written, or of another version.
        InvalidSchedule: the schedule in it breaks a rule.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise PlanMismatch(f"cannot read {path}: {error.strerror}") from None
    try:
        outer = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        version = msgspec.json.decode(outer["format"])
        if version != FORMAT:
            raise PlanMismatch(f"{path} has format {version!r}, this memplan reads {FORMAT}: plan again, or upgrade memplan")
        raw = bytes(outer["plan"])
        if msgspec.json.decode(outer["sha256"]) != hashlib.sha256(raw).hexdigest():
            raise PlanMismatch(f"{path} has been changed since memplan wrote it: plan again")
        body = msgspec.json.decode(raw, type=PlanBody)
        body.program.verify()
        body.machine.verify()
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PlanMismatch(f"{path} is not a plan, or only a part of one: {error}") from None
    eager = as_eager(body.program)
    planned = Side(body.program, body.planned, referee(body.program, body.machine, body.planned, body.budget))
    unplanned = Side(eager, body.unplanned, referee(eager, unlimited(body.machine), body.unplanned))
    check_figures(path, body, planned)
    return assemble(body, planned, unplanned)


def check_figures(path: str | Path, body: PlanBody, planned: Side) -> None:
    """Refuse figures that cannot be, of those that the referee does not look at.

    Raises:
        PlanMismatch: which.
    """
    gap = body.recipe.gap
    wrong = {
        "bound": not 0 <= body.bound <= planned.time * (1 + 1e-9),
        "minimum": not 0 <= body.minimum <= planned.peak,
        "gap": gap is not None and not 0 <= gap <= 1,
        "capture_seconds": not 0 <= body.capture_seconds < float("inf"),
        "solve_seconds": not 0 <= body.solve_seconds < float("inf"),
        "compile_seconds": not 0 <= body.compile_seconds < float("inf"),
        "eager_peak": body.eager_peak is not None and body.eager_peak < 0,
        "coverage": body.coverage is not None and not body.coverage.is_sound,
    }
    for name in [name for name, is_wrong in wrong.items() if is_wrong]:
        raise PlanMismatch(f"{path} has a {name} that its schedule contradicts: plan again")


def assemble(body: PlanBody, planned: Side, unplanned: Side, captured: "Captured | None" = None) -> Plan:
    """A plan from its parts; status and gap follow from time and bound, or are those of a mapping's bytes."""
    gap = max(0.0, (planned.time - body.bound) / planned.time) if planned.time > 0 else 0.0
    gap = gap if body.recipe.gap is None else body.recipe.gap
    return Plan(
        program=body.program,
        machine=body.machine,
        budget=body.budget,
        planned=planned,
        unplanned=unplanned,
        status="optimal" if gap < 1e-6 else "feasible",
        gap=gap,
        bound=body.bound,
        minimum=body.minimum,
        capture_seconds=body.capture_seconds,
        solve_seconds=body.solve_seconds,
        recipe=body.recipe,
        compile_seconds=body.compile_seconds,
        coverage=body.coverage,
        eager_peak=body.eager_peak,
        captured=captured,
    )


def as_eager(program: Program) -> Program:
    """The program as eager PyTorch runs it, where that differs.

    Dropout on a CPU: eager keeps a mask of the input's type, and that is all it allocates (ATen, Dropout.cpp: only fused
    kernels, which the CPU lacks, take a bool mask). The captured operator, `native_dropout`, draws the same numbers, makes
    such a mask on the way, and keeps one byte an element.
    """
    if program.device != "cpu":
        return program
    buffers, ops = list(program.buffers), list(program.ops)
    for index, op in enumerate(ops):
        if op.target == "aten.native_dropout.default" and len(op.writes) == 2:
            result, mask = op.writes
            buffers[mask] = msgspec.structs.replace(buffers[mask], bytes=buffers[result].bytes)
            ops[index] = msgspec.structs.replace(op, workspace=0)
    return msgspec.structs.replace(program, buffers=tuple(buffers), ops=tuple(ops))


def unlimited(machine: Machine) -> Machine:
    """The same machine with a first tier that holds anything: what the unplanned step is replayed on."""
    first = msgspec.structs.replace(machine.tiers[0], capacity=2**62)
    return msgspec.structs.replace(machine, tiers=(first, *machine.tiers[1:]))

"""`Plan`: what `plan()` returns. A schedule the referee has accepted, with the program and machine it was made for."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .errors import PlanMismatch
from .machine import Machine
from .program import Program
from .referee import Report, referee
from .schedule import Run, Schedule, Start
from .units import show_bytes, show_seconds

if TYPE_CHECKING:
    from torch import nn

    from ..backends.witness import Seen
    from .capture import Captured

FORMAT = 1


class Kept(msgspec.Struct, frozen=True):
    """An optimizer's figures.

    Attributes:
        name: `sgd`, `adam` or `adamw`.
        states: tensors of the parameter's size that it keeps for each.
        temporaries: such tensors that a step makes and frees again.
        together: whether a step makes those of all parameters at once.
        passes: how often a step reads or writes such a tensor.
        left: such tensors of a parameter that are there until those of the next one are made.
    """

    name: str
    states: int
    temporaries: int
    together: bool
    passes: int
    left: int = 0

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


class Recipe(msgspec.Struct, frozen=True):
    """How the program was captured, so that a loaded plan can be applied: see `planner.capture.recapture`.

    Attributes:
        inputs: a JSON description of the example inputs (shapes, types and how they are nested).
        train: whether the program holds a backward pass.
        loss: the loss was the caller's own function, which a file cannot carry.
        optimizer: the name of the optimizer counted in, or None.
        counted: what was counted of it, where it was an optimizer and not only its name.
        gap: of a mapping, how far the bytes that it moves are above a bound on them, as a share.
        in_backward: the step runs the optimizer's updates itself.
        mapped: ops are joined for a scratchpad, whose machine runs the schedule (`planner/maps.py`).
    """

    inputs: str
    train: bool
    loss: bool
    optimizer: str | None
    in_backward: bool = False
    mapped: bool = False
    counted: Counted | None = None
    gap: float | None = None


class Counts(msgspec.Struct, frozen=True):
    """What the backward pass reads of the forward pass, by what the plan does with it; the sum is how many buffers that is."""

    keep: int
    recompute: int
    offload: int


@dataclass(frozen=True)
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

    @property
    def peak(self) -> int:
        """Largest number of bytes live on the device."""
        return self.report.peak[0]

    @property
    def time(self) -> float:
        """Seconds a step takes."""
        return self.report.time


@dataclass(frozen=True)
class Plan:
    """A schedule that fits a budget.

    Attributes:
        program: the step.
        machine: what it was planned for.
        budget: bytes allowed; None where none was asked for.
        planned: the schedule and what the referee says of it.
        unplanned: the same for the step as eager PyTorch runs it.
        status: `optimal` when `gap` is zero, else `feasible`.
        gap: how much faster than this plan the best schedule can be at most: `(time - bound) / time`; of a mapping onto a
            scratchpad, how many fewer bytes it can move.
        bound: a lower bound on the time of any schedule within the budget.
        minimum: the smallest budget known to work.
        capture_seconds: time spent tracing.
        solve_seconds: time spent planning.
        seen: what the steps of its planned modules have had beside the budget: see `memplan.backends.witness`.
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
        """A few lines for people."""
        rows = [
            ("", "planned", "unplanned"),
            ("peak", show_bytes(self.peak), show_bytes(self.unplanned.peak)),
            ("step time (predicted)", show_seconds(self.time), show_seconds(self.unplanned.time)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts, mapped = self.counts, self.recipe.mapped
        asked = "none" if self.budget is None else show_bytes(self.budget)
        lines += [
            f"budget {asked} on {self.machine.name}; smallest known to work {show_bytes(self.minimum)}",
            f"{self.status}, within {self.gap:.1%} of the {'fewest bytes' if mapped else 'fastest'} possible; "
            + (f"{counts.keep} activations kept, {counts.recompute} recomputed, " if not mapped else "")
            + f"{counts.offload} moved",
            f"traced in {self.capture_seconds:.1f} s, solved in {self.solve_seconds:.1f} s; "
            f"{len(self.program.ops)} ops, {len(self.program.buffers)} buffers",
        ]
        if self.moved:
            lines.append("moved in a step: " + ", ".join(f"{show_bytes(size)} {link}" for link, size in self.moved.items()))
        if self.schedule.homes:
            away = sum(self.program.buffers[buffer].bytes for buffer, _ in self.schedule.homes)
            where = " and ".join(sorted({self.machine.tiers[tier].name for _, tier in self.schedule.homes}))
            what = "inputs and outputs" if mapped else "parameters and optimizer state"
            lines.append(f"between their uses {show_bytes(away)} of {what} are on {where}")
        if self.arena:
            beside = f" and {len(self.schedule.outside)} short-lived results" if self.schedule.outside else ""
            most = "other gradients, outputs" if self.schedule.lent else "gradients, outputs"
            rest = "" if mapped else f"; {most}{beside} lie outside it"
            lines.append(f"addresses planned: one arena of {show_bytes(self.arena)}{rest}")
        if self.schedule.lent:
            lines.append(f"{len(self.schedule.lent)} gradients lie in the arena: drop them before the next forward pass")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: program, machine, schedule, and how to capture the model again."""
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
        )
        raw = msgspec.json.encode(body)
        head = msgspec.json.encode({"format": FORMAT, "sha256": hashlib.sha256(raw).hexdigest()})
        Path(path).write_bytes(head[:-1] + b',"plan":' + raw + b"}\n")

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
        from ..backends.eager import apply

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

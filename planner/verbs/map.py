"""`memplan.map_model`: a model's inference onto a scratchpad, end to end; and what `memplan map` prints of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...solvers.scratchpad.problem import with_capacity
from ...solvers.scratchpad.replacement import baselines
from ...solvers.scratchpad.spm import smallest_peak_order
from ..cost.table import apply_costs
from ..ir.errors import BudgetError, MemplanError
from ..ir.machine import Machine, load_machine
from ..ir.plan import Plan, PlanBody, Recipe, Side, assemble
from ..ir.units import parse_bytes, show_bytes, show_count, show_seconds
from ..pipeline.mapping import SIZES, Mapper
from ..pipeline.mapping import Mapping as Mapped
from ..pipeline.planner import Planner
from .solver import check_solver, solving

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ...backends.scratchpad.machine import Assembly, Counted
    from ..capture.capture import Captured

BITS = (8, 16, 32)


@dataclass
class MappedModel:
    """A model mapped onto a scratchpad.

    Attributes:
        mapper: that planned it, and plans it for other sizes.
        mapping: schedule, addresses and figures.
        captured: the inference.
        model: whose parameters a run reads; on meta it can be planned and not run.
        capture_seconds: spent tracing.
        counted: what the last run came to.
    """

    mapper: Mapper
    mapping: Mapped
    captured: "Captured"
    model: "nn.Module"
    capture_seconds: float
    counted: "Counted | None" = None

    def __post_init__(self) -> None:
        from ...backends.scratchpad.machine import Scratchpad

        self.machine = Scratchpad(self.model, self.captured, self.mapping)  # made now: it will know if the model has changed

    @cached_property
    def baselines(self) -> dict[str, int | None]:
        """Bytes beyond the compulsory ones of each rule in `scratchpad/replacement.py`; None where it finds no addresses."""
        problem = with_capacity(self.mapper.problem, self.mapping.capacity)
        orders = {"default": range(len(problem.reads)), "peak": smallest_peak_order(problem)}
        return baselines(problem, orders)

    @property
    def plan(self) -> Plan:
        """The same as a plan, which `memplan show` and `memplan check` read; unplanned, everything is in the scratchpad.

        Its gap and status are of the bytes that it moves; its bound is of its time, and is what the ops alone take.
        """
        from ..capture.inputtext import describe_inputs

        found, program = self.mapping, self.mapping.fused.program
        unplanned = Planner(program, found.machine).unplanned
        body = PlanBody(
            program=program,
            machine=found.machine,
            recipe=Recipe(
                describe_inputs(self.captured), train=False, loss=False, optimizer=None, mapped=True, gap=max(0.0, found.gap)
            ),
            budget=found.capacity,
            planned=found.schedule,
            unplanned=unplanned.schedule,
            bound=min(sum(op.seconds for op in program.ops), found.report.time),
            minimum=found.report.peak[0],
            capture_seconds=self.capture_seconds,
            solve_seconds=found.seconds,
        )
        return assemble(body, Side(program, found.schedule, found.report), unplanned)

    @property
    def assembly(self) -> "Assembly":
        """The program for the scratchpad machine."""
        from ...backends.scratchpad.machine import assemble

        return assemble(self.mapping)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed on exactly the scratchpad's bytes (`backends/scratchpad/machine.py`).

        Raises:
            PlanMismatch: the call is another than the one that was mapped (shapes, types, nesting, plain values), or the model
                has changed since in more than its parameters' values; the message names what.
        """
        result = self.machine.run(*args, **kwargs)
        self.counted = self.machine.counted
        return result

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        found, report = self.mapping, self.mapping.report
        program = found.fused.program
        return {
            "scratchpad": found.capacity,
            "compulsory": found.compulsory,
            "noncompulsory": found.noncompulsory,
            "lower_bound": found.bound,
            "status": "optimal" if found.noncompulsory <= found.bound else "feasible",
            "gap": found.gap,
            "seconds": found.seconds,
            "baselines": self.baselines,
            "sizes": self.mapper.landmarks,
            "peak": report.peak[0],
            "moved": dict(zip([f"{link.source}->{link.target}" for link in found.machine.links], report.moved, strict=True)),
            "time": report.time,
            "compute_time": sum(op.seconds for op in program.ops),
            "least_time": found.least_time,
            "repeated": report.repeated,
            "recompute_time": report.recompute,
            "machine": found.machine.name,
            "ops": len(program.ops),
            "buffers": len(program.buffers),
            "capture_seconds": self.capture_seconds,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """For people: what, the figure, and what to say of it."""
        found = self.mapping
        proven = f"at least {show_bytes(found.bound)}" if found.bound else "not proven fewest"
        proven = "proven fewest" if found.noncompulsory <= found.bound else proven
        known = [size for size in self.baselines.values() if size is not None]
        best = f"best of {len(known)} rules {show_bytes(min(known))}" if known else "no rule finds addresses"
        sizes = ", ".join(f"{name} {show_bytes(self.mapper.landmarks[name])}" for name in ("M_R", "M_P"))
        compute = sum(op.seconds for op in found.fused.program.ops)
        spent, repeated = show_seconds(found.report.recompute), found.report.repeated
        again = f", and {spent} more for {show_count(repeated, 'op')} run again" if repeated else ""
        return [
            ("scratchpad", show_bytes(found.capacity), sizes),
            ("peak", show_bytes(found.report.peak[0]), show_count(len(found.fused.program.ops), "op")),
            ("compulsory", show_bytes(found.compulsory), "inputs once in, outputs once out"),
            ("moved beside that", show_bytes(found.noncompulsory), f"{proven}; {best}"),
            ("time (predicted)", show_seconds(found.report.time), f"computing {show_seconds(compute)}{again}"),
            ("solved in", show_seconds(found.seconds), ""),
        ]

    def save_picture(self, path: "Path") -> None:
        """Addresses over time, as rectangles."""
        from ...backends.report.pictures import packing, save

        mine = [place for place in self.mapping.schedule.placements if not place.tier]
        size = [self.mapping.fused.program.buffers[place.buffer].bytes for place in mine]
        title, capacity = f"{self.captured.program.name}, scratchpad", self.mapping.capacity
        spans, offsets = [[(place.lower, place.upper)] for place in mine], [place.offset for place in mine]
        save(packing(title, spans, size, offsets, None, capacity), path)


@solving()
def map_model(
    model: "nn.Module",
    scratchpad: int | str,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    machine: str | Machine = "scratchpad",
    weights: bool = False,
    bits: int | None = None,
    prefetch: bool = True,
    recompute: bool = False,
    time_limit: float = 60.0,
    seed: int = 0,
    solver: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> MappedModel:
    """Map an inference onto an accelerator whose scratchpad software manages.

    Order, residency and addresses are chosen so that the fewest bytes beyond the compulsory ones cross between the scratchpad
    and the memory behind it (COSMA, arXiv 2311.18246).

    Args:
        model: in evaluation mode; its parameters on the CPU or on meta.
        scratchpad: bytes (1048576, "1MiB"), or COSMA's sizes: "M_R", the largest op's operands and results; "M_P", the smallest
            peak of any order; "M_H", halfway between.
        args: example inputs.
        kwargs: more of them.
        machine: a preset's name, a TOML path or a Machine with a memory behind its first tier.
        weights: whether parameters take room in the scratchpad, or reach the unit by a way of their own.
        bits: of every element; None for the model's own types. Mappings for other sizes than the model's cannot be run.
        prefetch: start loads as early as there is room.
        recompute: let ops run again where that spares bytes, which COSMA does not; no bound is known of such mappings.
        time_limit: seconds of search.
        seed: of the search.
        solver: of what stays in the scratchpad in an order of the ops: "highs", "cbc", "scip", "gurobi" or "cplex", if it is
            installed; default: CP-SAT, which takes less time, and which decides all else in any case.
        progress: is told (stage, share done).

    Returns:
        The mapping, accepted by the referee; `.run(*args)` carries it out.

    Raises:
        BudgetError: an op alone needs more than the scratchpad; the message names it, `.minimum` is what it needs.
        CaptureError: the model cannot be traced.
        MemplanError: the model is in training mode and changes its buffers.
        MachineError: no such machine, or one without a memory behind its first tier.
    """
    check_scratchpad(scratchpad)
    return MapSession(
        model, args, kwargs, machine=machine, weights=weights, bits=bits, prefetch=prefetch, recompute=recompute, seed=seed,
        solver=solver, progress=progress,
    ).map(scratchpad, time_limit)  # fmt: skip


class MapSession:
    """One inference captured once, to be mapped onto scratchpads of any size. The arguments are those of `map_model`."""

    def __init__(
        self,
        model: "nn.Module",
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        machine: str | Machine = "scratchpad",
        weights: bool = False,
        bits: int | None = None,
        prefetch: bool = True,
        recompute: bool = False,
        seed: int = 0,
        solver: str | None = None,
        progress: Callable[[str, float], None] | None = None,
    ):
        check_bits(bits)
        check_solver(solver)
        known = machine if isinstance(machine, Machine) else load_machine(machine)
        from ..capture.capture import capture

        self.model, self.tell = model, progress or (lambda stage, share: None)
        self.tell("tracing the model", 0.0)
        began = time.monotonic()
        self.captured = capture(
            model,
            args,
            dict(kwargs or {}),
            train=False,
            loss=None,
            optimizer=None,
            in_backward=False,
            device=None,
            runs_on=None,
        )
        self.capture_seconds = time.monotonic() - began
        check_captured(self.captured)
        program, base = apply_costs(self.captured.program, known), self.captured.traced.base
        width = [node.meta["val"].element_size() for _, node in sorted(base.items())]
        sizes, alignment = None, max(width, default=1)
        if bits is not None:
            sizes = tuple(buffer.bytes // size * bits // 8 for buffer, size in zip(program.buffers, width, strict=True))
            alignment = bits // 8
        self.mapper = Mapper(program, known, weights, sizes, prefetch, recompute, seed, alignment, solver)

    def map(self, scratchpad: int | str, time_limit: float) -> MappedModel:
        """The mapping onto one scratchpad."""
        self.tell("mapping", 0.0)
        mapping = self.mapper.map(self.mapper.capacity_of(scratchpad), time_limit)
        return MappedModel(self.mapper, mapping, self.captured, self.model, self.capture_seconds)


def check_bits(bits: int | None) -> None:
    """Refuse widths of elements that no mapping is made for.

    Raises:
        MemplanError: which there are.
    """
    if bits not in (None, *BITS):
        raise MemplanError(f"bits={bits}: choose from {', '.join(map(str, BITS))}, or leave it out for the model's own types")


def check_captured(captured: "Captured") -> None:
    """Refuse an inference that leaves something behind, which its mapping would not.

    Raises:
        MemplanError: what, and what to do.
    """
    if captured.traced.mutations:
        raise MemplanError("the model changes its own buffers when it is called: put it in evaluation mode, model.eval()")
    for row in captured.observed:
        raise MemplanError(f"{row.whose.told} looks on, and an inference on a scratchpad calls no hooks: remove it")
    if captured.stored:
        name = next(iter(captured.stored.values()))
        raise MemplanError(
            f"the model stores a tensor in {name} when it is called, which its mapping does not: return it instead"
        )


def check_scratchpad(scratchpad: int | str) -> None:
    """Refuse what is no size of a scratchpad, before anything is traced.

    Raises:
        BudgetError: what to give.
    """
    if scratchpad in SIZES:
        return
    try:
        parse_bytes(scratchpad, what="scratchpad")
    except BudgetError:
        raise BudgetError(
            f"scratchpad={scratchpad!r}: give bytes, as 1048576 or '1MiB', or one of {', '.join(SIZES)}"
        ) from None


def compared(made: MappedModel, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A run on the scratchpad machine, its outputs beside the model's own."""
    import torch
    from torch.utils import _pytree as pytree

    found = made.run(*args, **kwargs)
    with torch.no_grad():
        wanted = made.model(*args, **kwargs)
    pairs = [(one, other) for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
             if isinstance(other, torch.Tensor)]  # fmt: skip
    assert made.counted is not None
    return {
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "difference": max((float((one.double() - other.double()).abs().max()) for one, other in pairs), default=0.0),
        "counted": made.counted.loaded + made.counted.stored,
        "counted_time": made.counted.time,
    }

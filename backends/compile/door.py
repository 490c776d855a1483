"""The `torch.compile` door: `torch.compile(model, backend="memplan", options={"budget": "16GiB"})`.

Dynamo cuts a model at its graph breaks and hands over the pieces one by one. A piece is traced and planned when it is
first called, with the real arguments before us: so sizes are known, storages can be told apart, and every new shape
gets a plan of its own. AOTAutograd wires it up (aliases, mutated inputs); the partition is a memplan schedule.

What runs depends on the option `inner`:

    eager       the generated code that `Plan.apply` runs: eager's kernels, the schedule to the letter, the same numbers
    inductor    two graphs in the schedule's order, recomputation written out, compiled by Inductor. What is saved and
                what is recomputed is the plan's; temporaries inside are Inductor's, random ops are never repeated, and
                the peak is a prediction without a guarantee

Pieces share one budget, kept in a `Ledger` (see there for the rule) that belongs to the `options` object of one
`torch.compile` call. What a piece may take:

    it ends the model's call    all that is left
    more may follow             keeps everything if that takes at most half of what is left, else as little as it can
    second step and later       all pieces are known: between their least and their most, by one common share, the
                                largest found that satisfies the rule

With "offload" among the option `allow`, and inner="eager", activations may also lie in the tiers behind the device; each
piece has space of its own there.

A run that cannot be made to fit raises `BudgetError` naming the piece. Guaranteed, for inner="eager": the referee's peak of
each run, plus what it knows the others to hold and the gradients that are there, is within the budget, but in a first step
of its kind, where that is told (see `Ledger`). A loss that the caller computes from what the last piece returns is taken to
need as much again as that. Not known here, and not counted: parameters that no piece has seen yet, optimizer state, and what
the code between pieces allocates. A budget in percent is each piece's own: that share of its unplanned peak, whatever the
others hold. After `torch._dynamo.config.recompile_limit` recompilations Dynamo runs the model without us.

Of the shapes that a piece is called with, the `KEPT` used last keep their code.
"""

import os
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...planner.capture.calls import autocast_state
from ...planner.ir.errors import BudgetError, CaptureError, MemplanWarning
from ...planner.ir.family import Sizes
from ...planner.ir.machine import Machine
from ...planner.ir.plan import Side
from ...planner.ir.units import parse_bytes, show_bytes
from ...planner.pipeline.calls import solve_calls, together
from ...planner.pipeline.planner import Planner
from ...solvers.warm import compile_planning
from ..eager.together import Together
from ..eager.witness import NOT_USERS, users_level
from .compilation import Code
from .identity import Arguments, likeness, tensor_source
from .ledger import Ledger, Options, Room, Visit, ledger_of, storages
from .numbers import values_of, with_numbers, wrapped
from .sized import SizedTrace, Varying
from .small import burden, small_schedules, smallest
from .weight import left_bytes, loss_bytes

EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")
KEPT = 16  # shapes of a piece whose code is kept
FORMS = 8  # kinds of its calls whose sizes vary
APART = "call backward() after each call for eager's very bits"
TRIES = 2  # traces for every size that may turn out not to be the piece's


def memplan(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls for each piece of a model.

    Args:
        gm: the piece.
        example_inputs: not looked at: the piece is planned at its first call.
        options: see `Options`. One object is one budget.

    Raises:
        MemplanError: an option that is unknown or makes no sense. A call of the result raises `BudgetError` or
            `CaptureError`.
    """
    return torch._dynamo.disable(Piece(gm, ledger_of(options)), reason="memplan has planned it")


# Pieces


class Piece:
    """A part of a model between two graph breaks, and the code made for the shapes it was called with last.

    Attributes:
        codes: by what a plan depends on in a call.
        varying: which sizes of its arguments vary.
        traces: for every size, by what calls of all sizes have in common.
        alone: of the same, sizes and code that were traced alone, to compare the first with.
        failures: traces for every size that could not be used.
        together: says where several runs in one backward pass have other last bits than eager's.
    """

    def __init__(self, gm: fx.GraphModule, ledger: Ledger):
        self.number = ledger.number(self)
        reason = getattr(gm, "compile_subgraph_reason", None)
        self.gm = gm
        self.ledger = ledger
        self.breaks = bool(getattr(reason, "graph_break", False))
        self.name = f"piece {self.number}{where_it_ends(reason)}"
        self.lifted = dict(gm.named_parameters(remove_duplicate=False)) | dict(gm.named_buffers(remove_duplicate=False))
        self.sources = [tensor_source(node) for node in gm.graph.nodes if node.op == "placeholder"]
        self.numbers = wrapped(gm.graph)
        self.codes: OrderedDict[Any, Code] = OrderedDict()
        self.varying = Varying(gm.graph)
        self.traces: OrderedDict[Any, SizedTrace] = OrderedDict()
        self.alone: OrderedDict[Any, tuple[Sizes, Code]] = OrderedDict()
        self.failures = 0
        self.together: Together | None = None

    def __call__(self, *args: Any) -> Any:
        """Run, planning first where there is no plan for such arguments, or where it does not fit what is left."""
        ledger = self.ledger
        tensors = [value for value in (*self.lifted.values(), *args) if isinstance(value, torch.Tensor)]
        device = next((value.device.type for value in tensors if value.device.type != "cpu"), "cpu")
        machine = ledger.machine(device)
        inputs = storages(tensors, machine.tiers[0].rounding)
        ledger.enter([value for value in tensors if isinstance(value, nn.Parameter)], inputs)
        budget = ledger.budget(machine)
        room = ledger.room(inputs, budget) if budget is not None else None
        code = self.code_of(args, machine, room)
        self.together = self.together or Together(code.backward.traced, APART)
        visit = Visit(code, inputs, ledger.gradients(), self.together)
        if ledger.options.budget is not None and torch.is_grad_enabled():
            ledger.look(code, self.name, tensors)
        result = code.run(args, visit)
        visit.watch(result, ledger)
        ledger.step.append(visit)
        if visit.holding:
            ledger.holding.append(visit)
        return result

    def code_of(self, args: Sequence[Any], machine: Machine, room: Room | None) -> Code:
        """What runs a call: made where there is none for such arguments, or where it does not fit what is left.

        Raises:
            BudgetError: none fits.
            CaptureError: the piece cannot be compiled.
        """
        device = machine.device
        numbers = tuple(values_of(args, self.numbers).values())
        alike = likeness(args)
        state = torch.is_grad_enabled(), autocast_state(device), torch.is_autocast_cache_enabled(), numbers
        key = *state, alike
        code, ends = self.codes.pop(key, None), self.ends_the_call()

        def chosen(planner: Planner) -> Side:
            return self.choose(planner, room, ends and not self.ledger.cautious)

        if code is None:
            code = self.new(args, machine, (state, alike), chosen, ends)
        else:
            side = code.side
            if code.wanted is not side and (room is None or self.need(code.wanted) <= room.of(code.program)):
                side = code.wanted
            elif room is not None and (self.need(side) > room.of(code.program) or code.weight.left > room.later):
                side = chosen(code.planner)
            if side.schedule.instructions != code.side.schedule.instructions:
                code = self.again(code, args, machine, side, ends)
        while len(self.codes) >= KEPT:
            self.codes.popitem(last=False)
        self.codes[key] = code
        return code

    def again(self, code: Code, args: Sequence[Any], machine: Machine, side: Side, ends: bool) -> Code:
        """The code of another schedule."""
        if code.trace is not None:
            return code.trace.code_for(code.planner, side)
        return Code.make(self, args, machine, lambda planner: side, code.planner, ends)

    def new(
        self, args: Sequence[Any], machine: Machine, facts: tuple[Any, Any], chosen: Callable[[Planner], Side], ends: bool
    ) -> Code:
        """The code of a call that none is known for: of every size, where sizes vary and the piece has been traced before."""
        sizes, (state, alike) = self.varying.sizes(args), facts
        if sizes is None or not self.varying.alone(alike) or not self.ledger.traces_sizes:
            return Code.make(self, args, machine, chosen, None, ends)
        form = state, self.varying.form(alike)
        trace = self.traces.get(form) or self.trace(form, sizes, args, machine, ends)
        if trace is not None and trace.holds(sizes):
            planner = trace.planner(sizes)
            return trace.code_for(planner, chosen(planner))
        code = Code.make(self, args, machine, chosen, None, ends)
        self.alone[form] = sizes, code
        limit(self.alone, FORMS)
        return code

    def trace(self, form: Any, sizes: Sizes, args: Sequence[Any], machine: Machine, ends: bool) -> SizedTrace | None:
        """A trace for every size, if there is one of other sizes to compare it with; None where it cannot be used."""
        known, code = self.alone.get(form, (sizes, None))
        if code is None or known == sizes or self.failures >= TRIES:
            return None
        try:
            trace = Code.of_every_size(self, args, machine, code, known, ends)
        except CaptureError as error:
            self.failures += 1
            if self.failures == TRIES:
                warnings.warn(f"each shape of {self.name} is traced and planned by itself, which takes seconds: {error}",
                              MemplanWarning, stacklevel=users_level())  # fmt: skip
            return None
        self.traces[form] = trace
        limit(self.traces, FORMS)
        del self.alone[form]
        return trace

    def arguments(self, args: Sequence[Any]) -> Arguments:
        """What the tensors of a call are."""
        return Arguments.of(self.lifted, self.sources, args)

    def graph(self, args: Sequence[Any]) -> fx.GraphModule:
        """The piece as it is traced for a call."""
        return with_numbers(self.gm, values_of(args, self.numbers))

    def ends_the_call(self) -> bool:
        """Whether the model's call ends with this piece, as far as Dynamo and the stack of calls tell."""
        return not self.breaks and ends_the_call()

    def need(self, side: Side) -> int:
        """Bytes that a run takes at its peak, with the copies of a backward pass that keeps its graph."""
        return together(side, 1 + self.ledger.retains) + self.ledger.retains * loss_bytes(side.program)

    def choose(self, planner: Planner, room: Room | None, last: bool) -> Side:
        """The schedule for a run: see the module's rule.

        Raises:
            BudgetError: none fits what is left of the budget.
        """
        compile_planning()
        planner.deadline = time.monotonic() + self.ledger.options.time_limit
        if room is None:
            capacity = planner.machine.tiers[0].capacity
            return planner.solve(min(parse_bytes(self.ledger.options.budget or 0, of=planner.unplanned.peak), capacity)).found
        resident, now = planner.program.resident_bytes, room.of(planner.program)
        try:
            short = left_bytes(planner.program) - room.later
            if short > 0:
                raise BudgetError(f"the gradients of {self.name} do not fit beside what the pieces before it need: "
                                  f"{short} bytes are missing", now + short)  # fmt: skip
            if last:
                outside = self.ledger.retains * loss_bytes(planner.program)
                return solve_calls(planner, now - outside, 1 + self.ledger.retains).found
            if self.need(planner.kept) <= resident + (now - resident) // 2:
                return planner.kept
            fitting = [side for side in small_schedules(planner) if self.need(side) <= now]
            if not fitting:
                raise planner.refuse(now, planner.floor)
            return min(fitting, key=lambda side: burden(planner.program, side))
        except BudgetError as error:
            least = smallest(planner)
            if least.peak <= now + room.held and self.ledger.excess(self.name, room):
                return least
            if not room.held:
                raise
            minimum = None if error.minimum is None else error.minimum + room.held
            held = f"{show_bytes(room.held)} ({room.held} bytes)"
            raise BudgetError(f"{error}; gradients, and other pieces of the model, which take as little as they can, hold "
                              f"{held} of the budget", minimum) from None  # fmt: skip


def limit(known: OrderedDict[Any, Any], count: int) -> None:
    """Drop what was put in first."""
    while len(known) > count:
        known.popitem(last=False)


def ends_the_call() -> bool:
    """Whether the frame that runs is the compiled function's own, or a continuation of it after a graph break.

    Where Dynamo gives a frame up, it compiles the functions called from it one by one, and none of them is the last.
    """
    frame = sys._getframe(1)
    user: list[str] = []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith(EVAL_FRAME) and user:
            break
        if not path.startswith(NOT_USERS):
            user.append(frame.f_code.co_name)
        frame = frame.f_back
    return all(name.startswith("torch_dynamo_resume_in_") for name in user[:-1])


def where_it_ends(reason: Any) -> str:
    """` (up to file:line)`, where Dynamo says so."""
    frames = getattr(reason, "user_stack", None) or []
    return f" (up to {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""


__all__ = ["Ledger", "Options", "Piece", "memplan"]

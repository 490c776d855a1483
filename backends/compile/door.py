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
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...planner.capture.calls import autocast_state
from ...planner.ir.errors import BudgetError
from ...planner.ir.machine import Machine
from ...planner.ir.plan import Side
from ...planner.ir.units import parse_bytes, show_bytes
from ...planner.pipeline.calls import solve_calls, together
from ...planner.pipeline.planner import Planner
from ...solvers.warm import compile_planning
from ..eager.witness import NOT_USERS
from .compilation import Code
from .identity import Arguments, likeness, tensor_source
from .ledger import Ledger, Options, Room, Visit, ledger_of, storages
from .numbers import values_of, with_numbers, wrapped
from .small import burden, small_schedules, smallest
from .weight import left_bytes, loss_bytes

EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")
KEPT = 16  # shapes of a piece whose code is kept


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
    """A part of a model between two graph breaks, and the code made for the shapes it was called with last."""

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
        visit = Visit(code, inputs, ledger.gradients())
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
        caches = torch.is_autocast_cache_enabled()
        key = (torch.is_grad_enabled(), autocast_state(device), caches, likeness(args), numbers)
        code, ends = self.codes.pop(key, None), self.ends_the_call()

        def chosen(planner: Planner) -> Side:
            return self.choose(planner, room, ends and not self.ledger.cautious)

        if code is None:
            code = Code.make(self, args, machine, chosen, None, ends)
        else:
            side = code.side
            if code.wanted is not side and (room is None or self.need(code.wanted) <= room.now):
                side = code.wanted
            elif room is not None and (self.need(side) > room.now or code.weight.left > room.later):
                side = chosen(code.planner)
            if side.schedule.instructions != code.side.schedule.instructions:
                code = Code.make(self, args, machine, lambda planner: side, code.planner, ends)
        while len(self.codes) >= KEPT:
            self.codes.popitem(last=False)
        self.codes[key] = code
        return code

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
        resident = planner.program.resident_bytes
        try:
            short = left_bytes(planner.program) - room.later
            if short > 0:
                raise BudgetError(f"the gradients of {self.name} do not fit beside what the pieces before it need: "
                                  f"{short} bytes are missing", room.now + short)  # fmt: skip
            if last:
                outside = self.ledger.retains * loss_bytes(planner.program)
                return solve_calls(planner, room.now - outside, 1 + self.ledger.retains).found
            if self.need(planner.kept) <= resident + (room.now - resident) // 2:
                return planner.kept
            fitting = [side for side in small_schedules(planner) if self.need(side) <= room.now]
            if not fitting:
                raise planner.refuse(room.now, planner.floor)
            return min(fitting, key=lambda side: burden(planner.program, side))
        except BudgetError as error:
            least = smallest(planner)
            if least.peak <= room.now + room.held and self.ledger.excess(self.name, room):
                return least
            if not room.held:
                raise
            minimum = None if error.minimum is None else error.minimum + room.held
            held = f"{show_bytes(room.held)} ({room.held} bytes)"
            raise BudgetError(f"{error}; gradients, and other pieces of the model, which take as little as they can, hold "
                              f"{held} of the budget", minimum) from None  # fmt: skip


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

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

A run that cannot be made to fit raises `BudgetError` naming the piece, and the pieces before it take as little as they
can from then on. Guaranteed, for inner="eager": the referee's peak of each run, plus what it knows the others to hold,
is within the budget. Not known here, and not counted: parameters that no piece has seen yet, optimizer state, gradients
left from an earlier step, and what the code between pieces allocates (the loss, if it is computed outside). A budget in
percent is each piece's own: that share of its unplanned peak, whatever the others hold. After
`torch._dynamo.config.recompile_limit` recompilations Dynamo runs the model without us.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...planner.capture.calls import autocast_state
from ...planner.ir.errors import BudgetError
from ...planner.ir.plan import Side
from ...planner.ir.units import parse_bytes, show_bytes
from ...planner.pipeline.planner import Planner
from ...solvers.warm import compile_planning
from ..eager.witness import NOT_USERS
from .compilation import Code
from .identity import Arguments, likeness, tensor_source
from .ledger import Ledger, Options, Room, Visit, burden, ledger_of, left_bytes, small_schedules, storages

EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")


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
    """A part of a model between two graph breaks, and the code made for each shape it was called with."""

    def __init__(self, gm: fx.GraphModule, ledger: Ledger):
        ledger.pieces += 1
        reason = getattr(gm, "compile_subgraph_reason", None)
        self.gm = gm
        self.ledger = ledger
        self.breaks = bool(getattr(reason, "graph_break", False))
        self.name = f"piece {ledger.pieces}{where_it_ends(reason)}"
        self.lifted = dict(gm.named_parameters(remove_duplicate=False)) | dict(gm.named_buffers(remove_duplicate=False))
        self.sources = [tensor_source(node) for node in gm.graph.nodes if node.op == "placeholder"]
        self.codes: dict[Any, Code] = {}

    def __call__(self, *args: Any) -> Any:
        """Run, planning first where there is no plan for such arguments, or where it does not fit what is left."""
        ledger = self.ledger
        tensors = [value for value in (*self.lifted.values(), *args) if isinstance(value, torch.Tensor)]
        device = next((value.device.type for value in tensors if value.device.type != "cpu"), "cpu")
        machine = ledger.machine(device)
        inputs = storages(tensors, machine.tiers[0].rounding)
        ledger.enter()
        budget = ledger.budget(machine)
        room = ledger.room(inputs, budget) if budget is not None else None
        key = (torch.is_grad_enabled(), autocast_state(device), torch.is_autocast_cache_enabled(), likeness(args))
        code = self.codes.get(key)
        if code is None:
            last = self.is_last()
            code = Code.make(self, args, machine, lambda planner: self.choose(planner, room, last), None)
        elif code.wanted is not code.side and (room is None or code.wanted.peak <= room.now):
            wanted = code.wanted
            code = Code.make(self, args, machine, lambda planner: wanted, code.planner)
        elif room is not None and (code.side.peak > room.now or code.left > room.later):
            last = self.is_last()
            code = Code.make(self, args, machine, lambda planner: self.choose(planner, room, last), code.planner)
        self.codes[key] = code
        visit = Visit(code, inputs)
        kept = [value.untyped_storage() for value in tensors if isinstance(value, nn.Parameter)]
        ledger.parameters |= {place._cdata: (StorageWeakRef(place), inputs[place._cdata]) for place in kept}
        if ledger.options.budget is not None and torch.is_grad_enabled():
            ledger.look(code, self.name, tensors)
        result = code.run(args, visit)
        visit.watch(result, ledger.witness)
        ledger.step.append(visit)
        if visit.holding:
            ledger.holding.append(visit)
        return result

    def arguments(self, args: Sequence[Any]) -> Arguments:
        """What the tensors of a call are."""
        return Arguments.of(self.lifted, self.sources, args)

    def is_last(self) -> bool:
        """Whether the model's call ends with this piece, as far as Dynamo and the stack of calls tell."""
        return not self.breaks and not self.ledger.cautious and ends_the_call()

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
                return planner.solve(room.now).found
            if planner.kept.peak <= resident + (room.now - resident) // 2:
                return planner.kept
            fitting = [side for side in small_schedules(planner) if side.peak <= room.now]
            if not fitting:
                raise planner.refuse(room.now, planner.floor)
            return min(fitting, key=lambda side: burden(planner.program, side))
        except BudgetError as error:
            if not room.held:
                raise
            self.ledger.refuse()
            minimum = None if error.minimum is None else error.minimum + room.held
            held = f"{show_bytes(room.held)} ({room.held} bytes)"
            raise BudgetError(f"{error}; other pieces of the model hold {held} of the budget "
                              "and take as little as they can from the next call on", minimum) from None  # fmt: skip


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

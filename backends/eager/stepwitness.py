"""Watches the steps of one planned module: what is beside their budget, and whether they run at all.

A tool may put another `forward` in the planned one's place. Whether that calls the planned one cannot be seen from outside;
but if a gradient then reaches a parameter and no planned step has run backward, it did not. One parameter has a hook that
looks. As long as `forward` is the planned one, gradients that come otherwise are nobody's concern: the model that was planned
shares its parameters, and may be trained as it is.
"""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...passes.liveness import held_bytes
from ...planner.ir.errors import UnplannedWarning
from .witness import Seen, Witness

if TYPE_CHECKING:
    from ...planner.ir.plan import Plan


class Forward(Protocol):
    """A planned forward, which says whose it is."""

    module: torch.nn.Module


class Mark:
    """One forward pass whose backward pass is to come; it lives as long as what that needs.

    Attributes:
        held: bytes that the step holds in between.
    """

    __slots__ = ("__weakref__", "held")

    def __init__(self, held: int):
        self.held = held


class StepWitness(Witness):
    """The witness of one planned module.

    Attributes:
        held: bytes that a step holds between its passes.
        outside: the caller computes the loss.
        calls: how many calls before one backward pass were planned for.
        peak: bytes of the step at its peak, where that is asked for.
        retains: a backward pass was asked to keep its graph.
        marks: forward passes whose backward pass is to come.
        came: a planned step has run backward, and the watched parameter's gradient has not been accumulated since.
    """

    def __init__(self, budget: int | str | None, held: int, outside: bool, seen: list[Seen], calls: int = 1):
        super().__init__(budget, seen)
        self.calls = calls
        self.peak = 0
        self.retains = False
        self.held = held
        self.outside = outside
        self.marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self.came = False

    @staticmethod
    def of(plan: "Plan") -> "StepWitness":
        """The witness of a plan's steps."""
        held = held_bytes(plan.program, plan.schedule)
        return StepWitness(plan.budget, held, plan.recipe.loss, plan.seen, plan.recipe.calls)

    def anew(self) -> "StepWitness":
        """The witness of a copy."""
        return StepWitness(self.budget, self.held, self.outside, self.seen, self.calls)

    def begin(self, parameters: Iterable[torch.Tensor], alone: bool) -> None:
        """A training step is about to begin; `alone` if it refuses to begin before an earlier one has ended."""
        if self.budget is None:
            return
        self.gradients(parameters)
        self.buckets()
        if len(self.marks) >= self.calls and not alone:  # a step alone in its arena, or with its homes, refuses a second itself
            self.pending(self.held)

    def mark(self) -> Mark:
        """A forward pass begins."""
        made = Mark(self.held)
        self.marks.add(made)
        return made

    def backward(self, mark: Mark, retained: bool) -> None:
        """A planned backward pass begins; `retained` if there may be another one."""
        if not retained:
            self.marks.discard(mark)
        self.came = True
        if self.budget is not None and retained:
            between = " and what the graph between it and the loss has" if self.outside else ""
            self.retained(self.held, f"what the planned step has saved{between}")

    def watch(self, runner: "Forward", name: str, parameter: Any) -> None:
        """Have a parameter's gradients looked at: has a planned step made them?

        Args:
            runner: the planned forward; not kept alive by this.
            name: the parameter's.
            parameter: one whose gradient the planned step makes.
        """
        module, known = weakref.ref(runner.module), weakref.ref(runner)  # who replaces `forward` drops the runner

        def arrived(reached: torch.Tensor) -> None:
            planned = module()
            if planned is not None:
                self.arrived(planned, known(), name)

        arrived.of_memplan = True  # type: ignore[attr-defined]
        handle = parameter.register_post_accumulate_grad_hook(arrived)
        weakref.finalize(runner.module, handle.remove).atexit = False

    def arrived(self, module: torch.nn.Module, runner: "Forward | None", name: str) -> None:
        """A gradient has been accumulated into the watched parameter of a planned module."""
        came, self.came = self.came, False
        found = vars(module).get("forward")
        if came or (found is not None and found is runner) or "unplanned" in self.said:
            return
        instead = "nothing" if found is None else told(found)
        self.say("unplanned", 0, f"a gradient reached {name} without the planned step: the planned module's forward has been "
                 f"replaced by {instead}, which does not call the planned one, so no budget is kept; apply the plan after the "
                 "tool has made its changes, or have what replaces forward call it", UnplannedWarning)  # fmt: skip


class Beside(StepWitness):
    """The witness of one of several plans that a module's calls choose from, each for what lies beside it.

    Attributes:
        main: the module's own, which is told that a planned step has run.
        peak: of the plan, in bytes.
    """

    def __init__(self, budget: int, held: int, peak: int, main: StepWitness):
        super().__init__(budget, held, True, main.seen)
        self.main, self.peak, self.said = main, peak, main.said

    def begin(self, parameters: Iterable[torch.Tensor], alone: bool) -> None:
        """A training step is about to begin: gradients and other calls have been reckoned with."""
        self.buckets()

    def backward(self, mark: Mark, retained: bool) -> None:
        """A planned backward pass begins."""
        super().backward(mark, retained)
        self.main.came = True
        self.main.retains |= retained


def told(function: Any) -> str:
    """What to call a function: its module and name."""
    inner = getattr(function, "__func__", function)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{getattr(inner, '__module__', None) or type(inner).__module__}.{name}"


__all__ = ["Beside", "StepWitness"]

"""Gradients added to those that are there while a planned backward pass runs, one at a time, as autograd's own nodes would.

Autograd would run the node that accumulates a parameter's gradient behind the planned step. This does its work where the
schedule says, and looks first whether it would have been run: not by `torch.autograd.grad`, nor for a parameter that
`backward(inputs=...)` leaves out. Where somebody listens (hooks on a parameter's gradient, DistributedDataParallel), the
gradient goes to autograd as it always did.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...planner.capture.accumulate import handed_over
from ...planner.capture.graph import Traced
from ...planner.ir.errors import MemplanError
from .witness import active_wrapper, backward_number


class Pass(threading.local):
    """What one backward pass of a step needs to know; it begins and ends in one thread.

    Attributes:
        values: the parameters, by name, as the forward pass had them.
        added: of them, those whose gradients are added here.
        absent: those that no gradient reaches.
        returned: gradients that autograd is to have.
        number: which of autograd's passes it is part of.
        earlier: parameters that had a gradient before that began.
        sums: terms added up so far of gradients that are to be whole before they are added or returned, and how many.
    """

    def __init__(self) -> None:
        self.values: Mapping[str, torch.Tensor] = {}
        self.added: frozenset[str] = frozenset()
        self.absent: frozenset[str] = frozenset()
        self.returned: dict[str, torch.Tensor] = {}
        self.number = -1
        self.earlier: frozenset[str] = frozenset()
        self.sums: dict[str, tuple[torch.Tensor, int]] = {}


class Accumulation:
    """Adds to the gradients of parameters; takes the place of `updates.Updates` in generated code.

    Attributes:
        rows: for each op the parameters, by name, whose gradients it adds.
        terms: how many terms each gradient has.
        owned: those whose gradients may be kept as they are made.
        now: the backward pass under way in this thread.
        done: always 0: a step that fails leaves gradients half added, as eager's does.
        begun: likewise.
    """

    done = begun = 0

    def __init__(self, traced: Traced):
        self.rows = {op: [name for name, _ in pairs] for op, pairs in traced.updates.items()}
        self.terms = Counter(name for row in self.rows.values() for name in row)
        self.owned = handed_over(traced)
        self.now = Pass()

    def begin(self) -> None:
        """A step starts."""

    def listen(self, values: Mapping[str, torch.Tensor], nodes: Mapping[str, Any], absent: Iterable[str]) -> None:
        """A backward pass begins.

        Args:
            values: the parameters.
            nodes: of each the node of autograd that its gradient would go to.
            absent: parameters that no gradient reaches.
        """
        now, wrapped = self.now, active_wrapper() is not None
        now.values, now.absent, now.returned = values, frozenset(absent), {}
        now.added = frozenset(name for name in self.terms if not wrapped and not is_heard(values[name]) and runs(nodes[name]))
        number, now.sums = backward_number(), {}
        if number < 0 or number != now.number:
            now.earlier = frozenset(name for name in now.added if values[name].grad is not None)
        now.number = number

    @property
    def there(self) -> bool:
        """Whether any gradient was there before autograd's pass began."""
        return bool(self.now.earlier)

    def taken(self) -> dict[str, torch.Tensor]:
        """The gradients that autograd is to have. What the pass needed is given up."""
        found = self.now.returned
        self.now.values, self.now.returned = {}, {}
        return found

    def update(self, op: int, gradients: list[torch.Tensor]) -> None:
        """Add some gradients."""
        now = self.now
        for name, gradient in zip(self.rows[op], gradients, strict=True):
            if name in now.absent:
                continue
            whole = name not in now.added or name in now.earlier
            total = self.summed(name, gradient) if whole and self.terms[name] > 1 else gradient
            if total is None:
                continue
            if name in now.added:
                self.add(name, now.values[name], total)
            else:
                now.returned[name] = total

    def summed(self, name: str, term: torch.Tensor) -> torch.Tensor | None:
        """The sum of a gradient's terms once the last one is there."""
        known, count = self.now.sums.pop(name, (None, 0))
        with torch.no_grad():
            total = term.clone() if known is None else known.add_(term)
        if count + 1 == self.terms[name]:
            return total
        self.now.sums[name] = total, count + 1
        return None

    def add(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one, as `AccumulateGrad` does: kept as it is where there is none and nothing else lies in its memory."""
        with torch.no_grad():
            if value.grad is not None:
                value.grad.add_(gradient)
                torch.autograd.graph.increment_version(value.grad)  # it runs below autograd, which therefore sees nothing
            elif name in self.owned and gradient.stride() == value.stride():
                value.grad = gradient.detach()
            else:
                value.grad = torch.empty_strided(value.shape, value.stride(), dtype=gradient.dtype, device=gradient.device)
                value.grad.copy_(gradient)

    def explain(self, error: Exception) -> MemplanError:
        """Never called, for nothing is updated."""
        raise AssertionError from error


def is_heard(value: torch.Tensor) -> bool:
    """Whether somebody's hooks are to see a parameter's gradient."""
    after = value._post_accumulate_grad_hooks or {}
    return bool(value._backward_hooks) or any(not getattr(hook, "of_memplan", False) for hook in after.values())


def runs(node: Any) -> bool:
    """Whether autograd would add a gradient that goes to a node in the backward pass under way."""
    if node is None or type(node).__name__ != "AccumulateGrad":
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # `torch.autograd.grad` is under way, which returns gradients and adds none
        return False

"""What lies beside a planned step that its plan does not count: seen, and said once.

A budget is kept by the step that was planned: gradients dropped before it, one forward pass at a time, its backward pass
after it. Training may be otherwise: gradients are accumulated, a second forward pass begins before the first one's backward,
DistributedDataParallel keeps every gradient a second time in its buckets, `retain_graph=True` keeps what is saved. Each is
found when it first happens, by a look that takes microseconds, and told in a warning and in `Plan.seen`.

`stepwitness.py` looks at the steps of a planned module with this, `backends/compile/ledger.py` at those of a compiled one.
"""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...planner.ir.errors import BudgetWarning
from ...planner.ir.units import show_bytes

OURS = Path(__file__).resolve().parents[1], Path(str(torch.__file__)).resolve().parent
NOT_USERS = tuple(f"{folder}/" for folder in OURS)  # whose frames are not the user's
DROP = "call zero_grad(set_to_none=True) before it, or plan for that much less"


class Seen(NamedTuple):
    """One thing that was beside a planned step.

    Attributes:
        kind: `gradients`, `pending`, `buckets`, `retained`, or `unplanned` for a step that did not run.
        bytes: beside the budget when it was first seen; 0 where that is not known.
        message: what the warning said.
    """

    kind: str
    bytes: int
    message: str


class Witness:
    """Says once of each kind what was seen beside a budget.

    Attributes:
        budget: bytes, or a share as it was written; None where none was asked for, and nothing is said of it.
        seen: what was found so far.
        said: the kinds of it.
    """

    def __init__(self, budget: int | str | None, seen: list[Seen] | None = None):
        self.budget = budget
        self.seen: list[Seen] = [] if seen is None else seen
        self.said: set[str] = set()

    def say(self, kind: str, size: int, message: str, category: Any = BudgetWarning) -> None:
        """Warn, and keep it, if nothing of this kind has been said."""
        if kind not in self.said:
            self.said.add(kind)
            self.seen.append(Seen(kind, size, message))
            warnings.warn(category(message, kind, size), stacklevel=users_level())

    @property
    def beside(self) -> str:
        """What the bytes lie beside."""
        return f"beside the budget of {show_bytes(self.budget) if isinstance(self.budget, int) else self.budget}"

    def gradients(self, parameters: Iterable[torch.Tensor], whose: str = "") -> None:
        """Look for gradients that are there when a step begins."""
        size = sum(found.nbytes for found in [value.grad for value in parameters if value.is_leaf] if found is not None)
        if size:
            self.say("gradients", size, f"gradients of an earlier step{whose} ({show_bytes(size)}, {size} bytes) were there "
                     f"when the step began: they lie {self.beside}; {DROP}")  # fmt: skip

    def buckets(self) -> None:
        """Look for DistributedDataParallel around the call."""
        wrapper = active_wrapper()
        if wrapper is not None and "buckets" not in self.said:
            size = sum(value.nbytes for value in wrapper.module.parameters() if value.requires_grad)
            self.say("buckets", size, f"DistributedDataParallel keeps every gradient a second time in its buckets "
                     f"({show_bytes(size)}, {size} bytes): they lie {self.beside}; plan for that much less")  # fmt: skip

    def pending(self, size: int) -> None:
        """A forward pass begins while what an earlier one saved is still there."""
        self.say("pending", size, f"a forward pass began before the backward pass of an earlier one, whose saved activations "
                 f"({show_bytes(size)}, {size} bytes) lie {self.beside}; run backward after each, drop results that are not "
                 "differentiated, or plan for that much less")  # fmt: skip

    def retained(self, size: int, what: str) -> None:
        """A backward pass was asked to keep its graph."""
        told = f" ({show_bytes(size)}, {size} bytes)" if size else ""
        self.say("retained", size, f"backward(retain_graph=True) keeps {what}{told}: that lies {self.beside}; leave it out, or "
                 "plan for that much less")  # fmt: skip


def active_wrapper() -> Any:
    """The DistributedDataParallel whose forward is running; None where there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def keeps_graph() -> bool:
    """Whether the backward pass under way was asked to retain its graph; no where torch does not tell."""
    asked = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return asked is not None and bool(asked())


def backward_number() -> int:
    """Which backward pass is under way; always the same where torch does not tell."""
    asked = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if asked is None else int(asked())


def users_level() -> int:
    """The `stacklevel` by which a warning of the caller's names the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_USERS):
        frame, level = frame.f_back, level + 1
    return level


__all__ = ["Seen", "Witness", "active_wrapper", "backward_number", "keeps_graph"]

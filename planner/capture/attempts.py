"""One call of a hook on fake tensors, and what came of it."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..ir.errors import CaptureError
from .constants import Refusal
from .live import Live
from .looking import Looking, seen_gradient
from .observers import Whose
from .reach import Held, reach
from .standins import named_tensors
from .state import Change, Snapshot, flat, is_traced


class Forbidden(Refusal):
    """What nobody may do while a model is called, its hooks among them."""


@dataclass(frozen=True)
class Attempt:
    """What a call of a hook has done.

    Attributes:
        result: what it has returned.
        error: what it has raised; None for nothing. Fake tensors raise where they are asked for values.
        shown: the tensors that it was given.
        changed: what it has stored.
        known: whether that was all stored where the plan can store it too.
        returns: whether it has returned anything but what it was given.
        writes: whether it has written over a tensor of the model's or one that it was given.
        said: what it has printed.
        looked: names of the model's own tensors that it has looked at.
        peak: bytes of what it made, at most at a time.
        before: what everything held that it can reach.
    """

    result: Any
    error: Exception | None
    shown: list[torch.Tensor]
    changed: list[Change]
    known: bool
    returns: bool
    writes: bool
    said: str
    looked: frozenset[str]
    peak: int
    before: Snapshot

    def undo(self) -> None:
        """Put back what it has stored."""
        self.before.restore()

    @property
    def reason(self) -> str:
        """The error in a line."""
        return (str(self.error).strip().splitlines() or [type(self.error).__name__])[0][:160]

    @property
    def keeps_alone(self) -> bool:
        """Whether it has done nothing but store tensors where the plan can store them too."""
        plain = self.error is None and not self.said and self.known
        return plain and bool(self.changed) and all(map(tensors_alone, self.changed))

    @property
    def keeps_attached(self) -> bool:
        """Whether a tensor is among them through which gradients pass."""
        return any(value.requires_grad for change in self.changed for value in fresh(change))

    def kept(self) -> tuple[set[int], int]:
        """Which of the tensors that it was given it has stored, and the bytes of the others that it has."""
        place = {value.untyped_storage()._cdata: index for index, value in reversed(list(enumerate(self.shown)))}
        stored = [value.untyped_storage() for change in self.changed for value in fresh(change)]
        new = {storage._cdata: storage.nbytes() for storage in stored}
        return {place[key] for key in new if key in place}, sum(size for key, size in new.items() if key not in place)


def attempt(model: nn.Module, found: list[Held], whose: Whose, call: Callable[[], Any], given: Any) -> Attempt:
    """Call a hook.

    Args:
        model: whose hook it is.
        found: what can be reached from the model.
        whose: which hook.
        call: calls it.
        given: its arguments.

    Raises:
        CaptureError: it looks at gradients of parameters in the backward pass.
        Forbidden: it does what no hook may do.
    """
    known = {id(held.thing) for held in found}
    before = Snapshot([*found, *(held for held in reach(call, hooks=False) if id(held.thing) not in known)])
    leaves = pytree.tree_leaves(given)
    shown = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
    names = {id(value): name for name, value in named_tensors(model)}
    tensors = [*shown, *(value for _, value in named_tensors(model))]
    versions, said, looked, live = [value._version for value in tensors], io.StringIO(), set(), Live(tensors)
    start, result, error = live.now, None, None

    def look(name: str, gradient: bool) -> None:
        looked.add(name)
        if gradient and whose.late:
            raise CaptureError(seen_gradient(whose.told, name))

    try:
        with contextlib.redirect_stdout(said), live, Looking(names, (), look):
            result = call()
    except (CaptureError, Forbidden):
        before.restore()
        raise
    except Exception as caught:  # whatever a function of the user's says to tensors without values
        error = caught
    changed, ids = before.changes(), set(map(id, leaves))
    return Attempt(
        result=result,
        error=error,
        shown=shown,
        changed=changed,
        known=all(id(change.held.thing) in known for change in changed),
        returns=any(leaf is not None and id(leaf) not in ids for leaf in pytree.tree_leaves(result)),
        writes=[value._version for value in tensors] != versions,
        said=said.getvalue(),
        looked=frozenset(looked),
        peak=max([now for now, _ in live.moments.values()], default=start) - start,
        before=before,
    )


def fresh(change: Change) -> list[torch.Tensor]:
    """The tensors of the tracer's that a change has put somewhere."""
    was = {id(value) for value in flat(change.before)}
    return [value for value in flat(change.after) if is_traced(value) and id(value) not in was]


def tensors_alone(change: Change) -> bool:
    """Whether a change has put nothing somewhere but tensors of the tracer's, and words for them."""
    was = {id(value) for value in flat(change.before)}
    new = [value for value in flat(change.after) if id(value) not in was]
    return any(map(is_traced, new)) and all(is_traced(value) or isinstance(value, str) for value in new)


__all__ = ["Attempt", "Forbidden", "attempt"]

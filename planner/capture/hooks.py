"""Hooks on a model's modules and tensors: what each does, and so what becomes of it in a planned step.

A planned step is the graph's code, and calls no hooks but those of the model itself, which run around it, and those on
parameters, which autograd runs. Of the others each call is tried while the step runs once as in eager PyTorch, on fake tensors:

- *It changes values*: it returns new ones, writes in place, sets hooks on tensors. It is traced like the model's own code.
- *It only keeps what it sees* (`onlykeeps.py`) where the plan can put it. It is traced too: what it stores are outputs of the
  step, through which a loss may be differentiated.
- *It looks on*: whatever else. It is an op of the step (`observers.py`), and what it has done while it was tried is undone. One
  that asks for numbers, of which fake tensors have none, looks on too, unless its code can return a value.

What a call does at a planned step that it did not do when it was tried is an error there (`backends/eager/observers.py`).
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir.errors import CaptureError
from .attempts import Attempt, Forbidden, attempt
from .observers import Observation, Taken, Whose, foreign, observed, same, settled
from .onlykeeps import may_return, only_keeps
from .plain_calls import caller_line, replaced
from .plain_calls import is_traced as is_tracing
from .questions import written
from .reach import Held
from .structure import HOOKS, everywhere

KINDS = {
    "_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook", "_backward_pre_hooks": "backward pre-hook",
}  # fmt: skip
# Hooks that return nothing and still are part of what is traced: they compute a weight from others, hand what they see to
# the forward pass that is going on, or checkpoint.
TRACED = ("torch.nn.utils.", "transformers.utils.output_capturing", "torch.distributed._composable.checkpoint_activation")

PLAIN = {"requires_grad_", "to", "dtype", "device"}  # names that a function can use without keeping anything


def is_traced_hook(hook: Any) -> bool:
    """Whether a hook that returns nothing may stay: see `TRACED`, or its code can do no more than `PLAIN`."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__code__", None)
    if code is not None and code.co_names and PLAIN.issuperset(code.co_names):
        held = [cell.cell_contents for cell in hook.__closure__ or ()]
        return all(isinstance(value, torch.dtype | torch.device) for value in held)
    return str(getattr(hook, "__module__", "")).startswith(TRACED)


def hook_tables(model: nn.Module) -> Iterator[tuple[str | None, str, dict[int, Any]]]:
    """The tables of hooks that a planned step passes by: the module's name, None for those of all; which table; itself."""
    for name, module in model.named_modules():
        for attribute in HOOKS if name else ():
            if vars(module).get(attribute) is not None:
                yield name, attribute, vars(module)[attribute]
    for attribute in HOOKS:
        yield None, attribute, everywhere(attribute)


def owner_told(owner: str | None) -> str:
    """Whose table it is, in words."""
    return "every module" if owner is None else f"module {owner}"


def name_of(hook: Any) -> str:
    """What to call a function."""
    return getattr(hook, "__qualname__", type(hook).__name__)


@dataclass
class Try:
    """One call of a hook that looks on, and what it took; see `Taken`."""

    whose: Whose
    kept: set[int]
    bytes: int
    times: int
    rewritten: set[int]
    looked: frozenset[str]

    @property
    def taken(self) -> Taken:
        """As part of a step."""
        return Taken(frozenset(self.kept), self.bytes, self.times, frozenset(self.rewritten), self.looked)


class Rewritten(TorchDispatchMode):
    """Notes which of the tensors that hooks were shown are changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[int, list[tuple[Try, int]]] = {}

    def meet(self, tensor: torch.Tensor, call: Try, index: int) -> None:
        """One that was shown."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.shown:
            weakref.finalize(storage, self.shown.pop, storage._cdata, None).atexit = False
        self.shown.setdefault(storage._cdata, []).append((call, index))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in written(func, args) if self.shown else ():
            for call, index in self.shown.get(value.untyped_storage()._cdata, ()):
                call.rewritten.add(index)
        return result


class Hooks:
    """The hooks of one model while a call of it is captured.

    Attributes:
        model: the model.
        device: the type of device that it is traced for.
        found: what can be reached from the model.
        around: modules around the model that are called in its place, at which nobody's hooks are meant.
        changes: of the hooks that were tried, whether it is traced.
        tried: the calls of hooks that look on, in the order in which eager PyTorch makes them.
        rows: the same as the step under trace makes them.
        apart: hooks that keep nothing that is differentiated look on, as those do with which they share what they keep it in.
    """

    def __init__(self, model: nn.Module, device: str):
        self.model, self.device = model, device
        self.found: list[Held] = []
        self.around: list[nn.Module] = []
        self.changes: dict[tuple[Any, ...], bool] = {}
        self.tried: list[Try] = []
        self.rows: list[Observation] = []
        self.trying = self.inside = self.apart = False
        self.set = 0  # hooks of tensors in this call
        self.rewritten = Rewritten()

    def __bool__(self) -> bool:
        """Whether there are any hooks to be tried on modules."""
        return any(not is_traced_hook(hook) for _, _, table in hook_tables(self.model) for hook in table.values())

    @contextmanager
    def calling(self) -> Iterator[None]:
        """The model is called, from the beginning."""
        self.set, self.inside = 0, True
        self.tried, self.rows = ([] if self.trying else self.tried), []
        try:
            yield
        finally:
            self.inside = False

    @contextmanager
    def tries(self) -> Iterator[None]:
        """Hooks are tried meanwhile.

        Raises:
            CaptureError: a hook that a planned step can neither trace nor call.
        """
        self.trying, self.rewritten = True, Rewritten()
        try:
            with self.intercepted(), self.rewritten if self else contextlib.nullcontext():
                yield
        finally:
            self.trying = False
        for call in self.tried:
            if call.kept & call.rewritten:
                raise CaptureError(
                    f"{call.whose.told} keeps a tensor that the model changes in place afterwards: keep a clone()"
                )

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Calls of hooks come here first."""
        undo: list[tuple[dict[int, Any], int, Any]] = []
        with ExitStack() as stack:
            try:
                for owner, attribute, table in hook_tables(self.model):
                    for key, hook in [(key, hook) for key, hook in table.items() if not is_traced_hook(hook)]:
                        told = f"the {KINDS[attribute]} ({name_of(hook)}) of {owner_told(owner)}"
                        undo.append((table, key, hook))
                        table[key] = self.instead(Whose(owner, attribute, key, None, told), hook)
                stack.enter_context(replaced(torch.Tensor, "register_hook", self.registering()))
                for name in ("retain_grad", "register_post_accumulate_grad_hook"):
                    stack.enter_context(replaced(torch.Tensor, name, refused(name)))
                yield
            finally:
                for table, key, hook in undo:
                    if key in table:
                        table[key] = hook

    def instead(self, whose: Whose, hook: Any) -> Callable[..., Any]:
        """What is called in a hook's place."""

        @functools.wraps(hook, updated=())
        def called(*args: Any, **kwargs: Any) -> Any:
            if not is_tracing():
                return hook(*args, **kwargs)  # another thread's
            if any(args[0] is each for each in self.around):
                return None
            return self.call(whose, hook, args, kwargs)

        return called

    def registering(self) -> Callable[..., Any]:
        """What sets a hook on a tensor meanwhile."""
        register, ours = torch.Tensor.register_hook, set()  # of ours torch asks again, where a mode looks on

        def watched(tensor: torch.Tensor, hook: Any) -> Any:
            if hook in ours or not is_tracing() or not (self.inside or self.trying):
                return register(tensor, hook)
            self.set += 1
            whose = Whose(None, "", self.set, hook, f"the hook set in forward at {caller_line(sys._getframe(1))}")

            def called(gradient: torch.Tensor) -> Any:
                return self.call(whose, hook, (gradient,), {})

            def changing(gradient: torch.Tensor) -> Any:  # set in a backward pass, of which nothing is known beforehand
                result = hook(gradient)
                if result is None:
                    raise CaptureError(f"{whose.told} looks at a gradient and returns nothing, and is set in a backward pass, "
                                       "whose hooks no planned step calls: leave it out, or return the gradient")  # fmt: skip
                return result

            made = called if self.inside else changing
            ours.add(made)
            return register(tensor, made)

        return watched

    def call(self, whose: Whose, hook: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A hook is called."""
        changes = self.changes.get(same(whose))
        if changes:
            return hook(*args, **kwargs)
        if self.trying:
            return self.attempt(whose, hook, args, kwargs)
        if changes is None and only_keeps(hook):  # one that forward itself has set
            return hook(*args, **kwargs)
        if changes is None:
            raise CaptureError(f"{whose.told} is called in a planned step, and not in eager PyTorch: remove it before planning")
        kept = foreign(self.model, hook) if whose.hook is not None else None
        if kept is not None:
            raise CaptureError(f"{whose.told} holds a tensor of the call it is set in ({kept}), and a planned step would show "
                               "it that of the first: leave it out, or return the gradient")  # fmt: skip
        self.rows.append(observed(self.model, whose, args, kwargs, self.device, len(self.rows)))
        return None

    def attempt(self, whose: Whose, hook: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a hook to see what it does; if it looks on, undo what it has done.

        Raises:
            CaptureError: it can neither be traced nor looks on.
        """
        count = self.set
        done = attempt(self.model, self.found, whose, functools.partial(hook, *args, **kwargs), (args, kwargs))
        changes = done.returns or done.writes or self.set > count
        if done.error is not None and (changes or may_return(hook)):
            done.undo()
            raise CaptureError(f"{whose.told} asks for values ({done.reason}), and may change some, which a plan cannot "
                               "follow: compute with tensors, or have it return nothing") from done.error  # fmt: skip
        if changes:
            stored = done.changed[0].name if whose.late and done.changed else "standard output" if done.said else ""
            if stored:
                raise CaptureError(f"{whose.told} changes values, so that it is traced, and writes to {stored}, which a "
                                   "planned step would not do: make two hooks of it, one that looks on")  # fmt: skip
        keeps = not whose.late and done.keeps_alone and (done.keeps_attached or not self.apart)
        if changes or (keeps and only_keeps(hook)):
            self.changes[same(whose)] = True
            self.tried = [call for call in self.tried if same(call.whose) != same(whose)]  # it may have looked on before
            return done.result
        self.looks_on(whose, done)
        done.undo()
        return None

    def looks_on(self, whose: Whose, done: Attempt) -> None:
        """Note a call of a hook that looks on, and what it takes."""
        self.changes[same(whose)] = False
        kept, new = done.kept()
        size = sum(value.untyped_storage().nbytes() for value in done.shown)
        times = round(max(done.peak - new, 0) / size) if size else 0
        self.tried.append(Try(whose, kept, new, times, set(), done.looked))
        for index, value in enumerate(done.shown):
            self.rewritten.meet(value, self.tried[-1], index)

    def set_apart(self) -> bool:
        """Try hooks anew, with `apart`. Returns whether that is something new."""
        new, self.apart, self.changes = not self.apart, True, {}
        return new

    def settled(self, graph: fx.GraphModule) -> tuple[Observation, ...]:
        """The calls in a graph that has just been traced: see `observers.settled`."""
        return settled(self.rows, graph, [(call.whose, call.taken) for call in self.tried])


def refused(name: str) -> Callable[..., Any]:
    """A method of tensors by which a step would keep gradients that a planned one does not."""
    original = getattr(torch.Tensor, name)

    def called(tensor: torch.Tensor, *args: Any) -> Any:
        if is_tracing() and not (name == "retain_grad" and tensor.is_leaf):
            raise Forbidden(f"the model calls {name} in forward, and a planned step keeps no gradient but those of "
                            "parameters and inputs: leave it out")  # fmt: skip
        return original(tensor, *args)

    return called


__all__ = ["Hooks", "hook_tables", "is_traced_hook", "name_of", "owner_told"]

"""The forward of a module that keeps a budget at every call: it finds the kind of call that came, or has one captured.

The first call is captured and planned as it is. When another shape of the same call comes, it is captured with symbols for the
sizes in which the two differ; that trace is compared with the first, op for op, and serves every size from then on. Where it
does not (a size of 1, a model that does something else at some sizes), and where sizes cannot vary at all, each shape is of its
own kind. A call is traced with symbols only where another is known that it can be compared with, so that each kind of call is
traced twice, and one that comes once is traced once.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ...planner.capture.calls import autocast_state, flatten_call
from ...planner.capture.capture import Captured
from ...planner.capture.symbols import SMALLEST
from ...planner.ir.errors import BudgetWarning, CaptureError, MemplanError, MemplanWarning, UnplannedWarning
from ...planner.ir.units import show_bytes
from .kinds import EverySize, OneShape, Session, Ways, Whose
from .module import Runner
from .stepwitness import Mark, StepWitness
from .witness import users_level

MOST = 48  # calls of one form that are traced, and
FORMS = 16  # forms: the next ones run unplanned
KEPT = 32  # kinds of calls of one shape whose plans are kept
WAITING = 4  # traces with sizes that vary that wait for one of a single shape to be compared with
SEVERAL = 4  # kinds of one shape, after which a trace with sizes that vary is tried though none looks like the call
TRIES = 2  # traces with sizes that vary that may turn out not to be the model's

Dynamic = dict[int | str, dict[int, str]]
Shapes = tuple[tuple[int, ...], ...]


class Form:
    """Calls that differ in the sizes of their tensors at most.

    Attributes:
        seen: the shapes that were captured, each a tuple with one for each leaf; () for a leaf that is no tensor.
        one: for shapes the kinds of calls of them alone.
        every: kinds of calls whose sizes vary.
        waiting: such kinds that have not been compared with a trace of one shape yet.
        failures: traces with sizes that vary that were not the model's.
        traced: how many calls were captured, or tried.
        unplanned: these calls run as they are.
    """

    def __init__(self) -> None:
        self.seen: list[Shapes] = []
        self.one: OrderedDict[Shapes, list[OneShape]] = OrderedDict()
        self.every: list[EverySize] = []
        self.waiting: list[EverySize] = []
        self.failures = self.traced = 0
        self.unplanned = False

    @property
    def kinds(self) -> list[OneShape | EverySize]:
        """All of them."""
        return [kind for kinds in self.one.values() for kind in kinds] + self.every

    def others(self, shapes: Shapes) -> list[OneShape]:
        """The kinds of calls of one other shape."""
        return [kind for other, kinds in self.one.items() for kind in kinds if other != shapes]

    def varying(self, shapes: Shapes) -> Dynamic | None:
        """The dimensions in which calls have differed, this one among them, with a name for those that were always equal.

        Returns:
            None where there are none. A size that is too small now to stand for others does not vary.
        """
        names: dict[tuple[int, ...], str] = {}
        found: Dynamic = {}
        for leaf, shape in enumerate(shapes):
            for dim, size in enumerate(shape):
                history = (*(known[leaf][dim] for known in self.seen), size)
                if len(set(history)) > 1 and size >= SMALLEST:
                    found.setdefault(leaf, {})[dim] = names.setdefault(history, f"size{len(names)}")
        return found or None


class Within:
    """The forward of a module that keeps a budget.

    Attributes:
        module: whose forward this is.
        model: the same with the model's own forward, which is what is captured.
        budget: bytes.
        reserved: of these, what is left to others.
        session_of: captures a call of a model, given its arguments, whether it is the first, and which sizes vary.
        ways_of: from a session whose sizes vary to its schedules.
        forms: what is planned, by what a call looks like.
        calls: the most calls that have come before one backward pass.
        witness: looks whether planned steps run at all.
        told: what has been said.
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, budget: int, reserved: int,
        session_of: Callable[[nn.Module, tuple, dict[str, Any], bool, Dynamic | None], Session],
        ways_of: Callable[[Session], Ways],
    ):  # fmt: skip
        self.module, self.model = module, model
        self.budget, self.reserved, self.session_of, self.ways_of = budget, reserved, session_of, ways_of
        self.original = vars(model).get("forward") or MethodType(type(module).forward, module)
        self.__signature__ = inspect.signature(self.original)  # transformers' Trainer passes the arguments found there
        self.forms: dict[Any, Form] = {}
        self.calls = 1
        self.witness = StepWitness(budget, 0, True, [])
        self.told: set[str] = set()
        self.watched = False
        self.whose = Whose(module, model, self.original, budget - reserved, self.witness, self.warn, ways_of)

    @torch.compiler.disable(reason="memplan has planned it")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            self.tell_evaluation()
        found = self.form(args, kwargs) if self.plans(args, kwargs) else None
        if found is None or found[0].unplanned:
            return self.unplanned(args, kwargs)
        form, shapes, leaves, spec = found
        picked = self.pick([*form.one.get(shapes, ()), *form.every], leaves, spec)
        if picked is None:
            try:
                picked = self.pick([self.make(form, shapes, leaves, args, kwargs)], leaves, spec)
                if picked is None:
                    raise CaptureError("its next call would not be the one that was planned")
            except CaptureError as error:
                form.unplanned = form.traced < MOST  # what is planned of many stays so
                self.once(f"calls of {type(self.module).__name__} like this one run unplanned, and no budget is kept: {error}")
                return self.unplanned(args, kwargs)
        kind, leaves, inputs = picked
        runner = kind.runner(leaves, self.beside(), gradient_bytes(self.module))
        self.watch(runner)
        return runner.run(leaves, inputs)

    def unplanned(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's own forward, whose gradients are no sign of a replaced one."""
        self.witness.came = True
        return self.original(*args, **kwargs)

    @property
    def __code__(self) -> Any:
        """The code of the model's own forward, which `torch.export` looks at."""
        return self.original.__code__  # type: ignore[attr-defined]

    def plans(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is one of training, for which there is something to plan."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, FakeTensor) or leaf.device.type == "meta" for leaf in leaves):
            return False  # `torch.export`, or somebody who counts operations
        return any(value.requires_grad for value in chain(self.module.parameters(), leaves))

    def form(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Form, Shapes, list[Any], pytree.TreeSpec] | None:
        """What a call looks like, the shapes of its leaves, these, and how they nest; None where forward takes no such."""
        try:
            leaves, spec = flatten_call(self.module, args, kwargs)
        except TypeError:
            return None  # forward itself says what is wrong
        parameter = next(self.module.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        told = tuple((leaf.dtype, leaf.dim(), leaf.requires_grad) if isinstance(leaf, torch.Tensor) else repr(leaf)
                     for leaf in leaves)  # fmt: skip
        key = str(spec), told, self.module.training, device, autocast_state(device)
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else () for leaf in leaves)
        if len(self.forms) > 4 * FORMS:  # plain arguments that are others at every call
            self.forms = {known: form for known, form in self.forms.items() if form.traced}
        return self.forms.setdefault(key, Form()), shapes, leaves, spec

    def pick(
        self, kinds: Sequence[OneShape | EverySize], leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> tuple[OneShape | EverySize, list[Any], list[Any]] | None:
        """The kind that a call is of, with the call's leaves and the arguments of what runs."""
        for kind in kinds:
            found = kind.pick(leaves, spec)
            if found is not None:
                return kind, *found
        return None

    def make(self, form: Form, shapes: Shapes, leaves: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Capture a call, of every size if it is like one that is known, and plan it as if it came alone.

        Raises:
            BudgetError: no schedule fits.
            CaptureError: it cannot be traced.
        """
        if form.traced >= MOST or sum(other.traced > 0 for other in self.forms.values()) > FORMS:
            raise CaptureError(f"there are too many kinds of them (more than {MOST} shapes and answers, or {FORMS} plain "
                               "arguments): pad batches to fewer lengths, and pass numbers that change as tensors")  # fmt: skip
        form.traced += 1
        vars(self.model).update((name, value) for name, value in vars(self.module).items() if name != "forward")
        awaited = next((kind for kind in form.waiting if kind.serves(leaves)), None)
        every = None if awaited is not None else self.every(form, shapes, leaves, args, kwargs)
        if every is not None:
            return every
        first = not any(form.kinds for form in self.forms.values())
        kind = OneShape(self.whose, self.session_of(self.model, args, kwargs, first, None))
        form.one.setdefault(shapes, []).append(kind)
        form.seen.append(shapes)
        if awaited is not None:
            form.waiting.remove(awaited)
            self.confirm(form, awaited, kind.captured)
        crowded = [other for other in self.forms.values() if other.one]
        if sum(len(kinds) for other in crowded for kinds in other.one.values()) > KEPT:
            crowded[0].one.popitem(last=False)
        return kind

    def every(self, form: Form, shapes: Shapes, leaves: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> EverySize | None:
        """A call captured with symbols for its sizes, and found to be what another one of its form is.

        Returns:
            None where sizes cannot vary; where no other call is known to compare it with, it waits for one.
        """
        dynamic = form.varying(shapes) if form.failures < TRIES and len(form.waiting) < WAITING else None
        likely = len(form.one) >= SEVERAL or any(kind.is_like(shapes, leaves, dynamic or {}) for kind in form.others(shapes))
        if dynamic is None or not likely:
            return None
        try:
            kind = EverySize(self.whose, self.session_of(self.model, args, kwargs, False, dynamic))
        except CaptureError as error:
            self.failed(form, error)
            return None
        others = [other.captured for other in form.others(shapes)]
        known = next((other for other in others if kind.is_like(other)), None)
        if known is None:
            form.waiting.append(kind)
            return None
        return kind if self.confirm(form, kind, known) else None

    def confirm(self, form: Form, kind: EverySize, known: Captured) -> bool:
        """Compare a trace with symbols with another of one shape. Returns whether it is used from now on."""
        try:
            kind.confirm(known)
        except CaptureError as error:
            self.failed(form, error)
            return False
        form.every.append(kind)
        return True

    def failed(self, form: Form, error: CaptureError) -> None:
        """Note that a trace with sizes that vary cannot be used, and say so where no other will be tried."""
        form.failures += 1
        if form.failures == TRIES:
            self.once(f"each shape of {type(self.module).__name__}'s calls is traced and planned by itself, which takes "
                      f"seconds: {error}", MemplanWarning)  # fmt: skip

    @property
    def waiting(self) -> list[Mark]:
        """The calls that wait for their backward pass."""
        runners = [runner for form in self.forms.values() for kind in form.kinds for runner in kind.runners.values()]
        return [mark for runner in runners for mark in runner.witness.marks]

    def tell_evaluation(self) -> None:
        """Say, once, that a call without gradients lies beside what others hold."""
        marks = [] if "evaluation" in self.told else self.waiting
        if marks:
            self.told.add("evaluation")
            held = sum(mark.held for mark in marks)
            self.warn(f"a call without gradients runs while {len(marks)} before it wait for their backward pass and hold "
                      f"{show_bytes(held)} ({held} bytes): it runs as it is, so both together may pass the budget of "
                      f"{show_bytes(self.budget)}; evaluate between steps, or leave room for it with reserved=")  # fmt: skip

    def beside(self) -> int:
        """How many calls before one backward pass a plan has to leave room for: as many as have been seen.

        A graph that is kept for another backward pass holds as much as one call more.
        """
        marks = self.waiting
        if len(marks) >= self.calls:
            self.calls = len(marks) + 1
            held = sum(mark.held for mark in marks)
            if "calls" not in self.told:
                self.told.add("calls")
                self.warn(f"a call begins while {len(marks)} before it wait for their backward pass and hold "
                          f"{show_bytes(held)} ({held} bytes): those were planned as if alone, so this step may pass the "
                          f"budget of {show_bytes(self.budget)}; from the next step on there is room for all")  # fmt: skip
        return self.calls + self.witness.retains

    def watch(self, runner: Runner) -> None:
        """Have one parameter looked at, once: does its gradient come from planned steps?"""
        if not self.watched and runner.named:
            self.watched = True
            name = runner.named[0]
            self.witness.watch(self, name, self.module.get_parameter(name))

    def once(self, message: str, category: Any = UnplannedWarning) -> None:
        """Say something that has not been said."""
        if message not in self.told:
            self.told.add(message)
            self.say(message, category)

    def warn(self, message: str) -> None:
        """Say what is with the budget."""
        self.say(message, BudgetWarning)

    def say(self, message: str, category: Any) -> None:
        """Warn at the user's line."""
        warnings.warn(message, category, stacklevel=users_level() + 1)

    def __reduce__(self) -> Any:
        raise MemplanError("a module within a budget cannot be pickled: save its state_dict(), or pickle the model itself")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Within":
        """Of a copied module: with the same budget, and plans of its own."""
        module = memo[id(self.module)]
        model = object.__new__(type(module))
        vars(model).update(vars(module) | {key: value for key, value in vars(self.model).items() if key == "forward"})
        return Within(module, model, self.budget, self.reserved, self.session_of, self.ways_of)


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients that are there, each once. It is asked at every call, and needs no names."""
    tensors = {id(value): value for owner in module.modules() for value in owner._parameters.values() if value is not None}
    return sum(value.grad.nbytes for value in tensors.values() if value.grad is not None)

"""The forward of a module that keeps a budget at every call: it picks the plan that a call is for, or has one made.

What there is to pick from: other shapes and answers are other *kinds* of calls, each captured once; a kind has a plan for a
call by itself, for one beside gradients that are there, and for one of several before one backward pass.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ...planner.capture.calls import autocast_state, flatten_call
from ...planner.capture.inputs import facts
from ...planner.ir.errors import BudgetError, BudgetWarning, CaptureError, MemplanError, PlanMismatch, UnplannedWarning
from ...planner.ir.plan import Plan
from ...planner.ir.program import Kind, Program
from ...planner.ir.units import show_bytes
from .module import Runner, coded
from .stepwitness import Beside, StepWitness
from .witness import users_level

KEPT = 64  # kinds of calls whose plans are kept


class Session(Protocol):
    """A call that has been captured, to be planned for one budget or many: see `planner.verbs.plan.Session`."""

    @property
    def program(self) -> Program:
        """What was captured, with its costs."""
        ...

    def accumulating(self) -> "Session":
        """The same with a step that adds to the gradients that are there."""
        ...

    def plan(self, budget: int, *, calls: int = 1, reserved: int = 0) -> Plan:
        """The fastest that fits."""
        ...


class Planned:
    """What one kind of call was captured as, and its plans: beside nothing, beside gradients that are there, beside calls.

    Attributes:
        session: that captured it.
        given: the shapes of the tensors of the call, None for what is none.
        adding: the same with a step that adds to the gradients that are there; None until one is wanted.
        runners: for (calls before one backward pass, whether gradients are there) what runs.
        peak: of the plan that is for a call alone, in bytes.
    """

    def __init__(self, session: Session, given: list[Any]):
        self.session = session
        self.given = [getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(given)]
        self.adding: Session | None = None
        self.runners: dict[tuple[int, bool], Runner] = {}
        self.peak = 0


def larger(error: BudgetError, kind: Planned, room: int) -> BudgetError:
    """The error of a batch that does not fit, with how much of it would."""
    rows = next((shape[0] for shape in kind.given if shape is not None and len(shape) > 1), 0)
    program = kind.session.program
    inputs = sum(buffer.bytes for buffer in program.buffers if buffer.kind is Kind.INPUT)
    fixed = program.resident_bytes - inputs
    if error.minimum is None or rows < 2 or room <= fixed:
        return error
    fitting = int(rows * (room - fixed) / (error.minimum - fixed))
    told = f"about {fitting} of the {rows} rows of this batch would fit" if fitting else "not one row of this batch would fit"
    return BudgetError(f"{error}; {told}", error.minimum)


class Within:
    """The forward of a module that keeps a budget.

    Attributes:
        module: whose forward this is.
        model: the same with the model's own forward, which is what is captured.
        budget: bytes.
        reserved: of these, what is left to others.
        session_of: captures a call of a model, given its arguments and whether it is the first.
        kinds: what is planned, by what a call looks like; None for what runs unplanned.
        calls: the most calls that have come before one backward pass.
        witness: looks whether planned steps run at all.
        told: what has been said.
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, budget: int, reserved: int,
        session_of: Callable[[nn.Module, tuple, dict[str, Any], bool], Session],
    ):  # fmt: skip
        self.module, self.model = module, model
        self.budget, self.reserved, self.session_of = budget, reserved, session_of
        self.original = vars(model).get("forward") or MethodType(type(module).forward, module)
        self.__signature__ = inspect.signature(self.original)  # transformers' Trainer passes the arguments found there
        self.kinds: OrderedDict[Any, list[Planned] | None] = OrderedDict()
        self.calls = 1
        self.witness = StepWitness(budget, 0, True, [])
        self.told: set[str] = set()
        self.watched = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.plans(args, kwargs):
            return self.original(*args, **kwargs)
        key = self.key(args, kwargs)
        found = None if key is None else self.kinds.get(key, [])
        if found is None:
            return self.original(*args, **kwargs)
        picked = self.pick(found, args, kwargs)
        if picked is None:
            kind = self.make(key, args, kwargs)
            if kind is None:
                return self.original(*args, **kwargs)
            picked = self.pick([kind], args, kwargs)
            if picked is None:
                return self.give_up(key, "its next call would not be the one that was planned", args, kwargs)
        self.kinds.move_to_end(key)
        kind, leaves, inputs = picked
        return self.runner(kind).run(leaves, inputs)

    def plans(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is one of training, for which there is something to plan."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, FakeTensor) or leaf.device.type == "meta" for leaf in leaves):
            return False  # `torch.export`, or somebody who counts operations
        return any(value.requires_grad for value in (*self.module.parameters(), *leaves))

    def key(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call looks like, by which its kinds are found; None for arguments that are not forward's."""
        try:
            leaves, spec = flatten_call(self.module, args, kwargs)
        except TypeError:
            return None  # forward itself says what is wrong
        parameter = next(self.module.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        told = tuple(facts(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)
        return str(spec), told, self.module.training, device, autocast_state(device)

    def pick(self, kinds: list[Planned], args: tuple, kwargs: dict[str, Any]) -> tuple[Planned, list[Any], list[Any]] | None:
        """The kind that a call is of, with the call's leaves and the arguments of what runs."""
        for kind in kinds:
            checks = next(iter(kind.runners.values())).checks
            try:
                leaves = checks.check_call(args, kwargs)
                return kind, leaves, checks.fetched(leaves)
            except PlanMismatch:
                continue
        return None

    def runner(self, kind: Planned) -> Runner:
        """What runs, given what lies beside the step now.

        Raises:
            BudgetError: no schedule fits.
        """
        runners = [runner for kinds in self.kinds.values() for each in kinds or () for runner in each.runners.values()]
        pending = sum(len(runner.witness.marks) for runner in runners)
        gradients = sum(value.grad.nbytes for value in self.module.parameters() if value.grad is not None)
        if pending >= self.calls:
            self.calls = pending + 1
            if self.told.isdisjoint({"calls"}):
                self.told.add("calls")
                held = sum(len(runner.witness.marks) * runner.witness.held for runner in runners)
                self.say(f"a call begins while {pending} before it wait for their backward pass and hold {show_bytes(held)} "
                         f"({held} bytes): those were planned as if alone, so this step may pass the budget of "
                         f"{show_bytes(self.budget)}; from the next step on there is room for all", BudgetWarning)  # fmt: skip
        wanted = (self.calls, gradients > 0 or self.calls > 1)
        alone = kind.runners.get((1, False))
        if wanted == (1, True) and alone is not None and kind.peak + gradients <= self.budget - self.reserved:
            return alone
        if wanted not in kind.runners:
            self.add(kind, *wanted)
        return kind.runners[wanted]

    def make(self, key: Any, args: tuple, kwargs: dict[str, Any]) -> Planned | None:
        """Capture a call, and plan it as it comes first: with no gradients there.

        Raises:
            BudgetError: no schedule fits.
        """
        vars(self.model).update((name, value) for name, value in vars(self.module).items() if name != "forward")
        first = not self.kinds
        try:
            session = self.session_of(self.model, args, kwargs, first)
        except CaptureError as error:
            self.give_up(key, str(error))
            return None
        kind = Planned(session, [*args, *kwargs.values()])
        self.add(kind, 1, False)
        known = self.kinds.setdefault(key, [])
        assert known is not None
        known.append(kind)
        while sum(len(kinds or ()) for kinds in self.kinds.values()) > KEPT:
            self.kinds.popitem(last=False)
        return kind

    def add(self, kind: Planned, calls: int, there: bool) -> None:
        """Plan a kind of call for what lies beside it.

        Raises:
            BudgetError: no schedule fits.
        """
        session = kind.session
        if there:
            if kind.adding is None:
                kind.adding = session.accumulating()
            session = kind.adding
        try:
            plan = session.plan(self.budget, calls=calls, reserved=self.reserved)
        except BudgetError as error:
            if calls == 1:
                raise larger(error, kind, self.budget - self.reserved) from None
            plan = session.plan(self.budget, reserved=self.reserved)
            self.say(f"{error}; each call is planned as if alone", BudgetWarning)
        kind.runners[calls, there] = self.applied(plan)
        kind.peak = plan.peak if (calls, there) == (1, False) else kind.peak

    def applied(self, plan: Plan) -> Runner:
        """What runs a plan's step for this module."""
        assert plan.captured is not None
        code = coded(plan, plan.captured, self.model)
        runner = Runner(self.module, self.original, plan.captured, code, Beside(plan, self.witness))
        if not self.watched and runner.named:
            self.watched = True
            name = runner.named[0]
            self.witness.watch(self, name, self.module.get_parameter(name))
        return runner

    def give_up(self, key: Any, reason: str, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Let calls of a kind run unplanned, and say why, once. Returns the call's result if there is one."""
        self.kinds[key] = None
        if reason not in self.told:
            self.told.add(reason)
            self.say(f"calls of {type(self.module).__name__} like this one run unplanned, and no budget is kept: {reason}",
                     UnplannedWarning)  # fmt: skip
        return self.original(*args, **(kwargs or {})) if args or kwargs else None

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
        return Within(module, model, self.budget, self.reserved, self.session_of)

"""The verb: `within(model, budget)`, a model that keeps a budget at every call, whatever the batch is.

`plan` is for one call of one shape. This plans at its first call for what comes, and again for what comes new: another shape,
other answers to what the model asks of a mask, gradients that are there already, a second call before the first one's backward
pass, layers that have been frozen, cast or replaced. What was planned is kept, and picked by a look at the call.
"""

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ...backends.eager.module import Runner, coded
from ...backends.eager.stepwitness import Beside, StepWitness
from ...backends.eager.witness import users_level
from ..capture.calls import autocast_state, flatten_call
from ..capture.inputs import facts
from ..ir.errors import BudgetError, BudgetWarning, CaptureError, MemplanError, PlanMismatch, UnplannedWarning
from ..ir.machine import Machine
from ..ir.plan import Plan
from ..ir.program import Kind
from ..ir.units import parse_bytes, show_bytes
from .plan import Progress, Session, check_model, check_numbers

KEPT = 64  # kinds of calls whose plans are kept
LATER = 10.0  # seconds of planning, at most, for a kind of call that is not the first


def within(
    model: nn.Module,
    budget: int | str,
    *,
    loss: Callable[[Any], Any] | None = None,
    optimizer: Any = None,
    machine: str | Machine | None = None,
    allow: Iterable[str] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    reserved: int | str = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """A model that keeps a budget at every call: same class, same parameters, same numbers.

    Args:
        model: its parameters are not touched. The result shares them, its submodules and its name in every message.
        budget: bytes of physical peak, everything counted: 17179869184, "16GiB", "16GB".
        loss: from the model's output to a scalar, where the caller computes it, so that its memory is counted. By default
            the model's own loss (its output, or its `.loss`), or else any loss of its outputs, which is taken to need as much
            again as they do.
        optimizer: as for `plan`: its state and its step's temporaries are counted.
        machine: as for `plan`.
        allow: as for `plan`.
        time_limit: seconds of measuring and planning for the first call; a later kind of call takes at most ten.
        seed: of the search.
        reserved: bytes of the budget that are left to others.
        progress: is told (stage, fraction of it).

    Returns:
        A module that plans at its first training call. Calls without gradients (evaluation, generation) run as they are. What
        cannot be planned runs as it is too, and is said once, in an `UnplannedWarning`.

    Raises:
        BudgetError: the budget is no size; from a call: no schedule fits it, for this batch.
        MemplanError: an argument that makes no sense.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> model = memplan.within(model, "1MiB", loss=lambda out: out.sum())
        >>> for rows in (8, 3, 8):
        ...     model(torch.randn(rows, 64)).sum().backward()
    """
    check_model(model, None)
    check_numbers(time_limit, seed)
    allowed = parse_bytes(budget)
    spare = 0 if reserved == 0 else parse_bytes(reserved, what="number of bytes reserved")
    options = {"loss": loss, "optimizer": optimizer, "machine": machine, "allow": allow, "seed": seed, "progress": progress}
    module = copy.copy(model)
    module.forward = Within(module, copy.copy(model), allowed, spare, float(time_limit), options)  # type: ignore[method-assign]
    return module


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
    program = kind.session.planner.program
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
        kinds: what is planned, by what a call looks like; None for what runs unplanned.
        calls: the most calls that have come before one backward pass.
        seen: what steps have had beside the budget.
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, budget: int, reserved: int, time_limit: float, options: dict[str, Any]
    ):
        self.module, self.model = module, model
        self.budget, self.reserved, self.time_limit, self.options = budget, reserved, time_limit, options
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
            session = Session(
                self.model, args, kwargs, outside=True, measured=first,
                time_limit=self.time_limit if first else min(self.time_limit, LATER), **self.options,
            )  # fmt: skip
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
        return Within(module, model, self.budget, self.reserved, self.time_limit, self.options)

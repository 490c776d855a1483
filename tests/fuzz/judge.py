"""A model planned and beside eager PyTorch: what is the same, what is refused, and whether planning has left a trace on it."""

import hashlib
import random
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Case
from memplan.planner.ir.errors import MemplanError
from quick import hasty
from torch import Tensor, nn

STEPS = 3
POKE = 2  # the script changes things before this step
Outcome = str  # "equal", "refused: why", "DIFFERENT: what", "DAMAGED: what", "CRASHED: what"
KEPT_OUT = (types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)


# A model, described


def described(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Everything reachable from a model as nested tuples, equal only where nothing has changed, identity included."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        grad = None if value.grad is None or not value.is_leaf else contents(value.grad)
        return "tensor", id(value), type(value).__name__, contents(value), value.requires_grad, grad
    if isinstance(value, bool | int | float | complex | str | bytes | None | torch.dtype | torch.device):
        return repr(value)
    if id(value) in seen:
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return "dict", id(value), tuple((repr(key), described(item, seen)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(described(item, seen) for item in value)
    if isinstance(value, set | frozenset):
        return "set", tuple(sorted(map(repr, value)))
    if isinstance(value, KEPT_OUT) or type(value).__module__.startswith(("torch._ops", "torch._library")):
        return "name", id(value)  # operators fill caches of their own
    if isinstance(value, torch.Generator):
        return "generator", contents(value.get_state())
    if isinstance(value, np.random.Generator):
        return "generator", repr(value.bit_generator.state)
    own = getattr(value, "__dict__", None)
    return type(value).__name__, id(value), None if own is None else described(own, seen)


def contents(tensor: Tensor) -> str:
    """Shape, type and bits."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16]}"


def generators() -> tuple[Any, ...]:
    """The states of the generators that everybody shares."""
    return contents(torch.get_rng_state()), random.getstate(), repr(np.random.get_state())


def first_difference(one: Any, other: Any, path: str = "model") -> str:
    """Where two descriptions part."""
    if type(one) is not type(other) or not isinstance(one, tuple) or len(one) != len(other):
        return f"{path}: {str(one)[:100]} became {str(other)[:100]}"
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            named = isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str) and a[0].startswith("'")
            return first_difference(a, b, f"{path}.{a[0] if named else index}")
    return ""


# A script


@dataclass
class Step:
    """What a step leaves behind that a script can see."""

    loss: str
    gradients: dict[str, str | None]
    state: dict[str, str]


def seen_state(model: nn.Module) -> dict[str, str]:
    """Values of parameters, buffers and plain attributes of every module, nested ones too, without identities."""
    found: dict[str, str] = {}

    def walk(value: Any, path: str, depth: int) -> None:
        if isinstance(value, Tensor):
            found[path] = contents(value)
        elif isinstance(value, bool | int | float | str | None):
            found[path] = repr(value)
        elif depth < 3 and isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}[{key!r}]", depth + 1)
        elif depth < 3 and isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, f"{path}[{index}]", depth + 1)
        elif depth < 3 and isinstance(value, types.SimpleNamespace):
            walk(vars(value), path, depth + 1)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "forward", "_is_torch_compile") or ("hook" in key and key.startswith("_")):
                continue
            walk(value, f"{name}.{key}", 0)
    return found


def script(case: Case, model: nn.Module, called: Callable[..., Any], blocks: list[Any]) -> list[Step]:
    """A few training steps of a user, who changes things between them."""
    steps = []
    for number in range(STEPS):
        if number == POKE:
            for index, block in enumerate(blocks):
                block.poke(random.Random(f"{case.seed} poke {index}"))
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        total: Any = 0
        for args, kwargs in case.calls(number):
            with case.context():
                output = called(*args, **kwargs)
            loss = output["loss"] if isinstance(output, dict) else output
            loss = case.loss(loss) if case.loss is not None else loss
            for block in dict.fromkeys(blocks):
                extra = block.extra()
                if isinstance(extra, Tensor):
                    loss = loss + 0.1 * extra
            total = total + loss
        total.backward()
        gradients = {name: None if value.grad is None else contents(value.grad)
                     for name, value in model.named_parameters()}  # fmt: skip
        steps.append(Step(contents(total), gradients, seen_state(model)))
        with torch.no_grad():
            for value in model.parameters():
                if value.grad is not None:
                    value.sub_(value.grad.clamp(-1, 1), alpha=0.01)
                    value.grad = None
    return steps


def compare(wanted: list[Step], found: list[Step]) -> str:
    """What differs first; empty where nothing does."""
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if one.loss != other.loss:
            return f"loss of step {number}"
        for name, gradient in one.gradients.items():
            if gradient != other.gradients.get(name):
                got = other.gradients.get(name)
                what = "missing" if got is None else "there though eager has none" if gradient is None else "of other bits"
                return f"gradient of {name} in step {number} is {what}"
        for key in {**one.state, **other.state}:
            if one.state.get(key) != other.state.get(key):
                return f"{key} after step {number}: {one.state.get(key)} in eager, {other.state.get(key)} here"
    return ""


# Verdicts


def machine() -> Any:
    """This host, with a roofline in place of measurements: what a case takes is not the question."""
    from memplan.planner.ir.machine import Machine, Tier, Unit

    return Machine("fuzz-cpu", "cpu", (Tier("device", 1 << 34, 1e10, rounding=64, alignment=64),),
                   (Unit("cores", "device", {"default": 1e11}, launch=1e-6),), ())  # fmt: skip


def eager_steps(case: Case) -> list[Step] | str:
    """What eager PyTorch does, or the error that it ends with."""
    model, blocks = case.build()
    try:
        return script(case, model, model, blocks)
    except Exception as error:  # a model that does not train is no case
        return f"{type(error).__name__}: {error}"


def judge_plan(case: Case, wanted: list[Step] | None = None) -> Outcome:
    """`plan` and `apply` against eager, and the model against itself."""
    import memplan

    steps = eager_steps(case) if wanted is None else wanted
    if isinstance(steps, str):
        return f"no case: {steps.splitlines()[0][:100]}"
    model, blocks = case.build()
    (args, kwargs), *_ = case.calls(0)
    before, drawn = described(model), generators()
    options = {"loss": case.loss, "machine": machine(), "time_limit": 0.3}
    plan: Any = None
    refusal = ""
    try:
        with case.context(), warnings.catch_warnings(), hasty():
            warnings.simplefilter("ignore")
            try:
                budget = case.budget
                plan = memplan.plan(model, None if budget == "floor" else budget, args, kwargs, **options)
                if budget == "floor":
                    plan = memplan.plan(model, plan.minimum, args, kwargs, **options)
            except memplan.BudgetError as error:
                if case.budget == "floor":
                    return f"CRASHED: the stated minimum is refused: {error}"
                plan = memplan.plan(model, error.minimum, args, kwargs, **options)
    except MemplanError as error:
        refusal = str(error)
    except Exception as error:
        return f"CRASHED: planning: {type(error).__name__}: {str(error)[:150]}"
    if described(model) != before:
        return f"DAMAGED: {first_difference(before, described(model))}"
    if generators() != drawn:
        return "DAMAGED: a shared generator has moved"
    if refusal:
        return check_refusal(case, steps, model, blocks, refusal)
    return judged(case, steps, model, blocks, lambda: plan.apply(model))


def check_refusal(case: Case, steps: list[Step], model: nn.Module, blocks: list[Any], refusal: str) -> Outcome:
    """A model that was refused still trains as before."""
    try:
        difference = compare(steps, script(case, model, model, blocks))
    except Exception as error:
        return f"DAMAGED: the model no longer runs: {type(error).__name__}: {error}"
    return f"DAMAGED: {difference}" if difference else f"refused: {refusal}"


def judged(case: Case, steps: list[Step], model: nn.Module, blocks: list[Any], make: Callable[[], Any]) -> Outcome:
    """A planned model's script against eager's."""
    try:
        with warnings.catch_warnings(record=True) as caught, hasty():
            warnings.simplefilter("always")
            found = script(case, model, make(), blocks)
    except MemplanError as error:
        return f"refused: {error}"
    except Exception as error:
        inner = error.__cause__ or error.__context__
        if isinstance(inner, MemplanError):
            return f"refused: {inner}"
        return f"CRASHED: {type(error).__name__}: {str(error)[:200]}"
    difference = compare(steps, found)
    told = [str(each.message) for each in caught if "eager's very bits" in str(each.message)]
    if difference and told:
        return f"refused: told ({told[0]}), {difference}"
    return f"DIFFERENT: {difference}" if difference else "equal"


def judge_door(case: Case, wanted: list[Step] | None = None) -> Outcome:
    """`torch.compile` with our backend against eager."""
    steps = eager_steps(case) if wanted is None else wanted
    if isinstance(steps, str):
        return f"no case: {steps.splitlines()[0][:100]}"
    torch._dynamo.reset()
    model, blocks = case.build()
    budget = "1GiB" if case.budget in (None, "floor") else "99%"  # of pieces so small, gradients are nearly all
    options = {"budget": budget, "time_limit": 0.3}

    def make() -> Any:
        return torch.compile(model, backend="memplan", options=options)

    outcome = judged(case, steps, model, blocks, make)
    if outcome.startswith("DIFFERENT"):  # Dynamo's own doing, if its eager backend does the same
        torch._dynamo.reset()
        again, parts = case.build()
        peer = judged(case, steps, again, parts, lambda: torch.compile(again, backend="aot_eager"))
        if peer != "equal":
            return f"refused: aot_eager differs too: {peer}"
    return outcome

"""What lies beside a planned step is told once, with its bytes; so is a forward that replaced the planned one."""

import copy
import functools
import gc
import warnings
from types import MethodType
from typing import Any

import memplan
import pytest
import torch
from memplan.planner.ir.machine import Machine, Tier, Unit
from torch import nn

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))
X = torch.arange(64.0).reshape(16, 4).sin()
SIZE = (4 * 8 + 8 + 8 * 4 + 4) * 4  # of all parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().sum()


def planned(budget: Any = "1MiB") -> tuple[Any, Any, Any]:
    """A plan, its planned module, and the model."""
    torch.manual_seed(0)
    model = Net()
    plan = memplan.plan(model, budget, (X,), machine=MACHINE, time_limit=2)
    return plan, plan.apply(model), model


def test_ordinary_training_is_quiet() -> None:
    """With gradients dropped, evaluations between, results held, the model trained itself, or no budget: no warning."""
    plan, fast, model = planned()
    losses = []
    for _ in range(3):
        losses.append(fast(X))
        losses[-1].backward()
        fast.zero_grad(set_to_none=True)
        with torch.no_grad():
            fast(X)
            fast(X)
        fast(X)  # never differentiated, and dropped
        model(X).backward()  # the model that was planned, trained as it is
        model.zero_grad()
    assert plan.seen == []

    plan, fast, _ = planned(None)
    for _ in range(2):
        (fast(X) + fast(X)).backward()
    assert plan.seen == []


def test_gradients_of_an_earlier_step() -> None:
    """Told at the first step that begins with them, with their bytes, and once."""
    plan, fast, _ = planned()
    fast(X).backward()
    with pytest.warns(memplan.BudgetWarning, match=r"zero_grad\(set_to_none=True\)") as caught:
        fast(X).backward()
    fast(X).backward()
    assert [(warning.message.kind, warning.message.bytes) for warning in caught] == [("gradients", SIZE)]  # type: ignore[union-attr]
    assert caught[0].filename == __file__
    assert [(seen.kind, seen.bytes) for seen in plan.seen] == [("gradients", SIZE)]


def test_two_forward_passes() -> None:
    """The second is told if what the first saved is still there."""
    plan, fast, _ = planned()
    first = fast(X)
    with pytest.warns(memplan.BudgetWarning, match="a forward pass began before"):
        second = fast(X)
    (first + second).backward()
    (seen,) = plan.seen
    assert seen.kind == "pending"
    assert seen.bytes >= 16 * 8 * 4  # the hidden activations at least


def test_a_graph_that_is_kept() -> None:
    """Told with what the step holds, and what the loss holds where it lies outside the step."""
    model = nn.Linear(4, 4)
    plan = memplan.plan(model, "1MiB", (X,), loss=lambda out: out.exp().sum(), machine=MACHINE, time_limit=2)
    with pytest.warns(memplan.BudgetWarning, match="retain_graph"):
        plan.apply(model)(X).exp().sum().backward(retain_graph=True)
    assert "and what the graph between it and the loss has" in plan.seen[0].message
    plan, fast, _ = planned()
    with pytest.warns(memplan.BudgetWarning, match="retain_graph"):
        fast(X).backward(retain_graph=True)
    assert plan.seen[0].bytes >= 16 * 8 * 4


@pytest.mark.parametrize("how", ["method", "class", "deleted"])
def test_another_forward_in_its_place(how: str) -> None:
    """A gradient that comes without the planned step is told when its forward has been replaced."""
    plan, fast, model = planned(None)
    if how == "method":
        fast.forward = MethodType(lambda self, x: Net.forward(self, x), fast)
    elif how == "class":
        fast.forward = functools.partial(Net.forward, fast)
    else:
        del fast.forward
    with pytest.warns(memplan.UnplannedWarning, match="reached [ab]\\.(weight|bias) without the planned step"):
        fast(X).backward()
    assert [seen.kind for seen in plan.seen] == ["unplanned"]
    assert model.a.weight.grad is not None


def test_a_wrapper_that_calls_through_is_quiet() -> None:
    """functools.wraps around the planned forward leaves it what runs; its gradients are eager's."""
    plan, fast, model = planned(None)
    inner = fast.forward

    @functools.wraps(Net.forward)
    def around(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    twin = copy.deepcopy(model)
    fast.forward = around
    fast(X).backward()
    twin(X).backward()
    assert plan.seen == []
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_copies_watch_for_themselves_and_nothing_is_left() -> None:
    """A copied planned module has a hook of its own; with the planned module its hook goes."""
    _, fast, model = planned(None)
    other = copy.deepcopy(fast)
    fast(X).backward()
    other.forward = functools.partial(Net.forward, other)
    with pytest.warns(memplan.UnplannedWarning):
        other(X).backward()
    hooked = [value for value in model.parameters() if value._post_accumulate_grad_hooks]
    assert len(hooked) == 1
    model.zero_grad()
    del fast, other
    gc.collect()
    assert not any(value._post_accumulate_grad_hooks for value in model.parameters())


def test_the_other_door() -> None:
    """A compiled model counts earlier gradients, and is quiet as long as there is room for them."""
    torch._dynamo.reset()
    model = Net()
    options: Any = {"machine": MACHINE, "time_limit": 2.0, "budget": "1MiB"}
    called = torch.compile(model, backend="memplan", options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", memplan.BudgetWarning)
        for _ in range(2):
            called(X).backward()
            model.zero_grad()
        called(X).backward()
        called(X).backward()
    torch._dynamo.reset()


def test_a_planned_module_may_be_compiled(capfd):
    """Dynamo leaves it as it is, without a word, and the planned step runs."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(4, 8)
    plan = memplan.plan(model, None, (x,), loss=lambda out: out.pow(2).mean(), time_limit=0)
    planned = plan.apply(model)
    planned(x).pow(2).mean().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(planned, backend="eager")
    capfd.readouterr()
    out = compiled(x)
    assert type(out.grad_fn).__name__ == "PlannedStepBackward"
    out.pow(2).mean().backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), wanted, strict=True))
    assert capfd.readouterr() == ("", "")

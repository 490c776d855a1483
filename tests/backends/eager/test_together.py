"""Gradients of several calls in one backward pass, and of parameters that nothing reaches, against eager's."""

import copy
import warnings

import msgspec
import pytest
import torch
from memplan.planner.ir.errors import PlanMismatch
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Plan
from memplan.planner.verbs.session import Session
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
WIDTH = 16


class Loop(nn.Module):
    """One layer, used several times in a call."""

    def __init__(self, times: int):
        super().__init__()
        self.layer, self.times = nn.Linear(WIDTH, WIDTH), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class Two(nn.Module):
    """Two outputs, of a layer each."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.one(x), self.two(x)


def total(output: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return output.float().sin().sum()


def planned(model: nn.Module, loss=total, **options) -> Plan:
    """The fastest plan."""
    return Session(model, (torch.randn(8, WIDTH),), None, loss=loss, machine=QUICK, time_limit=2.0, **options).plan(None)


def gradients(model: nn.Module, batches: list[torch.Tensor], how: str) -> list[torch.Tensor | None]:
    """Of several calls, each in a backward pass of its own or all in one."""
    losses = [total(model(x)) for x in batches]
    for loss in losses if how == "apart" else [sum(losses)]:
        loss.backward()
    return [value.grad for value in model.parameters()]


@pytest.mark.parametrize(("times", "how"), [(1, "apart"), (1, "together"), (3, "apart")])
def test_several_calls_have_eagers_bits(times, how):
    """Where each call has a backward pass of its own, or each parameter one use in each; and nothing is said."""
    torch.manual_seed(0)
    model, batches = Loop(times), [torch.randn(8, WIDTH) for _ in range(3)]
    other = copy.deepcopy(model)
    fast = planned(model).apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # gradients accumulate
            found, wanted = gradients(fast, batches, how), gradients(other, batches, how)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_calls_that_share_a_backward_pass_are_told_once():
    """Eager adds a parameter's terms one after the other over all calls, a planned step returns their sum: last bits differ."""
    torch.manual_seed(0)
    model, batches = Loop(3), [torch.randn(8, WIDTH) for _ in range(3)]
    other = copy.deepcopy(model)
    fast = planned(model).apply(model)
    with pytest.warns(
        UserWarning, match=r"share one backward pass, and layer\.weight is used several times.*backward\(\) after"
    ):
        found = gradients(fast, batches, "together")
    for one, two in zip(found, gradients(other, batches, "together"), strict=True):
        torch.testing.assert_close(one, two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(fast, batches, "together")


def test_under_autocast_they_are_told_too():
    """Eager's cache has one cast for all calls, and adds up their gradients in 16 bits."""
    torch.manual_seed(0)
    model, x = Loop(1), torch.randn(8, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        fast = planned(model).apply(model)
        loss = total(fast(x)) + total(fast(x))
    with pytest.warns(UserWarning, match=r"layer\.weight is cast by autocast.*16 bits"):
        loss.backward()


def test_a_parameter_that_nothing_reaches_has_no_gradient():
    """None, as in eager mode: an optimizer would decay what has a gradient of zeros."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(8, WIDTH)
    fast = planned(model, lambda out: total(out[0]) + total(out[1])).apply(model)
    total(fast(x)[1]).backward()
    assert model.one.weight.grad is None
    assert model.two.weight.grad is not None
    (total(fast(x)[0]) + total(fast(x)[1])).backward()
    assert model.one.weight.grad is not None


def test_a_step_that_updates_what_nothing_reaches_is_refused():
    """Its update would decay the parameter, where eager's optimizer passes it by."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(8, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = planned(model, lambda out: total(out[0]) + total(out[1]), optimizer=optimizer, optimizer_in_backward=True)
    fast = plan.apply(model, optimizer=optimizer)
    before = model.one.weight.detach().clone()
    loss = total(fast(x)[1])
    with pytest.raises(PlanMismatch, match=r"no gradient reaches one\.\w+ in this step, and the plan updates it: freeze it"):
        loss.backward()
    assert torch.equal(model.one.weight, before)

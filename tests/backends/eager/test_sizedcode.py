"""Code that takes inputs of any size: eager's bits at all that it serves."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.backends.eager.sizedcode import generate_sized
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import InvalidSchedule, MemplanError, PlanMismatch
from memplan.planner.ir.schedule import Placement
from memplan.planner.verbs.session import Session
from memplan.planner.verbs.sizes import SizedPlans
from msgspec.structs import replace
from size_cases import NAMES, SERVED, equal, step
from torch import nn


def plans_of(model: nn.Module, args: tuple = (), kwargs: dict | None = None, **options) -> SizedPlans:
    """Plans of a model: the one that keeps everything, and the smallest known."""
    made = SizedPlans(Session(model, args, kwargs, machine="h100-80gb", time_limit=0.3, **options))
    made.prepare(2)
    return made


@cache
def planned(name: str) -> tuple[nn.Module, SizedPlans, list[nn.Module]]:
    """A model, its plans, and a planned module for each way."""
    case = SERVED[name]
    model = case.model()
    plans = plans_of(model, (), case.inputs(case.base), dynamic=case.dynamic)
    return model, plans, [plans.module(way) for way in plans.ways]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=2)
@given(data=st.data())
def test_bits_are_eagers(name: str, data: st.DataObject):
    """Loss, gradients and random numbers, kept and recomputed; or the call is refused in a line."""
    case, (model, plans, modules) = SERVED[name], planned(name)
    sizes = tuple(data.draw(st.integers(2, 15), label=label) for label in plans.names)
    inputs = case.inputs(sizes)

    for module in modules:
        if plans.holds(sizes):
            assert equal(step(model, model, inputs), step(module, model, inputs))
        else:
            with pytest.raises(PlanMismatch, match="does not serve"):
                module(**inputs)


def test_each_backward_pass_has_the_sizes_of_its_forward_pass():
    """Two calls of different sizes, differentiated in the other order."""
    case, (model, _, modules) = SERVED["attention"], planned("attention")
    inputs = [case.inputs((2, 5)), case.inputs((3, 9))]
    expected = [step(model, model, each)[:-1] for each in inputs]

    losses = [modules[-1](**each) for each in inputs]
    for loss, known in reversed(list(zip(losses, expected, strict=True))):
        model.zero_grad()
        loss.backward()
        assert equal(known, [loss.detach(), *(value.grad for value in model.parameters())])


@pytest.mark.parametrize("way", [0, -1])
def test_tangents_are_laid_out_by_their_sizes(way: int):
    """Of a model whose caller computes the loss, with gradients that lie in memory otherwise."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    plans = plans_of(model, (torch.randn(4, 6, 8),), loss=lambda out: out.sum(), dynamic={"input": {0: "batch", 1: "length"}})
    module, x = plans.module(plans.ways[way]), torch.randn(3, 9, 8)

    def run(call):
        model.zero_grad()
        weights = torch.randn(5, 9, 3, generator=torch.Generator().manual_seed(3)).permute(2, 1, 0)
        (call(x) * weights).sum().backward()
        return [value.grad.clone() for value in model.parameters()]

    assert equal(run(model), run(module))


def test_an_inference_has_eagers_bits():
    """Without a backward pass there is nothing to carry."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    plans = plans_of(model, (torch.randn(4, 6, 8),), train=False, dynamic={"input": {0: "batch", 1: "length"}})
    module = plans.module(plans.ways[0])

    for sizes in ((4, 6), (2, 2), (7, 3)):
        x = torch.randn(*sizes, 8)
        assert torch.equal(model(x), module(x))


def test_gradients_of_inputs_have_their_sizes():
    """An input that wants a gradient."""
    model = nn.Linear(8, 8)
    plans = plans_of(
        model, (torch.randn(4, 8, requires_grad=True),), loss=lambda out: out.sum(), dynamic={"input": {0: "batch"}}
    )
    found = []
    for call in (model, plans.module(plans.ways[0])):
        x = torch.ones(7, 8).requires_grad_()
        call(x).square().sum().backward()
        found.append(x.grad)

    assert equal(*[[grad] for grad in found])


def test_what_else_differs_is_refused_as_ever():
    """A dimension that does not vary, a type, strides."""
    _, _, modules = planned("mlp")

    for x in (torch.randn(3, 7, 9), torch.randn(3, 7, 8, dtype=torch.float64), torch.randn(3, 8, 7).transpose(1, 2)):
        with pytest.raises(PlanMismatch, match="when the plan was made"):
            modules[0](x=x)


def test_equal_names_are_equal_sizes():
    """One size that is two numbers is another call."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, y):
            return (self.a(x) * y[..., None]).sum()

    dynamic = {name: {0: "batch", 1: "length"} for name in ("x", "y")}
    model = Two()
    plans = plans_of(model, (torch.randn(4, 6, 8), torch.randn(4, 6)), dynamic=dynamic)

    with pytest.raises(PlanMismatch, match="when the plan was made"):
        plans.module(plans.ways[0])(torch.randn(3, 6, 8), torch.randn(1, 6))


def test_a_copy_runs_at_other_sizes_too():
    """On its own parameters."""
    case, (model, _, modules) = SERVED["norm"], planned("norm")
    module = copy.deepcopy(modules[0])
    inputs = case.inputs((3, 5))
    loss = module(**inputs)
    loss.backward()

    found = [loss.detach(), *(value.grad for value in module.parameters())]
    assert equal(step(model, model, inputs)[:-1], found)


def test_a_schedule_that_does_not_fit_is_not_run():
    """The budget is asked at each new size."""
    case, (_, plans, _) = SERVED["mlp"], planned("mlp")
    module = plans.module(plans.ways[0], budget=plans.side(plans.ways[0], (4, 12)).peak)

    module(**case.inputs((4, 12)))
    with pytest.raises(PlanMismatch, match="does not fit its budget with batch=40, length=12"):
        module(**case.inputs((40, 12)))


def test_what_holds_for_one_shape_is_refused():
    """A capture for one shape, addresses."""
    case, (_, plans, _) = SERVED["mlp"], planned("mlp")
    schedule = plans.ways[0].schedule

    with pytest.raises(MemplanError, match="captured for one shape"):
        generate_sized(capture(case.model(), (), case.inputs(case.base)), schedule)
    with pytest.raises(MemplanError, match="hold for one shape"):
        generate_sized(plans.captured, replace(schedule, placements=(Placement(0, 0, 0, 0, 1),)))
    with pytest.raises(InvalidSchedule):
        plans.add(replace(schedule, program="another"))


def test_a_plan_for_one_shape_takes_that_shape_alone():
    """Also where its capture knows others: its code has the numbers of one."""
    model = nn.Linear(8, 8)
    session = Session(
        model, (torch.randn(4, 8),), machine="h100-80gb", loss=lambda out: out.sum(), dynamic={"input": {0: "batch"}}
    )
    module = session.plan(None).apply(model)

    module(torch.randn(4, 8)).sum().backward()
    with pytest.raises(PlanMismatch, match="when the plan was made"):
        module(torch.randn(5, 8))

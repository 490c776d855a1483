"""What an optimizer's step allocates, measured with torch's profiler; and plans made with one, through their files."""

from itertools import product

import memplan
import pytest
import torch
from memplan.planner.optimizers import kept_by
from torch import nn
from torch.profiler import ProfilerActivity, profile

SIZE = 1 << 16  # elements of a parameter
SWITCH = (False, True)
CASES = [
    *(("SGD", {"momentum": 0.9 * momentum, "nesterov": nesterov, "weight_decay": 0.1 * decay, "maximize": maximize})
      for momentum, nesterov, decay, maximize in product(SWITCH, repeat=4) if momentum or not nesterov),
    *((name, {"amsgrad": amsgrad, "weight_decay": 0.1 * decay, "maximize": maximize})
      for name in ("Adam", "AdamW") for amsgrad, decay, maximize in product(SWITCH, repeat=3)),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]  # fmt: skip


def allocated(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """The most that a step has allocated at once, in parameters' sizes."""
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            optimizer.step()
    live = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most / (4 * SIZE)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_temporaries_are_those_of_the_step(name, options, foreach, count):
    """For every combination of options, of one parameter and of several; a few scalars do not count."""
    parameters = [nn.Parameter(torch.randn(SIZE)) for _ in range(count)]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, foreach=foreach, **options)
    known = kept_by(optimizer, "cpu")

    assert allocated(optimizer, parameters) == pytest.approx(known.workspace([SIZE] * count) / SIZE, abs=0.01)


def total(output):
    """A loss."""
    return output.square().mean()


def body() -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "some": lambda model: torch.optim.Adam(model[0].parameters(), weight_decay=0.1),
}


@pytest.mark.parametrize("machine", ["h100-80gb", None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plan_with_an_optimizer_survives_its_file(name, machine, tmp_path):
    """Applied from there it traces to the same program, without the optimizer, and trains as the model does."""
    model, other, x = body(), body(), torch.randn(4, 16)
    memplan.plan(model, None, (x,), loss=total, optimizer=OPTIMIZERS[name](model), machine=machine, time_limit=5.0).save(
        tmp_path / "plan.json"
    )
    planned = memplan.load(tmp_path / "plan.json").apply(model, loss=total)
    for module in (planned, other):
        total(module(x)).backward()

    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))

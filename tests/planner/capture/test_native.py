"""Torch's Python kernels that tracing would prefer to eager's own: each is known, and set aside where its bits are others."""

import copy
from collections.abc import Callable

import memplan
import pytest
import torch
from memplan.planner.capture.native import FAMILIES, KEYS, LEFT, native_kernels
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")


def python_kernels() -> dict[str, set[torch._ops.OpOverload]]:
    """The overloads of ATen's that have a Python kernel at one of `KEYS`, by family."""
    found: dict[str, set[torch._ops.OpOverload]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        family, _, overload = rest.partition(".")
        op = getattr(getattr(torch.ops.aten, family, None), overload or "default", None) if space == "aten" else None
        if op is not None and any(key in op.py_kernels for key in KEYS):
            found.setdefault(family, set()).add(op)
    return found


def test_every_python_kernel_is_known():
    """A torch that brings another one fails here: compare its bits with eager's, then put it on one of the two lists."""
    assert set(python_kernels()) <= {*FAMILIES, *LEFT}


def test_families_have_none_while_a_model_is_traced():
    """And they are back afterwards."""
    before = python_kernels()
    with native_kernels():
        assert not set(python_kernels()) & set(FAMILIES)
    assert python_kernels() == before


class First(nn.Module):
    """A recurrent layer's outputs alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Lossy(nn.Module):
    """A layer before a criterion with a given target."""

    def __init__(self, criterion: nn.Module, target: torch.Tensor):
        super().__init__()
        self.layer, self.criterion = nn.Linear(32, 32), criterion
        self.register_buffer("target", target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.layer(x[0]), self.target)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{kind.__name__} {options}": lambda kind=kind, options=options: First(kind(32, 32, num_layers=2, **options))
        for kind in (nn.LSTM, nn.RNN, nn.GRU)  # GRU's bits are eager's where each gate's row fills vectors, as 32 does
        for options in ({}, {"dropout": 0.3}, {"bidirectional": True, "dropout": 0.3}, {"batch_first": True})
    },
    "relu": lambda: First(nn.RNN(32, 32, num_layers=2, nonlinearity="relu", dropout=0.3)),
    "hardshrink": lambda: nn.Sequential(nn.Linear(32, 32), nn.Hardshrink(), nn.Linear(32, 32)),
    "softshrink": lambda: nn.Sequential(nn.Linear(32, 32), nn.Softshrink(), nn.Linear(32, 32)),
    "multi margin": lambda: Lossy(nn.MultiMarginLoss(), torch.arange(4)),
    "multilabel margin": lambda: Lossy(nn.MultiLabelMarginLoss(), torch.randint(-1, 32, (4, 32))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_they_have_eagers_bits(name):
    """Loss, gradients and the stream of random numbers; dropout between layers is drawn."""
    torch.manual_seed(0)
    one = LAYERS[name]()
    other, x = copy.deepcopy(one), torch.randn(6, 4, 32)

    def total(output: torch.Tensor) -> torch.Tensor:
        return output.sin().sum()

    fast = memplan.plan(one, None, (x,), loss=total, machine="h100-80gb", allow=()).apply(one)
    seen = []
    for module in (fast, other):
        torch.manual_seed(7)
        loss = total(module(x))
        loss.backward()
        seen.append([loss.detach(), *(value.grad for value in module.parameters()), torch.get_rng_state()])

    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))

"""The `torch.compile` door under autocast: eager's bits, or a refusal."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import memplan
import pytest
import torch
from memplan.planner.ir.errors import MemplanError
from memplan.planner.ir.machine import Machine, Tier, Unit
from torch import nn
from torch.nn import functional

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))
IDS = torch.arange(4 * 16).reshape(4, 16) * 7 % 20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def cast(dtype: torch.dtype = torch.bfloat16, **given: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype, **given)


class Attends(nn.Module):
    """Attention with dropout, whose backward pass eager computes in 32 bits; tied embeddings; one layer used twice."""

    def __init__(self, inside: bool = False, twice: bool = True):
        super().__init__()
        self.inside = inside
        self.twice = twice
        self.embed = nn.Embedding(20, 16)
        self.norm, self.mix, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with cast() if self.inside else nullcontext():
            x = self.embed(ids)
            parts = self.mix(self.norm(x)).chunk(3, -1)
            heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts]
            mixed = functional.scaled_dot_product_attention(*heads, dropout_p=0.2, is_causal=True).transpose(1, 2).flatten(-2)
            x = x + self.drop(self.out(mixed))
            if self.twice:
                x = x + self.drop(self.out(torch.tanh(x)))
            logits = functional.linear(x, self.embed.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 20))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers(ids.float().reshape(1, 1, 4, 16).expand(4, 1, 4, 16).repeat_interleave(4, 2))
        return functional.cross_entropy(x, ids[:, 0])


def outcome(called: Callable[..., torch.Tensor], model: nn.Module, around: Callable[[], Any], scale: float) -> list[Any]:
    """Loss, gradients and buffers of two steps."""
    found: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        with around():
            loss = called(IDS)
        (loss * scale).backward()
        found += [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        found += [value.clone() for value in model.buffers()]
        model.zero_grad()
    return found


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], float]] = {
    "around": (Attends, cast, 1.0),
    "around, scaled": (Attends, cast, 1024.0),
    "around, in float16, scaled": (Attends, lambda: cast(torch.float16), 1024.0),
    "around, without its cache": (Attends, lambda: cast(cache_enabled=False), 1.0),
    "inside": (lambda: Attends(inside=True, twice=False), nullcontext, 1.0),
    "none": (Attends, nullcontext, 1.0),
    "batch norm": (Pictures, cast, 1.0),
}


@pytest.mark.parametrize("budget", [None, "98%"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_eager(case: str, budget: str | None) -> None:
    """Loss, gradients and buffers, with dropout in attention, casts used twice and tied weights."""
    make, around, scale = CASES[case]
    model = make()
    twin = copy.deepcopy(model)
    options: Any = {"machine": MACHINE, "time_limit": 2.0, "budget": budget}
    called = torch.compile(model, backend="memplan", options=options)
    wanted, found = outcome(twin, twin, around, scale), outcome(called, model, around, scale)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_cast_used_twice_in_a_region_of_the_models_own_is_refused() -> None:
    """Regions inside a model cannot be told apart, and so not what their caches share."""
    options: Any = {"machine": MACHINE, "time_limit": 2.0}
    called = torch.compile(Attends(inside=True), backend="memplan", options=options)
    with pytest.raises(MemplanError, match=r"out\.weight is cast more than once"):
        called(IDS)


def test_another_autocast_is_another_plan() -> None:
    """One compiled model, called with autocast and without, gives eager's numbers of each."""
    model = Attends()
    twin = copy.deepcopy(model)
    options: Any = {"machine": MACHINE, "time_limit": 2.0}
    called = torch.compile(model, backend="memplan", options=options)
    for around in (cast, nullcontext, cast, lambda: cast(torch.float16)):
        for one, other in zip(outcome(called, model, around, 1.0), outcome(twin, twin, around, 1.0), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("door", [True, False])
def test_backward_under_autocast(door: bool) -> None:
    """It is refused where it would cast, for eager's numbers are others there, and runs where it casts nothing."""
    model = Attends()
    options: Any = {"machine": MACHINE, "time_limit": 2.0}
    if door:
        called: Any = torch.compile(model, backend="memplan", options=options)
    else:
        with cast():
            called = memplan.plan(model, None, (IDS,), machine=MACHINE, time_limit=2).apply(model)
    with pytest.raises(MemplanError, match=r"backward\(\) was called under torch.autocast, which casts"), cast():
        called(IDS).backward()

    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    twin, x = copy.deepcopy(plain), torch.randn(4, 8)
    if door:
        called = torch.compile(plain, backend="memplan", options=options)
    else:
        with cast():
            called = memplan.plan(plain, None, (x,), loss=lambda out: out.float().sum(), machine=MACHINE).apply(plain)
    with cast():
        for net in (called, twin):
            net(x).float().sum().backward()
    for one, other in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]

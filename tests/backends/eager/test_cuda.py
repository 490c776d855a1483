"""Planned steps on a GPU have eager's bits, with kernels that add in the same order each time."""

import copy
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import memplan
import pytest
import torch
from memplan.planner.ir.errors import BudgetError
from torch import nn
from torch.nn import functional as F

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
MACHINE = "h100-80gb"  # a preset, so that nothing is probed or measured: whatever a plan does has to be right
STEPS = 6  # graphs record the fourth
LEVERS = ("recompute", "reorder")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time; what has none raises. cuBLAS wants to be told before its first product."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if before is None:
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


class Block(nn.Module):
    """A layer of a transformer, with flash attention where the type is half."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.inner(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        x = x + self.outer(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.mix(self.between(x))


class Transformer(nn.Module):
    """Tokens in, the loss and the logits out; noise before the layers, so that the generator matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.noise = nn.Embedding(64, 64), nn.Dropout(0.1)
        self.layers = nn.Sequential(*(Block(64, 2) for _ in range(3)))
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.noise(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class Convolutions(nn.Module):
    """Images in, the loss out."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 32)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(one, two, 3, padding=1), nn.BatchNorm2d(two), nn.ReLU())
              for one, two in pairwise(widths))
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(images).mean((2, 3))).square().mean()


def transformer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Transformer().to(DEVICE, torch.bfloat16), torch.randint(64, (4, 128), device=DEVICE)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Convolutions().to(DEVICE), torch.randn(8, 3, 32, 32, device=DEVICE)


def smallest(model: nn.Module, x: torch.Tensor, **options: Any) -> str:
    """The smallest budget that works."""
    with pytest.raises(BudgetError) as refused:
        memplan.plan(model, "1", (x,), **options)
    return str(refused.value.minimum)


# Options of `memplan.plan`, whether the budget is the smallest, and whether the step is recorded.
CASES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "plain": ({}, False, False),
    "tight": ({}, True, False),
    "arena": ({"arena": True}, False, False),
    "graphs": ({"arena": True, "lend_gradients": True}, False, True),
    "offload": ({"allow": (*LEVERS, "offload")}, True, False),
    "homes": ({"allow": (*LEVERS, "offload"), "optimizer_in_backward": True}, True, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [transformer, convolutions])
def test_steps_have_eagers_bits(make: Any, case: str) -> None:
    """Outputs, gradients, parameters, buffers and random numbers of each step; without gradients where the plan updates."""
    more, tight, recorded = CASES[case]
    model, x = make()
    other = copy.deepcopy(model)
    options: dict[str, Any] = {"machine": MACHINE, "time_limit": 5, "optimizer": "adamw", **more}
    within = more.get("optimizer_in_backward", False)
    plan = memplan.plan(model, smallest(model, x, **options) if tight else None, (x,), **options)
    makers = [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for net in (model, other)]
    fast = plan.apply(model, optimizer=makers[0] if within else None, cuda_graphs=recorded)
    assert not tight or plan.counts.recompute or plan.counts.offload or plan.schedule.homes
    for number in range(STEPS):
        losses, states = [], []
        for net, maker, steps in ((fast, makers[0], not within), (other, makers[1], True)):
            torch.manual_seed(number)
            loss = net(x)
            loss.backward()
            losses.append(loss.detach().clone())
            states.append(torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state())
            if steps:
                maker.step()
        assert torch.equal(*losses)
        assert torch.equal(*states)
        if not within:
            for (name, one), two in zip(fast.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(one.grad, two.grad), name
        elif plan.schedule.homes:
            fast.forward.code.homes.restore()
        for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(one, two), name
        for maker in makers:
            maker.zero_grad()

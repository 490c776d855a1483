"""Small models whose inputs vary in size, and a step of one with its numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

TOKENS = {"x": {0: "batch", 1: "length"}}
IMAGES = {"x": {0: "batch", 2: "height", 3: "width"}}


class Model(nn.Module):
    """A forward given as a function, and modules by name."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A model, its inputs by their sizes, and the sizes that it is traced with.

    Attributes:
        run: the model's forward.
        modules: makes its modules.
        image: whether it takes images instead of tokens.
    """

    run: Callable[..., Any]
    modules: Callable[[], dict[str, nn.Module]] = field(default=lambda: {"a": nn.Linear(8, 8)})
    image: bool = False

    @property
    def base(self) -> tuple[int, ...]:
        return (4, 10, 14) if self.image else (4, 12)

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        return IMAGES if self.image else TOKENS

    def model(self) -> Model:
        torch.manual_seed(0)
        return Model(self.run, **self.modules())

    def inputs(self, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        torch.manual_seed(sum(sizes))
        return {"x": torch.randn(sizes[0], 3, *sizes[1:]) if self.image else torch.randn(*sizes, 8)}


def attention(model, x):
    heads = [part.view(x.shape[0], -1, 2, 4).transpose(1, 2) for part in model.a(x).chunk(3, -1)]
    return F.scaled_dot_product_attention(*heads, is_causal=True).square().sum()


def cross_entropy(model, x):
    logits = model.a(x)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, 8), x[:, 1:, 0].abs().long().clamp(max=7).reshape(-1))


def positions(model, x):
    return (model.a(x) + model.e(torch.arange(x.shape[1]))).square().sum()


def relative(model, x):
    place = torch.arange(x.shape[1])
    bias = model.e((place[:, None] - place[None]).clamp(-4, 4) + 4).sum(-1)
    return (bias + model.a(x) @ model.a(x).transpose(1, 2)).softmax(-1).square().sum()


def linear(inner: int = 8) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"a": nn.Linear(8, inner)}


def embedding(number: int) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"a": nn.Linear(8, 8), "e": nn.Embedding(number, 8)}


def convolutions(**options: Any) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"a": nn.Conv2d(3, 8, 3, padding=1, **options), "b": nn.ConvTranspose2d(8, 4, 3, stride=2)}


# Served at other sizes.
SERVED = {
    "mlp": Case(lambda m, x: m.b(F.gelu(m.a(x))).sum(), lambda: {"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)}),
    "norm": Case(lambda m, x: m.n(m.a(x)).square().mean(), lambda: {"a": nn.Linear(8, 8), "n": nn.LayerNorm(8)}),
    "dropout": Case(lambda m, x: F.dropout(m.a(x), 0.3, m.training).square().mean()),
    "attention": Case(attention, linear(24)),
    "encoder": Case(lambda m, x: m.a(x).square().sum(), lambda: {"a": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)}),
    "loss": Case(cross_entropy),
    "mean": Case(lambda m, x: m.a(x).mean(1).square().sum()),
    "scale": Case(lambda m, x: (m.a(x) / x.shape[1] * (1 / x.shape[1] ** 0.5)).square().sum()),
    "positions": Case(positions, embedding(64)),
    "relative": Case(relative, embedding(9)),
    "mask": Case(lambda m, x: (torch.tril(torch.ones(x.shape[1], x.shape[1])) @ m.a(x)).square().sum()),
    "reshape": Case(lambda m, x: m.a(x.reshape(-1, 8)).view(x.shape[0], -1).square().sum()),
    "whole slice": Case(lambda m, x: m.a(x)[:, : x.shape[1]].square().sum()),
    "half": Case(lambda m, x: m.a(x)[:, : x.shape[1] // 2].square().sum()),
    "other half": Case(lambda m, x: m.a(x)[:, x.shape[1] // 2 :].contiguous().view(-1).square().sum()),
    "noise": Case(lambda m, x: (m.a(x) + torch.randn(x.shape)).square().sum()),
    "checkpoint": Case(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False).square().sum(),
        lambda: {"a": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh())},
    ),
    "sums": Case(lambda m, x: m.a(x).cumsum(1).sort(1)[0].var(1).sum() + m.a(x).logsumexp(1).sum()),
    "joined": Case(lambda m, x: torch.cat([m.a(x), x], 1).flip(1).roll(1, 1).square().sum()),
    "stride": Case(lambda m, x: (m.a(x) * x.stride(0) * max(x.shape[0], 2)).square().sum()),
    "convolution": Case(lambda m, x: m.b(F.relu(m.a(x))).square().mean(), convolutions(), True),
    "strided": Case(lambda m, x: m.b(F.relu(m.a(x))).square().mean(), convolutions(stride=2), True),
    "batch norm": Case(
        lambda m, x: m.n(m.a(x)).square().mean(), lambda: {"a": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8)}, True
    ),
    "pooled": Case(lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(m.a(x), 2), 1).square().mean(), convolutions(), True),
    "channels last": Case(lambda m, x: m.a(x.to(memory_format=torch.channels_last)).square().mean(), convolutions(), True),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in ("encoder", "relative") else name for name in SERVED]
# Served at the sizes of the trace alone: a size becomes a number of Python's, or a number of steps.
FIXED = {
    "math": Case(lambda m, x: (m.a(x) * (1 / math.sqrt(x.shape[1]))).square().sum()),
    "int": Case(lambda m, x: (m.a(x) * int(x.shape[1])).square().sum()),
    "tensor": Case(lambda m, x: (m.a(x) * torch.tensor(x.shape[1])).square().sum()),
    "item": Case(lambda m, x: (m.a(x) * torch.arange(x.shape[1]).sum().item()).square().sum()),
    "steps": Case(lambda m, x: sum(m.a(x[:, at]) for at in range(x.shape[1])).square().sum()),
    "share": Case(lambda m, x: m.a(x)[:, int(x.shape[1] * 0.15) :].square().sum()),
    "rounded question": Case(lambda m, x: (m.a(x) if x.shape[1] * 0.1 * 0.3 > 0.3 else m.a(x) * 2).square().sum()),
    "numpy": Case(lambda m, x: (m.a(x) * torch.from_numpy(np.arange(x.shape[1], dtype=np.float32))[:, None]).square().sum()),
    "resized": Case(lambda m, x: F.interpolate(m.a(x), scale_factor=2).square().mean(), convolutions(), True),
}


def storing(model, x):
    model.last = x.shape[1]
    return model.a(x).square().sum()


REFUSED = {
    "tenth": (Case(lambda m, x: (m.a(x) * (0.1 * x.shape[1])).square().sum()), "the last bit"),
    "stored": (Case(storing), "stores a SymInt in last"),
    "table": (Case(lambda m, x: (m.a(x) * {12: 2.0}.get(x.shape[1], 1.0)).sum()), "unhashable type"),
    "data": (Case(lambda m, x: (m.a(x) * x.sum().item()).square().sum()), "takes a number out of a tensor"),
    "nonzero": (Case(lambda m, x: m.a(x)[x > 0].square().sum()), "the data decide a shape"),
}


def step(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor | None]:
    """Loss, gradients and buffers of one call from the same random numbers and buffers each time, and the number drawn next."""
    model.zero_grad()
    for value in model.buffers():
        value.data.fill_(1)
    torch.manual_seed(7)
    loss = call(**inputs)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    loss.backward()
    grads = [None if value.grad is None else value.grad.clone() for value in model.parameters()]
    return [loss.detach(), *grads, *(value.clone() for value in model.buffers()), torch.rand(1)]


def equal(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    """Whether two steps have the same bits."""
    pairs = zip(one, other, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

"""The `torch.compile` door where Dynamo hands it sizes that vary: eager's bits, and few traces."""

import copy
from collections.abc import Iterator

import pytest
import torch
from memplan.backends.compile.ledger import ledger_of
from memplan.planner.ir.errors import MemplanWarning
from memplan.planner.ir.machine import Machine, Tier, Unit
from torch import nn
from torch.fx import graph_module
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("hasty")

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))
OPTIONS = {"machine": MACHINE, "time_limit": 1.0, "budget": "1GiB"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Floats(nn.Module):
    """Reads floats of its layers and one of its own, which a caller may change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.rate = 0.1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.mix(self.norm(self.embed(ids)))) * (2 * self.rate)
        return functional.dropout(x, self.rate, self.training).square().sum()


def test_floats_that_dynamo_passes_as_tensors() -> None:
    """With dynamic=True Dynamo takes every float for an input: the numbers are eager's, also when one has changed."""
    model = Floats()
    twin = copy.deepcopy(model)
    called = torch.compile(model, backend="memplan", options=dict(OPTIONS), dynamic=True)
    for number, rate in enumerate((0.1, 0.1, 0.3)):
        model.rate = twin.rate = rate
        ids = torch.arange(12).reshape(3, 4)
        found = []
        for each in (called, twin):
            torch.manual_seed(number)
            loss = each(ids)
            loss.backward()
            found.append(loss.detach())
        assert torch.equal(*found)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_texts_of_graphs_are_not_kept() -> None:
    """A new shape leaves no text behind in torch's memory."""
    options = dict(OPTIONS)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    called, ledger, sizes = torch.compile(model, backend="memplan", options=options), ledger_of(options), []
    for rows in (3, 5, 6, 7):
        given = torch.randn(rows, 4)
        torch._dynamo.maybe_mark_dynamic(given, 0)
        called(given).sum().backward()
        sizes.append(len(graph_module._loader.eval_cache))
    assert ledger.made >= 2
    assert sizes[1] == sizes[-1]


class Attends(nn.Module):
    """A causal block with dropout over tied embeddings; a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.mix(self.norm(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)
        logits = (x + self.drop(functional.gelu(self.out(mixed)))) @ self.embed.weight.t()
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def steps(called, model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of each."""
    found = []
    for number, ids in enumerate(batches):
        torch.manual_seed(number)
        model.zero_grad()
        loss = called(ids)
        loss.backward()
        found += [loss.detach(), *(value.grad.clone() for value in model.parameters())]
    return found


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % 20


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_one_trace_serves_every_size(dynamic: bool | None) -> None:
    """Two traces at most of a piece whose sizes vary; schedules differ from size to size, and keep the budget; eager's bits."""
    model = Attends()
    twin, options = copy.deepcopy(model), OPTIONS | {"budget": 40_000}
    called, ledger = torch.compile(model, backend="memplan", options=options, dynamic=dynamic), ledger_of(options)
    batches = [tokens(*sizes) for sizes in ((3, 8), (4, 9), (5, 11), (2, 7), (6, 19), (3, 8))]
    for one, other in zip(steps(called, model, batches), steps(twin, twin, batches), strict=True):
        assert torch.equal(one, other)
    assert ledger.made == (2 if dynamic else 3)  # of them one of a shape that Dynamo took for the only one
    counts = ledger.counts()
    assert counts["every"] == 1
    assert 2 < counts["schedules"] <= 8
    codes = [code for piece in ledger.pieces for code in piece.codes.values()]
    assert any(code.side.report.repeated for code in codes if code.trace is not None)
    assert all(code.side.peak <= 40_000 for code in codes)


class Roots(nn.Module):
    """Scales by the root of a length, which symbols do not keep to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.mix(x) * (0.1 * x.shape[0] + 0.3)).sin().sum()


def test_sizes_that_symbols_cannot_stand_for() -> None:
    """Each shape is then traced alone, which is told once, with eager's bits; so is a size of 1."""
    model = Roots()
    twin, options = copy.deepcopy(model), dict(OPTIONS)
    called, ledger = torch.compile(model, backend="memplan", options=options), ledger_of(options)
    batches = [torch.randn(rows, 8) for rows in (3, 4, 5, 6, 7)]
    with pytest.warns(MemplanWarning, match="traced and planned by itself") as told:
        found = steps(called, model, batches)
    assert len([each for each in told if issubclass(each.category, MemplanWarning)]) == 1
    for one, other in zip(found, steps(twin, twin, batches), strict=True):
        assert torch.equal(one, other)
    assert ledger.counts()["every"] == 0


@pytest.mark.filterwarnings("ignore::memplan.planner.ir.errors.BudgetWarning")
def test_a_trace_for_every_size_keeps_its_graph_and_evaluates() -> None:
    """Two backward passes over one forward pass, calls and evaluations between, all of other sizes; tied weights are told."""
    model = Attends()
    twin = copy.deepcopy(model)
    called = torch.compile(model, backend="memplan", options=dict(OPTIONS), dynamic=True)
    steps(called, model, [tokens(3, 8), tokens(4, 9)])
    found = []
    for each, which in ((called, model), (twin, twin)):
        which.zero_grad()
        torch.manual_seed(0)
        one, two = each(tokens(5, 6)), each(tokens(2, 12))
        with torch.no_grad():
            seen = [each(tokens(rows, 5)) for rows in (3, 4, 5, 6)]
        one.backward(retain_graph=True)
        two.backward()
        (2 * one).backward()
        found.append([one.detach(), two.detach(), *seen, *(value.grad for value in which.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with pytest.warns(UserWarning, match=r"share one backward pass, and .* is used several times"):
        (called(tokens(5, 6)) + called(tokens(4, 6))).backward()

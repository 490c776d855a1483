"""The `torch.compile` door where Dynamo hands it sizes that vary: eager's bits, and few traces."""

import copy
from collections.abc import Iterator

import pytest
import torch
from memplan.backends.compile.ledger import ledger_of
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

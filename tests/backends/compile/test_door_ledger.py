"""The `torch.compile` door's one budget: what lies beside a run is counted, or told where it could not be foreseen."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from memplan.backends.compile import door
from memplan.backends.compile.ledger import Ledger, ledger_of
from memplan.backends.compile.weight import together
from memplan.planner.ir.errors import BudgetWarning, MemplanError
from memplan.planner.ir.machine import Machine, Tier, Unit
from memplan.planner.ir.program import Phase
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))
WIDTH, DEPTH, ROWS = 16, 4, 64
PARAMETERS = DEPTH * (WIDTH + 1) * WIDTH * 4  # bytes
VALUE = ROWS * WIDTH * 4  # bytes of one activation


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Linear layers with activations; the sum of its output, or the output itself."""

    def __init__(self, loss: bool = True):
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())))
        self.loss = loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layers(x)
        return found.sin().sum() if self.loss else found


def batch(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, budget: int) -> tuple[Any, Ledger]:
    options = {"machine": MACHINE, "time_limit": 1.0, "budget": budget}
    return torch.compile(model, backend="memplan", options=options, dynamic=False), ledger_of(options)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [value.grad.clone() for value in model.parameters() if value.grad is not None]


def told(step: Callable[[], Any]) -> list[str]:
    """What is said of the budget during a step."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    return [str(each.message) for each in seen if issubclass(each.category, BudgetWarning)]


def promised(ledger: Ledger) -> int:
    """The most bytes of the last step, as the ledger's rule has it."""
    inputs: dict[int, int] = {}
    for visit in ledger.step:
        inputs |= visit.inputs
    sums = []
    for visit in ledger.step:
        others = together(other.code.weight for other in ledger.step if other is not visit)
        sums.append(visit.gradients + others + ledger.most(visit.code.weight))
    return sum(inputs.values()) + max(sums)


def same(model: nn.Module, twin: nn.Module) -> bool:
    return all(torch.equal(one, other) for one, other in zip(gradients(model), gradients(twin), strict=True))


def test_gradients_that_are_there_are_counted() -> None:
    """Micro-batches after the first are planned beside the gradients, in silence, with eager's bits."""
    model = Net()
    twin, budget = copy.deepcopy(model), 2 * PARAMETERS + (2 * DEPTH + 2) * VALUE
    called, ledger = compiled(model, budget)
    for seed in range(3):
        assert told(lambda seed=seed: called(batch(seed)).backward()) == []  # type: ignore[misc]
        twin(batch(seed)).backward()
        assert ledger.step[-1].gradients == (PARAMETERS if seed else 0)
        assert promised(ledger) <= budget
    assert ledger.step[-1].code.side.report.repeated > 0  # without the gradients everything would fit
    assert same(model, twin)


def test_calls_before_one_backward_pass_share_the_budget() -> None:
    """The first step is told that it may pass the budget; those after it keep it, and more is kept than must be."""
    model = Net()
    twin, budget = copy.deepcopy(model), 2 * PARAMETERS + (4 * DEPTH + 4) * VALUE
    called, ledger = compiled(model, budget)

    def step(which: Any) -> None:
        one, two, three = (which(batch(seed)) for seed in range(3))
        ((one - two).relu() + three).backward()

    said = [told(lambda: (model.zero_grad(), step(called))) for _ in range(3)]
    assert len(said[0]) == 1
    assert "from the next step on there is room for all" in said[0][0]
    assert said[1:] == [[], []]
    assert len(ledger.step) == 3
    assert promised(ledger) <= budget
    assert not ledger.step[0].code.side.peak == ledger.step[0].code.at_share(0.0).peak
    step(twin)
    assert same(model, twin)


def test_an_evaluation_between_the_passes() -> None:
    """What the open step holds is counted beside it: told once, kept from then on."""
    model = Net()
    twin, budget = copy.deepcopy(model), 2 * PARAMETERS + (2 * DEPTH + 3) * VALUE
    called, ledger = compiled(model, budget)

    def step(which: Any) -> None:
        loss = which(batch(0))
        with torch.no_grad():
            which(batch(1, 2 * ROWS))
        loss.backward()

    said = [told(lambda: (model.zero_grad(), step(called))) for _ in range(3)]
    assert [len(each) for each in said] == [1, 0, 0]
    assert promised(ledger) <= budget
    step(twin)
    assert same(model, twin)


def test_a_graph_that_is_kept_for_another_backward_pass() -> None:
    """Several backward passes over one forward pass have eager's bits; from the next step on there is room for the copies."""
    model = Net(loss=False)
    twin, budget = copy.deepcopy(model), 2 * PARAMETERS + (3 * DEPTH + 4) * VALUE
    called, ledger = compiled(model, budget)

    def step(which: Any) -> None:
        found = which(batch(0))
        found.sin().sum().backward(retain_graph=True)
        found.square().sum().backward()

    said = [told(lambda: (model.zero_grad(), step(called))) for _ in range(2)]
    assert [len(each) for each in said] == [1, 0]
    assert "retain_graph" in said[0][0]
    (visit,) = ledger.step
    assert sum(visit.inputs.values()) + ledger.most(visit.code.weight) <= budget
    step(twin)
    assert same(model, twin)
    found = called(batch(0))
    found.sum().backward()
    (2 * (again := called(batch(0)))).sum().backward(retain_graph=True)  # after a pass that did not keep its graph
    again.sum().backward()
    with pytest.raises(MemplanError, match="run backward already"):
        found.sum().backward()


def test_a_loss_outside_is_counted() -> None:
    """A loss of the model's output is taken to need as much again; one that the model returns has been counted."""
    for loss, wanted in ((False, VALUE), (True, 0)):
        called, ledger = compiled(Net(loss), 1 << 30)
        called(batch(0)).sum().backward()
        (visit,) = ledger.step
        (op,) = [op for op in visit.code.program.ops if op.phase is Phase.LOSS]
        assert op.workspace == wanted


def test_few_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the shapes used last; one that comes again after it was dropped has eager's bits."""
    monkeypatch.setattr(door, "KEPT", 2)
    model = Net()
    twin = copy.deepcopy(model)
    called, ledger = compiled(model, 1 << 30)
    for rows in (8, 9, 10, 8):
        given = batch(rows, rows)
        torch._dynamo.maybe_mark_dynamic(given, 0)
        called(given).backward()
        twin(given).backward()
        assert all(len(piece.codes) <= 2 for piece in ledger.pieces)
    assert same(model, twin)

"""torch.nn's modules and torch's functions, each between layers of a small model: planned, they have eager's bits.

A fast tenth of the tables in `tests/sweep_modules.py` and `tests/sweep_functions.py`, and what has been wrong once, runs
unmarked; the whole is `slow`.
"""

import copy
from contextlib import nullcontext

import msgspec
import pytest
import sweep_functions
import sweep_modules
import torch
from memplan.planner.ir.errors import BudgetError, CaptureError
from memplan.planner.ir.machine import load_machine
from memplan.planner.verbs.session import Session
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
EVERY = 12  # of how many entries one is tested always
WRONG_ONCE = {"LSTM", "GRU", "GRUCell", "lgamma digamma erfinv"}
ENTRIES = {name: (shape, make, use) for name, (shape, make, use) in sweep_modules.TABLE.items()} | {
    name: (shape, nn.Identity, lambda m, y, use=use: use(y)) for name, (shape, use) in sweep_functions.TABLE.items()
}
NAMES = [
    pytest.param(name, marks=() if name in WRONG_ONCE or at % EVERY == 0 else pytest.mark.slow)
    for at, name in enumerate(ENTRIES)
]
HALVES = [  # of these, under autocast
    pytest.param(name, marks=() if at % (5 * EVERY) == 0 else pytest.mark.slow)
    for at, name in enumerate(ENTRIES)
    if at % 5 == 0
]


class Between(nn.Module):
    """Layers, and what is tested after them."""

    def __init__(self, name: str):
        super().__init__()
        self.shape, make, self.use = ENTRIES[name]
        width = torch.Size(self.shape[1:]).numel()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, width), nn.Tanh())
        self.part = make()

    def forward(self, x):
        value = self.layers(x).view(self.shape)
        return self.part(value) if self.use is None else self.use(self.part, value)


def total(output) -> torch.Tensor:
    """A scalar of all that a model returns, each leaf weighted otherwise."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf is not None and leaf.is_floating_point()]
    return sum((leaf.float() * (at + 1)).sin().sum() for at, leaf in enumerate(leaves))


def seen(model: nn.Module, x: torch.Tensor, seed: int, region) -> dict[str, torch.Tensor | None]:
    """All that a user can see of a step."""
    torch.manual_seed(seed)
    with region():
        output = model(x)
        loss = total(output)
    found = {"random numbers": torch.get_rng_state()}
    loss.backward()
    leaves = torch.utils._pytree.tree_leaves((output, loss))
    found |= {f"output {at}": leaf.detach() for at, leaf in enumerate(leaves) if leaf is not None}
    found |= {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    return found | dict(model.named_buffers())


def compare(name: str, region=nullcontext) -> None:
    """Two steps without a budget and at the smallest are eager's, bit for bit."""
    torch.manual_seed(0)
    model = Between(name)
    x = torch.randn(model.shape[0], 8)
    with region():
        session = Session(model, (x,), None, loss=total, machine=QUICK, time_limit=2.0)
        session.planner.effort = 300
        with pytest.raises(BudgetError) as caught:
            session.plan(1)
        plans = [session.plan(None), session.plan(caught.value.minimum)]
    for plan in plans:
        used = copy.deepcopy(model)
        other = copy.deepcopy(model)
        with region():
            fast = plan.apply(used)
        for seed in (7, 8):
            found, wanted = seen(fast, x, seed, region), seen(other, x, seed, region)
            assert list(found) == list(wanted)
            for key, value in wanted.items():
                if value is None:
                    assert found[key] is None, key
                    continue
                assert found[key].dtype == value.dtype, key
                assert torch.equal(found[key].nan_to_num(), value.nan_to_num()), key


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads are not always added up in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # of what torch will give up, of nested tensors and lengths
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_eagers(name):
    """Outputs, gradients, buffers and the stream of random numbers, kept whole and recomputed."""
    compare(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_the_bits_are_eagers_under_autocast(name, dtype):
    """The same in 16 bits, with the backward pass outside of the region."""
    region = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    try:
        torch.manual_seed(0)
        model = Between(name)
        seen(model, torch.randn(model.shape[0], 8), 7, region)
    except RuntimeError as error:
        pytest.skip(f"eager PyTorch cannot do this in 16 bits: {str(error)[:80]}")
    compare(name, region)


@pytest.mark.parametrize("hidden", [8, 20])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.GRU])
def test_gates_of_any_width(kind, hidden):
    """A GRU works in place in pieces of a tensor: of hidden sizes that no vector divides, dense pieces have other last bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(hidden, hidden), kind(hidden, hidden))
    other = copy.deepcopy(model)
    fast = Session(model, (torch.randn(4, hidden),), None, loss=total, machine=QUICK).plan(None).apply(model)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(4, hidden)
        found, wanted = seen(fast, x, seed, nullcontext), seen(other, x, seed, nullcontext)
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.filterwarnings("error")
def test_a_differentiated_product_is_told():
    """Its gradient's last bits are not eager's, which chooses a formula by the data."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x):
            return self.layer(x).prod(1)

    torch.manual_seed(0)
    model, x = Product(), torch.randn(8, 8)
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"differentiates torch\.prod: .*last bits of this gradient differ"):
        plan = Session(model, (x,), None, loss=total, machine=QUICK).plan(None)
    found, wanted = seen(plan.apply(model), x, 7, nullcontext), seen(other, x, 7, nullcontext)
    assert all(torch.allclose(found[key], value) for key, value in wanted.items() if key != "random numbers")


REFUSED = {  # name -> what is done, what the refusal says
    "an inverse that is checked": (lambda y: torch.linalg.inv(y @ y.t() + torch.eye(8)), "asks whether a result is sound.*_ex"),
    "a choice by the data": (lambda y: y.masked_select(y.detach() > 0), "decide a shape .*masked_fill"),
    "a number": (lambda y: y * y.detach().max().item(), "takes a number out of a tensor"),
    "a branch": (lambda y: y if y.sum() > 0 else -y, "takes a number out of a tensor"),
    "sparse": (lambda y: torch.sparse.mm(y.to_sparse(), y.t()), r"sparse"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused_in_one_line(name):
    """It names the line of the model, says what is true and what to try."""
    use, says = REFUSED[name]

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x):
            return use(self.layer(x))

    with pytest.raises(CaptureError, match=says) as caught:
        Session(Uses(), (torch.randn(8, 8),), None, loss=total, machine=QUICK).plan(None)
    assert "\n" not in str(caught.value)

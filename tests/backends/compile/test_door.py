"""The `torch.compile` door: eager's numbers, plans that are carried out, one budget for all pieces."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from memplan.backends.compile import compilation, ledger
from memplan.backends.compile.ledger import Ledger, Visit
from memplan.backends.compile.weight import together
from memplan.backends.tiers import spacefile
from memplan.backends.tiers.filetier import FileTier
from memplan.planner.ir.errors import BudgetError, CaptureError, MemplanError
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.ir.schedule import Run
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

# Figures of its own, so that no test depends on what was measured here; no rounding, so that small tensors differ.
MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attend(self.norm(x)).chunk(3, -1)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.drop(self.out(mixed))
        return x + self.drop(self.shrink(functional.gelu(self.grow(x))))


class Resize(nn.Module):
    """A picture made larger: a kernel that tracing takes apart unless it is kept from it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.interpolate(self.first(x), size=(17, 19), mode="bilinear")).square().mean()


class Gpt(nn.Module):
    """Tied embeddings, dropout; a graph break in the middle on request."""

    def __init__(self, breaks: bool = False, layers: int = 3, width: int = 32, drop: float = 0.1):
        super().__init__()
        self.breaks = breaks
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, drop) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks[:2]:
            x = block(x)
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.blocks[2:]:
            x = block(x)
        logits = x @ self.embed.weight.t()
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
            nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


IDS = torch.arange(16 * 32).reshape(16, 32) * 7 % 50


OPTIONS: dict[int, dict[str, Any]] = {}  # of each compiled model


def compiled(model: Any, **options: Any) -> Any:
    given = {"machine": MACHINE, "time_limit": 2.0, **options}
    called = torch.compile(model, backend="memplan", options=given)
    OPTIONS[id(called)] = given
    return called


def ledger_of(called: Any) -> Ledger:
    return ledger.ledger_of(OPTIONS[id(called)])


def pieces_of(called: Any) -> list[compilation.Code]:
    """The code of every run of the last step."""
    return [visit.code for visit in ledger_of(called).step]


def steps(called: Callable[..., torch.Tensor], model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of one step for each input, with an optimizer between, then the state."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, given in enumerate(inputs):
        torch.manual_seed(number)
        loss = called(given)
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(value.clone() for value in model.state_dict().values())]


def assert_same(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    """Eager's numbers, bit for bit, over several steps."""
    twin = copy.deepcopy(model)
    wanted = steps(twin, twin, *inputs)
    called = compiled(model, **options)
    found = steps(called, model, *inputs)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    return called


def watched(called: Any, mode: TorchDispatchMode) -> None:
    """A step under a mode, which is put on inside, for Dynamo runs nothing of ours under one."""
    run = compilation.Code.run

    def under(code: compilation.Code, args: Any, visit: Visit) -> Any:
        with mode:
            return run(code, args, visit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation.Code, "run", under)
        loss = called(IDS)
    with mode:
        loss.backward()


class Count(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("make", "budget"), [(Gpt, None), (Gpt, "60%"), (Cnn, None), (Cnn, "90%"), (Resize, None)])
def test_the_same_numbers_as_eager(make: Callable[[], nn.Module], budget: str | None) -> None:
    inputs = [IDS, IDS + 1 - (IDS == 49).long() * 50, IDS] if make is Gpt else list(torch.randn(3, 16, 3, 16, 16))
    called = assert_same(make(), *inputs, budget=budget)
    (code,) = pieces_of(called)
    assert code.side.report.repeated > 0 or budget != "60%"


def test_what_the_plan_says_is_what_runs() -> None:
    model = Gpt()
    called = compiled(model, budget="50%")
    called(IDS).backward()
    count = Count()
    watched(called, count)
    (code,) = pieces_of(called)
    runs = [code.program.ops[step.op].target for step in code.side.schedule.instructions if isinstance(step, Run)]
    plan = Counter(target.split(".")[1] for target in runs if "." in target)
    assert code.side.report.repeated > 4
    for name in ("addmm", "native_layer_norm", "native_dropout", "gelu", "mm"):
        assert count.calls[name] + count.calls[name + "_"] == plan[name], name


def test_bytes_live_stay_within_the_plan() -> None:
    model = Gpt()
    called = compiled(model, budget="50%")
    called(IDS).backward()
    model.zero_grad()
    live = Live(model)
    watched(called, live)
    (code,) = pieces_of(called)
    assert live.peak <= code.weight.own + (40 << 10)  # six generator states
    assert code.side.peak < 0.501 * code.planner.unplanned.peak


class Live(TorchDispatchMode):
    """The peak of the bytes of storages made by operators, outputs of running kernels included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.outside = {value.untyped_storage()._cdata for value in model.parameters()}
        self.known: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.known = {key: pair for key, pair in self.known.items() if not pair[0].expired()}
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.outside:
                storage = value.untyped_storage()
                self.known[storage._cdata] = (compilation.StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return result


def within(called: Any, budget: int) -> None:
    """The sum that the module promises, for the pieces of the last step."""
    shared = ledger_of(called)
    resident: dict[int, int] = {}
    for visit in shared.step:
        resident |= visit.inputs
    for visit in shared.step:
        for key in visit.outputs:
            resident.pop(key, None)
    for visit in shared.step:
        held = together(other.code.weight for other in shared.step if other is not visit)
        assert sum(resident.values()) + held + visit.code.weight.own <= budget


def test_graph_breaks_share_one_budget() -> None:
    reference = compiled(Gpt())
    reference(IDS).backward()
    unplanned = pieces_of(reference)[0].planner.unplanned.peak
    budget = int(0.8 * unplanned)
    model = Gpt(breaks=True)
    called = assert_same(model, IDS, IDS, IDS, budget=budget)
    codes = pieces_of(called)
    assert len(codes) == 2
    assert sum(code.side.report.repeated for code in codes) > 0
    within(called, budget)


def test_a_break_costs_nothing_where_everything_fits() -> None:
    called = assert_same(Gpt(breaks=True), IDS, IDS, budget="1GiB")
    assert [code.side.report.repeated for code in pieces_of(called)] == [0] * len(pieces_of(called))


class Looped(nn.Module):
    """Each layer breaks inside, so that Dynamo uses the same pieces for every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Broken() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 128)
        self.second = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.gelu(self.first(x))
        torch._dynamo.graph_break()
        return torch.tanh(self.second(torch.sin(y).cos()))


def test_a_piece_that_runs_for_each_layer_is_counted_each_time() -> None:
    budget = 900_000
    x = torch.randn(64, 32)
    called = assert_same(Looped(), x, x, x, budget=budget)
    assert len(pieces_of(called)) > 4
    within(called, budget)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_budget_that_cannot_be_met(breaks: bool) -> None:
    called = compiled(Gpt(breaks=breaks), budget="200KiB")
    with pytest.raises(BudgetError, match=r"piece \d.*test_door.py") as caught:
        called(IDS)
    assert caught.value.minimum is not None
    assert caught.value.minimum > 200 << 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgte": "1GiB"}, "no option 'budgte'"),
        ({"budget": "lots"}, "cannot read the budget"),
        ({"budget": -3}, "cannot read the budget"),
        ({"inner": "tpu"}, "inner='tpu'"),
        ({"machine": "abacus"}, "no machine 'abacus'"),
        ({"machine": 3}, "machine=3"),
        ({"time_limit": "long"}, "time_limit"),
        ({"time_limit": 0}, "time_limit"),
        ({"allow": "everything"}, "levers are"),
        ({"allow": ["offload"], "inner": "inductor"}, "moves no values"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    called = torch.compile(nn.Linear(3, 3), backend="memplan", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as caught:
        called(torch.randn(2, 3))
    assert isinstance(caught.value.inner_exception, MemplanError)


class Assigns(nn.Module):
    """Gives a weight other values in a way that AOTAutograd cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lin.weight.data = self.lin.weight.data * 0.5
        return self.lin(x).sum()


def test_what_cannot_be_compiled_is_refused_in_one_line() -> None:
    """AOTAutograd's own errors are those of its authors."""
    fast = torch.compile(Assigns(), backend="memplan", options={"machine": MACHINE})
    with pytest.raises(CaptureError, match=r"^cannot compile piece 1.*set_ on a graph input[^\n]*$"):
        fast(torch.randn(4, 8))


def test_another_shape_gets_another_plan() -> None:
    model = Gpt(drop=0.0)
    called = assert_same(model, IDS, IDS[:12], IDS[:14], IDS, budget="60%")
    (last,) = pieces_of(called)
    called(IDS[:12]).backward()
    (other,) = pieces_of(called)
    assert other.planner.unplanned.peak < last.planner.unplanned.peak
    assert other.side.peak <= 0.6 * other.planner.unplanned.peak


def test_without_gradients() -> None:
    model = Gpt()
    called = compiled(model, budget="1GiB")
    called(IDS).backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(called(IDS), model(IDS))
    (code,) = pieces_of(called)
    assert code.program.boundary == len(code.program.ops)


def test_frozen_parameters_views_and_several_outputs() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.first.weight.requires_grad_(False)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> Any:
            self.seen += 1
            hidden = torch.relu(self.first(x)).view(2, 2, 8)
            return hidden[0], self.second(hidden).sigmoid(), x.t(), 3

    model = Odd()
    twin = copy.deepcopy(model)
    called = compiled(model)
    x = torch.randn(4, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        one, other = called(x), twin(y)
        assert one[3] == 3
        (one[0].sum() + one[1].square().sum() + one[2].sum()).backward()
        (other[0].sum() + other[1].square().sum() + other[2].sum()).backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model.second.weight.grad, twin.second.weight.grad)
    assert model.first.weight.grad is None
    assert model.seen == twin.seen == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_inside() -> None:
    model = Gpt(drop=0.0)
    twin = copy.deepcopy(model)
    wanted = steps(twin, twin, IDS, IDS)
    called = compiled(model, budget="60%", inner="inductor")
    found = steps(called, model, IDS, IDS)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (code,) = pieces_of(called)
    assert code.side.report.repeated > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_inside_with_dropout() -> None:
    """Its backward pass drops what its forward pass dropped: the gradient is the loss's slope, measured with one seed."""
    model = Gpt(layers=1, drop=0.3)
    called = compiled(model, budget="90%", inner="inductor")

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return called(IDS)

    loss().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    found = []
    for step in (1e-2, -2e-2):
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.add_(gradient, alpha=step)
        found.append(loss().item())
    slope = sum(gradient.square().sum().item() for gradient in gradients)
    assert (found[0] - found[1]) / 2e-2 == pytest.approx(slope, rel=0.02)
    assert loss().item() == loss().item() != called(IDS).item()


@pytest.fixture
def disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a disk, whose files lie where the test looks."""
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(spacefile, "IN_MEMORY", set())
    tiers = (Tier("device", 1 << 34, 1e10, alignment=64), Tier("disk", 1 << 34, 1e10, alignment=64))
    links = (Link("device", "disk", 1e9), Link("disk", "device", 1e9))
    return Machine("tiered", "cpu", tiers, MACHINE.units, links)


@pytest.mark.parametrize("allow", [("offload",), ("recompute", "reorder", "offload")])
@pytest.mark.parametrize("breaks", [False, True])
def test_pieces_move_what_they_save(disk: Machine, breaks: bool, allow: tuple[str, ...]) -> None:
    """Eager's numbers, with activations on a disk, in one piece or two, generator states among what is saved."""
    model = Gpt(breaks=breaks)
    reference = compiled(copy.deepcopy(model), machine=disk)
    reference(IDS).backward()
    most = max(code.side.peak for code in pieces_of(reference))
    called = assert_same(model, IDS, IDS, IDS, machine=disk, allow=allow, budget=int(0.6 * most) if not breaks else "70%")
    assert sum(sum(code.side.report.moved) for code in pieces_of(called)) > 0


def test_a_step_without_backward_gives_its_space_back(disk: Machine) -> None:
    """Dropped outputs end their visits; nothing piles up over steps."""
    model = Gpt()
    called = compiled(model, machine=disk, allow="offload", budget="70%")
    for _ in range(4):
        called(IDS)
    called(IDS).backward()
    (code,) = pieces_of(called)
    assert sum(code.side.report.moved) > 0
    tiers = [value for value in gc.get_objects() if type(value) is FileTier]
    assert sum(len(tier.spaces) for tier in tiers) <= len(tiers) + 1


def test_what_is_dropped_is_freed(disk: Machine) -> None:
    """A compiled model's ledger, its code and its files go with it."""
    files = list(spacefile.FILES)
    model = Gpt()
    options = {"machine": disk, "time_limit": 2.0, "allow": ("offload",), "budget": "70%"}
    called = torch.compile(model, backend="memplan", options=options)
    called(IDS).backward()
    known = weakref.ref(ledger.ledger_of(options))
    assert known() is not None
    assert any(file not in files for file in spacefile.FILES)
    del called, model, options
    torch._dynamo.reset()
    gc.collect()
    assert known() is None
    assert all(file in files for file in spacefile.FILES)

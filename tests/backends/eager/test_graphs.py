"""Steps recorded as CUDA graphs, with a stand-in that records operators and replays them on the CPU."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import memplan
import pytest
import torch
import torch.utils._pytree as pytree
from memplan.backends.eager import module as eager
from memplan.backends.eager.graphs import WARM, extra_bytes
from memplan.planner.capture.nodes import is_view
from memplan.planner.ir.errors import BudgetError, MemplanError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, ROWS = 32, 16


class Graph:
    """Operators in the order in which they were called."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.shared: Any = None  # the pool that it was given

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        for func, args, kwargs, out in self.tape:
            made = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for place, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(made), strict=True):
                    if isinstance(place, torch.Tensor):
                        place.copy_(value)


class Capture(TorchDispatchMode):
    """Nothing is changed while a graph is captured: ops that write run only in a replay."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            written = {
                frozenset(arg.alias_info.before_set): kwargs.get(arg.name, args[at] if at < len(args) else None)
                for at, arg in enumerate(func._schema.arguments)
                if arg.alias_info is not None
            }
            out = tuple(written[frozenset(result.alias_info.before_set)] for result in func._schema.returns)
            out = out[0] if len(out) == 1 else out or None
        else:
            out = func(*args, **kwargs)
        self.graph.tape.append((func, args, kwargs, out))
        return out


@contextmanager
def captured(graph: Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """What `torch.cuda.graph` does, on the CPU."""
    assert capture_error_mode == "thread_local"
    assert not gc.isenabled()
    graph.shared = pool
    state = torch.get_rng_state()
    with Capture(graph):
        yield
    torch.set_rng_state(state)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are made in a test."""
    made: list[Graph] = []

    def make() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)  # not in torch for the CPU
    monkeypatch.setattr(eager, "check_graphs", lambda plan: None)
    return made


def model_of(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), *copy.deepcopy(parts)) for _ in range(3)))


def planned(model: nn.Module, budget: str | None = None, **more: Any) -> nn.Module:
    options: dict[str, Any] = {"machine": "h100-80gb", "time_limit": 3, "loss": lambda out: out.square().sum()}
    options |= {"arena": True, "lend_gradients": True, **more}
    return memplan.plan(model, budget, (torch.randn(ROWS, WIDTH),), **options).apply(model, cuda_graphs=True)


@pytest.mark.parametrize("parts", [(nn.Tanh(),), (nn.LayerNorm(WIDTH), nn.Dropout(0.3)), (nn.BatchNorm1d(WIDTH), nn.GELU())])
def test_a_recorded_step_is_the_eager_step(graphs, parts):
    """New inputs and new parameters in each step, and eager's outputs, gradients, buffers and random numbers."""
    model = model_of(*parts)
    other = copy.deepcopy(model)
    fast = planned(model)
    makers = [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (fast, other)]
    kept = []
    for number in range(WARM + 4):
        x, states = torch.randn(ROWS, WIDTH), []
        for net, optimizer in zip((fast, other), makers, strict=True):
            torch.manual_seed(number)
            out = net(x)
            out.square().sum().backward()
            kept.append(out.detach())
            states.append(torch.get_rng_state())
            optimizer.step()
        for one, two in zip(fast.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
            assert torch.equal(one, two)
        for one, two in zip(fast.buffers(), other.buffers(), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(*states)
        for optimizer in makers:
            optimizer.zero_grad()
    for one, two in zip(kept[::2], kept[1::2], strict=True):  # no replay wrote over what was returned
        assert torch.equal(one, two)
    assert len(graphs) == 2
    assert all(graph.tape for graph in graphs)
    assert graphs[1].shared is graphs[0]


def test_each_function_is_warmed_up_by_itself(graphs):
    """Some forward passes have no backward pass: it is recorded later, and until then runs on what a replay has left."""
    model = model_of(nn.Tanh())
    other, x = copy.deepcopy(model), torch.randn(ROWS, WIDTH)
    fast = planned(model)
    for _ in range(WARM - 1):
        fast(x)
    recordings = []
    for _ in range(WARM + 1):
        for net in (fast, other):
            net.zero_grad()
            net(x).square().sum().backward()
        for one, two in zip(fast.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        recordings.append(len(graphs))
    assert recordings == [0, 1, 1, 2]


def test_what_a_recording_takes_beyond_its_plan_is_known(graphs):
    """A linear layer's gradients are lent; what comes in, what reaches the output and what goes out are there once more."""
    fast, x = planned(model_of(nn.Tanh())), torch.randn(ROWS, WIDTH)
    for _ in range(WARM):
        fast.zero_grad()
        fast(x).square().sum().backward()
    assert extra_bytes(fast.forward.code) == 0
    fast.zero_grad()
    fast(x).square().sum().backward()
    assert extra_bytes(fast.forward.code) == 3 * x.nbytes


def test_lent_gradients_are_guarded_in_a_replay_too(graphs):
    fast, x = planned(model_of(nn.Tanh())), torch.randn(ROWS, WIDTH)
    for _ in range(WARM + 2):
        fast.zero_grad()
        fast(x).square().sum().backward()
    with pytest.raises(MemplanError, match="still held"):
        fast(x)


def test_a_step_whose_parameters_move_is_recorded_anew(graphs):
    model = model_of(nn.Tanh())
    fast, x = planned(model), torch.randn(ROWS, WIDTH)
    for _ in range(WARM + 1):
        fast.zero_grad()
        fast(x).square().sum().backward()
    model[0][0].weight.data = 2 * model[0][0].weight.data
    other = copy.deepcopy(model)
    for _ in range(WARM + 2):
        for net in (fast, other):
            net.zero_grad()
            net(x).square().sum().backward()
    assert torch.equal(fast[0][0].weight.grad, other[0][0].weight.grad)
    assert len(graphs) == 4
    assert graphs[2].shared is None  # what the old recordings lay in is given back


def test_an_inference_is_recorded(graphs):
    model = model_of(nn.Tanh())
    fast = planned(model, train=False, loss=None, lend_gradients=False)
    with torch.no_grad():
        for _ in range(WARM + 3):
            x = torch.randn(ROWS, WIDTH)
            assert torch.equal(fast(x), model(x))
    assert len(graphs) == 1


def test_what_cannot_be_recorded_is_refused(graphs, monkeypatch):
    model = model_of(nn.Tanh())
    with pytest.raises(MemplanError, match="arena=True"):
        planned(model, arena=False, lend_gradients=False)
    with pytest.raises(MemplanError, match="plan with lend_gradients=True"):
        planned(model, lend_gradients=False)
    noisy = model_of(*(nn.Dropout(0.1), nn.Tanh()) * 3)
    with pytest.raises(BudgetError) as smallest:
        planned(noisy, budget="1")
    with pytest.raises(MemplanError, match="twice with the same numbers"):
        planned(noisy, budget=str(smallest.value.minimum))
    monkeypatch.undo()
    with pytest.raises(MemplanError, match="this plan is for h100-80gb"):
        planned(model)

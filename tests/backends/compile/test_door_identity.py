"""The `torch.compile` door knows a tensor by the tensor: gradients go to the parameter that was read, whatever it is called."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from memplan.backends.compile.identity import likeness, named
from memplan.planner.ir.machine import Machine, Tier, Unit
from torch import nn
from torch.nn import functional

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 34, 1e10),), (Unit("core", "device", {"default": 1e10}, launch=1e-6),))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(called: Any, **options: Any) -> Any:
    given: Any = {"machine": MACHINE, "time_limit": 2.0, **options}
    return torch.compile(called, backend="memplan", options=given)


class Own(nn.Module):
    """Looks its own attributes up, as diffusers' and peft's models do: Dynamo's expressions then name `__dict__`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.b(torch.tanh(self.a(x))) + self.shift).square().sum()


class Every(nn.Module):
    """Every look-up goes through the class's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().sum()


class Wrapper(nn.Module):
    """Passes on what it lacks, as peft's wrappers do."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.b(torch.tanh(self.a(x))) + self.up(self.down(x))).square().sum()


class Containers(nn.Module):
    """Parameters in modules' lists and dicts, in plain lists, dicts and tuples; names that come again; an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.called = nn.ModuleDict({"weight": nn.Linear(4, 4), "a.b".replace(".", "_"): nn.Linear(4, 4)})
        self.list = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))])
        self.dict = nn.ParameterDict({"weight": nn.Parameter(torch.randn(4)), "unused": nn.Parameter(torch.randn(4))})
        self.weight = nn.Parameter(torch.randn(4))
        self.plain = [self.weight, (nn.Parameter(torch.randn(4)), {"weight": nn.Parameter(torch.randn(4))})]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.several, *self.called.values()):
            x = torch.tanh(layer(x))
        first, (second, third) = self.plain
        return (x * first + second * third["weight"] + self.list[0] * x * self.list[1] + self.dict["weight"]).square().sum()


class Tied(nn.Module):
    """One parameter under three names, one of them in a plain list, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.kept = [self.embed.weight]
        self.middle.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = x.abs().mul(3).long() % 10
        hidden = torch.tanh(self.middle(self.embed(ids)))
        return (functional.linear(hidden, self.kept[0]) + self.head(hidden)).logsumexp(-1).sum()


def closed() -> nn.Module:
    """A model whose forward reads a parameter from a closure."""
    outside = nn.Parameter(torch.randn(4, 4))

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.outside = outside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight @ outside).sum()

    return Closed()


def outcome(called: Callable[..., torch.Tensor], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The loss, the input's gradient and every parameter's, over two steps."""
    found: list[torch.Tensor | None] = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        loss = called(given)
        loss.backward()
        found += [loss.detach(), given.grad, *(parameter.grad for parameter in model.parameters())]
        model.zero_grad()
    return found


def same(found: list[torch.Tensor | None], wanted: list[torch.Tensor | None]) -> None:
    """Bit for bit, and None where None is."""
    assert [value is None for value in found] == [value is None for value in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [None, "80%"])
@pytest.mark.parametrize("make", [Own, Every, lambda: Wrapper(Own()), Containers, Tied, closed])
def test_every_gradient_reaches_its_own_parameter(make: Callable[[], nn.Module], budget: str | None) -> None:
    """Eager's gradients bit for bit and None where eager has None, without a budget and within a small one."""
    model = make()
    x = torch.randn(64, 4)
    wanted = outcome(model, model, x)
    called = compiled(model, budget=budget)
    same(outcome(called, model, x), wanted)


def test_a_tensor_passed_twice_gets_the_sum() -> None:
    """One tensor for two arguments, and in a list with itself, has one gradient: the sum of its uses'."""
    weight = torch.randn(4, 4, requires_grad=True)

    def both(x: torch.Tensor, one: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:
        return torch.tanh(x @ one @ more[0] + more[1]).sum()

    called = compiled(both)
    other = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    for given in ((weight, [weight, other[0]]), (weight, [other, weight[1]]), (other, [weight, weight[0]])):
        found = []
        for function in (called, both):
            function(x, *given).backward()
            found.append([weight.grad, other.grad])
            weight.grad = other.grad = None
        same(found[0], found[1])


def test_sharing_memory_is_part_of_a_plan() -> None:
    """What was planned for arguments that lie apart is not run for one that is written and overlaps another."""

    def write(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * y

    called = compiled(write)
    for apart in (True, False):
        one, other = torch.zeros(8), torch.zeros(8)
        x, y = (one[:4], torch.zeros(8)[:4]) if apart else (one[:4], one[2:6])
        a, b = (other[:4], torch.zeros(8)[:4]) if apart else (other[:4], other[2:6])
        assert torch.equal(called(x, y), write(a, b))
        assert torch.equal(one, other)


def test_names_are_unique() -> None:
    """Two tensors never have one name, one tensor always has one; a leaf that wants a gradient counts as a parameter."""
    one, other, free = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), torch.zeros(2, requires_grad=True)
    again = "L['self'].__dict__['_modules']['a']._parameters['weight']"
    pairs = [(again, one), (again, other), (again, other), ("L['x']", one), ("", free), (again, free.detach()), (again, 3)]
    found = named(pairs)
    assert found[1] == found[2]
    assert found[0] == found[3]
    assert found[0].name == "a.weight"
    assert len({known.name for known in found}) == 5
    assert [known.kind for known in found] == [
        "parameter",
        "parameter",
        "parameter",
        "parameter",
        "parameter",
        "input",
        "input",
    ]


def test_likeness_tells_sharing_from_lying_apart() -> None:
    """Calls are alike if their arguments share memory alike, at whatever addresses."""
    one, other = torch.zeros(8), torch.zeros(8)
    assert likeness([one[:4], other[:4]]) == likeness([other[:4], one[:4]])
    assert likeness([one[:4], one[4:]]) == likeness([other[:4], other[4:]])
    assert likeness([one[:4], one[4:]]) != likeness([one[:4], other[4:]])
    assert likeness([one[:4], one[2:6]]) != likeness([one[:4], one[4:]])
    assert likeness([one, one]) != likeness([one, one.view(8)])

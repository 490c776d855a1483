"""Which ops a plan may run again: what draws, counts or talks to others must happen as often and in the order as in eager."""

import os

import msgspec
import pytest
import torch
import torch.distributed as dist
from memplan.passes.reorder import Reorder
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import BudgetError, CaptureError
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.verbs.session import Session
from torch import nn

WIDTH = 32
QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")
CALLS: list[str] = []


@torch.library.custom_op("memplan_test::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    """Draws, and no tag says so."""
    CALLS.append("noisy")
    return x + torch.rand_like(x)


@noisy.register_fake
def _(x):
    return torch.empty_like(x)


noisy.register_autograd(lambda ctx, gradient: gradient * 2)


class Says(nn.Module):
    """A model of one function over some layers."""

    def __init__(self, says, layers: int = 4, **kept):
        super().__init__()
        self.says = says
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x):
        for layer in self.layers:
            x = self.says(self, layer(x)).sin()
        return x.sum()


def same_as_eager(says, steps: int = 2) -> Program:
    """At the smallest budget: losses, gradients and the random numbers that follow are eager's, step after step."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Says(says))
    x = torch.randn(64, WIDTH)
    session = Session(models[0], (x,), machine=QUICK, time_limit=2.0)
    session.planner.effort = 1500
    with pytest.raises(BudgetError) as caught:
        session.plan(1)
    assert caught.value.minimum is not None
    plan = session.plan(caught.value.minimum)
    assert plan.counts.recompute > 0
    seen = []
    for model, run in ((models[0], plan.apply(models[0])), (models[1], models[1])):
        torch.manual_seed(7)
        for _ in range(steps):
            model.zero_grad()
            loss = run(x)
            loss.backward()
            seen += [loss.detach(), *(value.grad.clone() for value in model.parameters()), torch.rand(1)]
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    return plan.program


IN_PLACE = {
    "uniform_": lambda m, x: x + torch.empty_like(x).uniform_(),
    "bernoulli_": lambda m, x: x * torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda m, x: x + torch.empty_like(x).normal_(),
    "exponential_": lambda m, x: x + torch.empty_like(x).exponential_(),
    "gumbel": lambda m, x: nn.functional.gumbel_softmax(x),
    "rrelu": lambda m, x: nn.functional.rrelu(x, training=True),
    "multinomial": lambda m, x: x + torch.multinomial(x.detach().softmax(-1), WIDTH, replacement=True),
    "poisson": lambda m, x: x + torch.poisson(x.detach().exp()),
    "randperm": lambda m, x: x[:, torch.randperm(WIDTH)],
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_random_ops_run_again_draw_the_same(name):
    """However they are written."""
    program = same_as_eager(IN_PLACE[name])

    assert any(op.random for op in program.ops)


def test_a_generator_of_the_models_own_is_refused():
    """Nothing would put its state back for a repetition, or set it where the model does at each call."""
    model = Says(lambda m, x: x + torch.randn(x.shape, generator=m.own), own=torch.Generator())
    with pytest.raises(CaptureError, match=r"draws from a torch\.Generator"):
        capture(model, (torch.randn(4, WIDTH),))


def test_custom_operators_are_never_run_again():
    """They may draw and count: nobody knows."""
    CALLS.clear()
    program = same_as_eager(lambda m, x: noisy(x))

    assert CALLS == ["noisy"] * 4 * 2 * 2
    assert [op.repeatable for op in program.ops if op.target.startswith("memplan_test")] == [False] * 4


@pytest.fixture
def processes(tmp_path):
    """A group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Reduced(torch.autograd.Function):
    """Sums over processes, forwards and backwards."""

    @staticmethod
    def forward(ctx, x):
        return reduced(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return reduced(gradient)


def reduced(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.all_reduce(x, "sum", dist.distributed_c10d._get_default_group().group_name))


def test_collectives_run_once_and_their_operands_live_until_they_are_waited_for(processes):
    """Ranks whose plans differ would hang otherwise, or reduce what has been written over."""
    program = same_as_eager(lambda m, x: Reduced.apply(x))
    talks = [op for op in program.ops if op.target.startswith("_c10d")]
    starts = {op.writes[0]: op for op in talks if "all_reduce" in op.target}
    waits = [op for op in talks if "wait_tensor" in op.target]

    assert len(starts) == len(waits) == 8
    assert not any(op.repeatable for op in talks)
    made = {buffer for op in talks for buffer in op.writes}
    assert not {given for op in program.ops for _, given in op.reuse} & made
    for wait in waits:
        (start,) = (starts[buffer] for buffer in wait.reads if buffer in starts)
        assert set(start.reads) <= set(wait.reads)


def test_effects_keep_their_order_when_the_backward_pass_is_rearranged():
    """What frees more goes first, but not before what was to happen earlier in other processes' eyes."""

    def op(name: str, reads: tuple[int, ...], writes: tuple[int, ...], repeatable: bool) -> Op:
        return Op(name=name, target=name, key=name, phase=Phase.BACKWARD, reads=reads, writes=writes, repeatable=repeatable)

    buffers = tuple(Buffer(name=str(index), bytes=size, kind=Kind.TEMPORARY) for index, size in enumerate((100, 10, 20)))
    made = Op(name="make", target="aten.make", key="make", phase=Phase.FORWARD, reads=(), writes=(0,))
    loss = Op(name="loss", target="loss", key="loss", phase=Phase.LOSS, reads=(), writes=(), repeatable=False)
    for repeatable, order in ((True, [0, 1, 3, 2]), (False, [0, 1, 2, 3])):
        ops = (made, loss, op("c10d.one", (), (1,), repeatable), op("c10d.two", (0,), (2,), repeatable))
        assert Reorder()(Program(name="two", buffers=buffers, ops=ops, outputs=(1, 2), device="cpu")) == order

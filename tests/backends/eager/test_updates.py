"""Updates in backward: the numbers of a step after the backward pass, with every optimizer whose state is counted."""

import copy

import memplan
import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memplan.planner.capture.optimizers import PART, ROW, SMALL, rows_of
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.program import Kind, Phase
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
X = torch.randn(6, 12)


class Net(nn.Module):
    """Weights that are tied, frozen, unused and normalised, beside ordinary ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm, self.drop, self.unused = nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(3, 3)
        self.c.weight = self.a.weight
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.c(self.drop(torch.tanh(self.norm(self.b(torch.relu(self.a(x)))))))


def total(out):
    """The loss."""
    return (out * out).sum()


def pair(make):
    """Twice the same model, each with its optimizer."""
    torch.manual_seed(0)
    one = Net()
    two = copy.deepcopy(one)
    return one, make([*one.parameters()]), two, make([*two.parameters()])


def train(model, optimizer, steps, after=lambda: None):
    """Losses of some steps."""
    losses = []
    for number in range(steps):
        torch.manual_seed(number)
        loss = total(model(X))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(loss.item())
    return losses


def same(one, two):
    """Whether two models, or two optimizers' states, hold the same bits."""
    rows = []
    for each in (one, two):
        leaves, _ = torch.utils._pytree.tree_flatten_with_path(each.state_dict())
        rows.append(sorted((str(path), torch.as_tensor(leaf).tolist()) for path, leaf in leaves if leaf is not None))
    return rows[0] == rows[1]


OPTIMIZERS = {
    "adamw": lambda values: torch.optim.AdamW(values, lr=1e-2),
    "adamw, fused": lambda values: torch.optim.AdamW(values, lr=1e-2, fused=True),
    "adam, amsgrad": lambda values: torch.optim.Adam(values, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda values: torch.optim.SGD(values, lr=1e-2),
    "sgd, momentum": lambda values: torch.optim.SGD(values, lr=1e-2, momentum=0.9, nesterov=True),
    "two groups": lambda values: torch.optim.AdamW(
        [{"params": values[:2]}, {"params": values[2:], "weight_decay": 0.3}], lr=1e-2
    ),
}


ANY = {
    "rmsprop": lambda values: torch.optim.RMSprop(values, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda values: torch.optim.Adagrad(values, lr=1e-2),
    "adafactor": lambda values: torch.optim.Adafactor(values, lr=1e-2),
    "nadam": lambda values: torch.optim.NAdam(values, lr=1e-2),
    "radam": lambda values: torch.optim.RAdam(values, lr=1e-2),
    "adamax": lambda values: torch.optim.Adamax(values, lr=1e-2),
    "rprop": lambda values: torch.optim.Rprop(values, lr=1e-2),
    "asgd": lambda values: torch.optim.ASGD(values, lr=1e-2),
    "adadelta": lambda values: torch.optim.Adadelta(values),
}


@pytest.mark.parametrize("allow", [None, ("recompute", "reorder", "offload")])
@pytest.mark.parametrize("name", ANY)
def test_any_optimizer_updates_in_backward_to_the_same_bits(name, allow, tmp_path):
    """Through a file, and with a state, of whatever shape, that may be at home elsewhere."""
    one, plain, two, apart = pair(ANY[name])
    options = {"loss": total, "optimizer": apart, "optimizer_in_backward": True, "machine": QUICK, "allow": allow}
    memplan.plan(two, None, (X,), time_limit=1.0, **options).save(tmp_path / "plan.json")
    planned = memplan.load(tmp_path / "plan.json").apply(two, loss=total, optimizer=apart)
    assert train(one, plain, 4) == train(planned, apart, 4)
    assert same(one, two)
    assert same(plain, apart)


@pytest.mark.parametrize(
    ("name", "floor", "arena"), [*((name, False, False) for name in OPTIMIZERS), ("adamw", True, False), ("adamw", False, True)]
)
def test_twenty_steps_end_at_the_same_bits(name, floor, arena):
    """Losses, parameters, statistics and the optimizer's state; at the smallest budget and in an arena too."""
    one, plain, two, apart = pair(OPTIMIZERS[name])
    options = {"loss": total, "optimizer": apart, "optimizer_in_backward": True, "machine": QUICK, "arena": arena}
    plan = memplan.plan(two, None, (X,), time_limit=2.0, **options)
    if floor:
        plan = memplan.plan(two, plan.minimum, (X,), time_limit=2.0, **options)
        assert plan.counts.recompute > 0
    planned = plan.apply(two, optimizer=apart)
    assert train(one, plain, 20) == train(planned, apart, 20)
    assert same(one, two)
    assert same(plain, apart)


@pytest.mark.parametrize("fused", [False, True])
def test_small_parameters_are_updated_together(fused):
    """Forty biases in two calls, though they have settings of two kinds; weights one by one; with eager's bits."""

    def make(model):
        weights, biases = ([value for value in model.parameters() if value.dim() == rank] for rank in (2, 1))
        rows = [{"params": weights + biases[::2], "weight_decay": 0.1}, {"params": biases[1::2], "lr": 1e-2}]
        return torch.optim.AdamW(rows, lr=1e-3, fused=fused)

    one = nn.Sequential(*(nn.Linear(128, 128) for _ in range(40)))
    two = copy.deepcopy(one)
    plain, apart, x = make(one), make(two), torch.randn(2, 128)
    plan = memplan.plan(two, None, (x,), loss=total, optimizer=apart, optimizer_in_backward=True, machine=QUICK, time_limit=2.0)
    updates = [op for op in plan.program.ops if op.target == "optimizer.adamw"]
    assert len(updates) == 42
    assert sorted(op.name.endswith("more") for op in updates) == [False] * 40 + [True] * 2
    planned = plan.apply(two, optimizer=apart)
    for _ in range(3):
        for model, optimizer in ((one, plain), (planned, apart)):
            total(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(one, two)
    assert same(plain, apart)


@given(st.lists(st.integers(1, 3 * SMALL), min_size=1, max_size=90), st.randoms())
def test_rows_of_updates_are_small_and_hold_every_parameter_once(sizes, rng):
    """In the order in which gradients are complete, and within their part of all bytes."""
    when = {buffer: rng.randrange(20) for buffer in range(len(sizes))}
    rows = rows_of(dict(enumerate(sizes)), when)
    assert sorted(buffer for row in rows for buffer in row) == list(range(len(sizes)))
    for row in (row for row in rows if len(row) > 1):
        assert len(row) <= ROW
        assert sum(sizes[buffer] for buffer in row) <= sum(sizes) // PART
        assert all(sizes[buffer] < SMALL for buffer in row)
        assert [when[buffer] for buffer in row] == sorted(when[buffer] for buffer in row)


def test_schedulers_and_loaded_states_count():
    """The learning rate is what it is at the step; a loaded state is the one that is used."""
    one, plain, two, apart = pair(OPTIMIZERS["adamw"])
    plan = memplan.plan(two, None, (X,), loss=total, optimizer=apart, optimizer_in_backward=True, machine=QUICK, time_limit=2.0)
    planned = plan.apply(two, optimizer=apart)
    rates = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (plain, apart)]
    assert train(one, plain, 5, rates[0].step) == train(planned, apart, 5, rates[1].step)
    for model, optimizer in ((one, plain), (two, apart)):
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        model.load_state_dict(copy.deepcopy(one.state_dict()))
    assert train(one, plain, 3) == train(planned, apart, 3)
    assert same(one, two)


@pytest.mark.parametrize("in_backward", [False, True])
def test_temporaries_of_the_step_count(in_backward):
    """Adam's loop makes two of a parameter's size; they are there with the largest one, in the plan's peak too."""
    model, x = nn.Linear(512, 2048, bias=False), torch.randn(2, 512)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"loss": total, "optimizer_in_backward": in_backward, "machine": QUICK, "time_limit": 2.0}
    plan, fused = (
        memplan.plan(model, None, (x,), optimizer=each, **options)
        for each in (optimizer, torch.optim.AdamW(model.parameters(), fused=True))
    )
    size = 4 * 512 * 2048
    (update,) = [op for op in plan.program.ops if op.target == "optimizer.adamw"]
    assert update.workspace == 2 * size
    assert plan.peak >= plan.program.resident_bytes + 3 * size
    assert plan.peak >= fused.peak + size


def test_gradients_do_not_pile_up():
    """Unplanned they are all there when the step ends; in backward none is, and the peak is lower for it."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    x = torch.randn(2, 64)
    after = memplan.plan(model, None, (x,), loss=total, optimizer="sgd", machine="rtx4090")
    during = memplan.plan(model, None, (x,), loss=total, optimizer="sgd", machine="rtx4090", optimizer_in_backward=True)
    gradients = sum(buffer.bytes for buffer in after.program.buffers if buffer.kind is Kind.GRADIENT)
    assert during.unplanned.peak == after.unplanned.peak
    assert during.peak < after.peak - 0.8 * gradients
    assert not any(during.program.buffers[buffer].kind is Kind.GRADIENT for buffer in during.program.outputs)
    assert not any(op.phase is Phase.UPDATE for op in during.program.ops)


def test_a_saved_plan_trains_the_same(tmp_path):
    """Through its file."""
    one, plain, two, apart = pair(OPTIMIZERS["adamw"])
    memplan.plan(
        two, "97%", (X,), loss=total, optimizer=apart, optimizer_in_backward=True, machine=QUICK, time_limit=2.0
    ).save(tmp_path / "plan.json")  # fmt: skip
    planned = memplan.load(tmp_path / "plan.json").apply(two, total, apart)
    assert train(one, plain, 3) == train(planned, apart, 3)
    assert same(one, two)


def test_wrong_use_is_refused():
    """One line each, saying what to do."""
    _, _, model, optimizer = pair(OPTIMIZERS["adamw"])
    options = {"loss": total, "machine": QUICK, "time_limit": 2.0}
    with pytest.raises(memplan.CaptureError, match="wants an optimizer"):
        memplan.plan(model, None, (X,), optimizer_in_backward=True, **options)
    with pytest.raises(memplan.CaptureError, match="train=True"):
        memplan.plan(model, None, (X,), optimizer="adamw", optimizer_in_backward=True, train=False)
    plan = memplan.plan(model, None, (X,), optimizer=optimizer, optimizer_in_backward=True, **options)
    with pytest.raises(memplan.MemplanError, match="wants an optimizer"):
        plan.apply(model)
    with pytest.raises(memplan.PlanMismatch, match="AdamW, not for SGD"):
        plan.apply(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(memplan.PlanMismatch, match="does not hold"):
        plan.apply(model, optimizer=torch.optim.AdamW(model.b.parameters()))
    with pytest.raises(memplan.MemplanError, match="does not take an optimizer"):
        memplan.plan(model, None, (X,), **options).apply(model, optimizer=optimizer)
    hook = optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(memplan.MemplanError, match="hooks on its step"):
        plan.apply(model, optimizer=optimizer)
    hook.remove()
    hooks = [model.a.weight.register_hook(lambda g: g), model.b.weight.register_post_accumulate_grad_hook(lambda p: None)]
    for hook in hooks:
        with pytest.raises(memplan.MemplanError, match="hooks on its gradient"):
            plan.apply(model, optimizer=optimizer)
        hook.remove()
    planned = plan.apply(model, optimizer=optimizer)
    with pytest.raises(memplan.MemplanError, match="cannot be copied"):
        copy.deepcopy(planned)
    model.a.weight.grad = torch.zeros_like(model.a.weight)
    with pytest.raises(memplan.MemplanError, match="zero_grad"):
        planned(X)


def test_a_step_that_fails_halfway_says_so(monkeypatch):
    """How many parameters have been updated, of how many."""
    _, _, model, optimizer = pair(OPTIMIZERS["sgd"])
    plan = memplan.plan(
        model, None, (X,), loss=total, optimizer=optimizer, optimizer_in_backward=True, machine=QUICK, time_limit=2.0
    )
    planned = plan.apply(model, optimizer=optimizer)
    loss = total(planned(X))
    step, calls = torch.optim.SGD.step, []

    def failing(self):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no more")
        return step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", failing)
    with pytest.raises(memplan.MemplanError, match=r"updated 2 of 6 parameters.*no more"):
        loss.backward()

"""Parameters and optimizer state at home on a disk: the bits of a step that has them all in memory."""

import copy
import errno
import gc
import math
import os
import weakref
from functools import cache

import memplan
import pytest
import torch
from memplan import bring_back
from memplan.backends.eager.fetched import is_away
from memplan.backends.tiers import spacefile
from memplan.passes.homes import Homes
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.ir.program import Kind
from memplan.planner.verbs.session import Session
from torch import nn

WIDTH = 160  # a weight of 100 KiB: what is smaller stays
MACHINE = Machine(
    "tiered", "cpu",
    (Tier("device", 1 << 34, 1e10, alignment=64), Tier("disk", 1 << 34, 1e10, alignment=64)),
    (Unit("cores", "device", {"default": 1e9}),),
    (Link("device", "disk", 1e9), Link("disk", "device", 1e9)),
)  # fmt: skip
X = torch.randn(4, WIDTH)
ALLOW = ("recompute", "reorder", "offload")
OPTIMIZERS = {
    "adamw": lambda values: torch.optim.AdamW(values, lr=1e-3),
    "adam, amsgrad": lambda values: torch.optim.Adam(values, lr=1e-3, amsgrad=True),
    "sgd, momentum": lambda values: torch.optim.SGD(values, lr=1e-3, momentum=0.9),
}


@pytest.fixture(autouse=True)
def offload_here(tmp_path, monkeypatch):
    """Files lie where the test looks; nothing is left there."""
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(spacefile, "IN_MEMORY", set())
    yield
    assert not (tmp_path / "offload").is_dir() or not os.listdir(tmp_path / "offload")


def net() -> nn.Module:
    """Layers of which the last has the first one's weight."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(each for _ in range(4) for each in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1))))
    layers.append(nn.Linear(WIDTH, WIDTH))
    layers[-1].weight = layers[0].weight
    return layers


def total(out):
    """The loss."""
    return (out * out).sum()


@cache
def planned_for(name: str, more: int) -> memplan.Plan:
    """A plan for the fewest bytes that will do, and some more."""
    model = net()
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    session = Session(
        model, (X,), allow=ALLOW, loss=total, optimizer=optimizer, optimizer_in_backward=True, machine=MACHINE, time_limit=2.0
    )
    return session.plan(session.planner.floor.peak + more)


def made(name: str = "adamw", more: int = 0):
    """A model with its optimizer, the same planned and with another optimizer, and the plan."""
    one, two = net(), net()
    plain, apart = OPTIMIZERS[name]([*one.parameters()]), OPTIMIZERS[name]([*two.parameters()])
    plan = planned_for(name, more)
    return one, plain, plan.apply(two, optimizer=apart), apart, plan


def train(model, optimizer, steps=3, first=0):
    """Losses of some steps."""
    losses = []
    for number in range(first, first + steps):
        torch.manual_seed(number)
        loss = total(model(X))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(thing) -> list:
    """All there is in a `state_dict`."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(thing.state_dict())
    return sorted((str(path), torch.as_tensor(leaf).tolist()) for path, leaf in leaves if leaf is not None)


def absent(model, optimizer) -> int:
    """Parameters and states that have no memory now."""
    kept = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    return sum(is_away(value) for value in (*model.parameters(), *kept))


LONG = pytest.mark.slow
TWENTY = [pytest.param(name, 0, marks=() if name == "adamw" else LONG) for name in OPTIMIZERS]


@pytest.mark.parametrize(("name", "more"), [*TWENTY, pytest.param("adamw", 500_000, marks=LONG)])
def test_twenty_steps_end_at_the_same_bits(name, more):
    """Where the budget is less than the parameters and their state; and with some of them there."""
    one, plain, planned, apart, plan = made(name, more)
    resident = plan.program.resident_bytes
    assert plan.peak < resident
    assert train(one, plain, 20) == train(planned, apart, 20)
    homes = {buffer for buffer, _ in plan.schedule.homes}
    assert absent(planned, apart) == len(homes) > 0
    assert bits(one) == bits(planned)
    assert bits(plain) == bits(apart)
    assert absent(planned, apart) == 0  # for `state_dict` has brought them back
    assert train(one, plain, 2) == train(planned, apart, 2)
    assert absent(planned, apart) == len(homes)


def test_what_is_loaded_counts():
    """State dicts loaded in the middle of training, into the model and the optimizer."""
    one, plain, planned, apart, _ = made()
    train(one, plain)
    train(planned, apart, 1)
    planned.load_state_dict(copy.deepcopy(one.state_dict()))
    apart.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert train(one, plain) == train(planned, apart)
    assert bits(one) == bits(planned)


def test_an_evaluation_and_a_dropped_step_find_everything():
    """Without gradients the model itself runs, on parameters that are back; a forward pass alone changes none."""
    one, plain, planned, apart, _ = made()
    assert train(one, plain) == train(planned, apart)
    torch.manual_seed(5)
    pending = planned(X)
    assert pending.requires_grad
    del pending
    with torch.no_grad():
        torch.manual_seed(9)
        wanted = one(X)
        torch.manual_seed(9)
        assert torch.equal(planned(X), wanted)
    assert train(one, plain, 2, 10) == train(planned, apart, 2, 10)
    bring_back(planned.parameters())
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), planned.parameters(), strict=True))


def test_two_steps_at_once_are_refused():
    """The second would send away what the first has fetched; once the first is dropped, the second may run."""
    one, plain, planned, apart, _ = made()
    assert train(one, plain, 1) == train(planned, apart, 1)
    first = total(planned(X))
    with pytest.raises(memplan.MemplanError, match="waits for its backward pass"):
        planned(X)
    del first
    assert train(one, plain, 2) == train(planned, apart, 2)
    assert bits(one) == bits(planned)


def test_a_plan_may_be_applied_again():
    """The second planned module finds what the first one has at home, and the first what the second has."""
    one, plain, first, apart, plan = made()
    assert train(one, plain, 2) == train(first, apart, 2)
    second = plan.apply(model_of(first), optimizer=apart)
    assert train(one, plain, 2) == train(second, apart, 2)
    assert train(one, plain, 2) == train(first, apart, 2)
    assert bits(one) == bits(second)


def model_of(planned):
    """The module again as it was before it was planned."""
    model = copy.copy(planned)
    del model.__dict__["forward"]
    return model


def test_parameters_are_streamed_through_an_inference():
    """A model of more bytes than the device holds gives its own outputs."""
    model = net().eval()
    with torch.no_grad():
        wanted = model(X)
    options = {"train": False, "machine": MACHINE, "allow": ALLOW, "time_limit": 2.0}
    session = Session(model, (X,), **options)
    plan = session.plan(session.planner.floor.peak)
    weights = sum(buffer.bytes for buffer in plan.program.buffers if buffer.kind is Kind.PARAMETER)
    assert plan.peak < 0.7 * weights
    planned = plan.apply(model)
    with torch.no_grad():
        assert torch.equal(planned(X), wanted)
        assert torch.equal(planned(X), wanted)
    assert any(is_away(value) for value in model.parameters())
    assert bits(model) == bits(net())


def test_memory_that_is_somebody_elses_is_left_to_them():
    """Weights in an array of numpy's, which cannot be taken away: the step uses a copy, and the array stays as it was."""
    model = net().eval()
    arrays = [value.detach().numpy().copy() for value in model.parameters()]
    for value, array in zip(model.parameters(), arrays, strict=True):
        value.data = torch.from_numpy(array)
    with torch.no_grad():
        wanted = model(X)
    session = Session(model, (X,), train=False, machine=MACHINE, allow=ALLOW, time_limit=2.0)
    planned = session.plan(session.planner.floor.peak).apply(model)
    with torch.no_grad():
        assert torch.equal(planned(X), wanted)
    bring_back(model.parameters())
    assert all((value.detach().numpy() == array).all() for value, array in zip(model.parameters(), arrays, strict=True))


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_fault_of_the_disk_says_what_has_been_updated(call, monkeypatch):
    """One clear error; it does not hang, and later steps do not go on as if nothing had been."""
    one, plain, planned, apart, _ = made()
    assert train(one, plain, 2) == train(planned, apart, 2)
    calls, real = [], getattr(os, call)

    def failing(*args):
        calls.append(1)
        if len(calls) > (6 if call == "preadv" else 1):
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(memplan.MemplanError, match=r"Input/output error|updated \d+ of"):
            train(planned, apart, 2)
        with pytest.raises(memplan.MemplanError, match="Input/output error"):
            train(planned, apart, 1)
    assert all(torch.isfinite(value).all() for value in planned.state_dict().values())
    assert all(math.isfinite(loss) for loss in train(planned, apart, 2, 2))


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_after_a_fault_before_any_update_nothing_is_lost(call, monkeypatch):
    """One transient fault while parameters travel: the step is refused, and the next one is eager's."""
    model = net().eval()
    with torch.no_grad():
        wanted = model(X)
    session = Session(model, (X,), train=False, machine=MACHINE, allow=ALLOW, time_limit=2.0)
    planned = session.plan(session.planner.floor.peak).apply(model)
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with torch.no_grad():
        with pytest.raises(memplan.MemplanError, match="Input/output error"):
            planned(X)
        assert torch.equal(planned(X), wanted)
    assert bits(model) == bits(net())


def test_a_parameter_that_is_away_reads_as_not_a_number():
    """Nothing that a script may do to one between steps crashes, or goes on with other numbers unseen."""
    one, plain, planned, apart, _ = made()
    train(planned, apart, 1)
    value = next(value for value in planned.parameters() if is_away(value))
    assert value.shape == (WIDTH, WIDTH)
    assert value.norm().isnan()
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        value.mul_(0.5)
    bring_back([value])
    assert value.is_contiguous()
    assert value.norm().isfinite()
    train(one, plain, 1)
    assert train(one, plain, 2, 1) == train(planned, apart, 2, 1)


def test_memory_that_a_view_holds_is_not_taken_from_under_it():
    """It could not be freed, and the view would go on with old numbers."""
    _, _, planned, apart, _ = made()
    view = next(iter(planned.parameters())).data[1:]
    with pytest.raises(memplan.MemplanError, match=r"memory of 0\.weight .* held by another tensor"):
        train(planned, apart, 1)
    assert not any(is_away(value) for value in [next(iter(planned.parameters()))])
    del view
    assert all(math.isfinite(loss) for loss in train(planned, apart, 1))


def test_parameters_in_one_flat_tensor_stay():
    """Sending away a tensor that shares its memory would take the others' too."""
    model = net().eval()
    flat = torch.cat([model[0].weight.detach().flatten(), model[3].weight.detach().flatten()])
    for layer, part in zip((model[0], model[3]), flat.chunk(2), strict=True):
        layer.weight.data = part.view(WIDTH, WIDTH)
    with torch.no_grad():
        wanted = model(X)
    session = Session(model, (X,), train=False, machine=MACHINE, allow=ALLOW, time_limit=2.0)
    planned = session.plan(session.planner.floor.peak).apply(model)
    with torch.no_grad():
        assert torch.equal(planned(X), wanted)
    assert not is_away(model[0].weight)
    assert is_away(model[6].weight)


def test_plans_applied_one_after_the_other_leave_no_files(tmp_path):
    """The model keeps what has the contents of its parameters, and no more."""
    model = net().eval()
    session = Session(model, (X,), train=False, machine=MACHINE, allow=ALLOW, time_limit=2.0)
    plan = session.plan(session.planner.floor.peak)
    gc.collect()
    others = len(spacefile.FILES)
    for _ in range(4):
        planned = plan.apply(model)
        with torch.no_grad():
            planned(X)
    gc.collect()
    assert len(spacefile.FILES) == others + 1
    assert bits(model) == bits(net())


def test_a_planned_model_is_freed_with_its_files():
    """Nothing holds parameters, state or files when the last reference goes; a parameter kept alone says what is missing."""
    others = list(spacefile.FILES)
    _, _, planned, apart, _ = made()
    train(planned, apart, 1)
    tensors = [weakref.ref(value) for value in planned.parameters()]
    kept = next(value for value in planned.parameters() if is_away(value))
    mine = [weakref.ref(file) for file in spacefile.FILES if file not in others]
    assert mine
    del planned, apart
    gc.collect()
    with pytest.raises(memplan.MemplanError, match="contents are gone"):
        bring_back([kept])
    del kept
    gc.collect()
    assert not any(reference() is not None for reference in tensors)
    assert not any(reference() is not None for reference in mine)


def test_only_what_the_step_itself_updates_leaves_the_device():
    """Without updates in backward the caller's optimizer needs parameters and state where they are."""
    options = {"loss": total, "machine": MACHINE, "allow": ALLOW, "time_limit": 2.0}
    plan = memplan.plan(net(), None, (X,), optimizer="adamw", **options)
    assert Homes()(plan.program) == ()
    plan = memplan.plan(net(), None, (X,), optimizer="adamw", optimizer_in_backward=True, **options)
    kinds = [plan.program.buffers[buffer].kind for buffer in Homes()(plan.program)]
    assert {*kinds} == {Kind.STATE, Kind.PARAMETER}
    assert kinds == sorted(kinds, key=(Kind.STATE, Kind.PARAMETER).index)
    first = plan.program.buffers[Homes()(plan.program)[0]].bytes
    assert len(Homes(room=first)(plan.program)) == 1
    assert Homes(room=first - 1)(plan.program) == ()


def test_homes_without_room_are_refused():
    """`host_budget` limits them as well."""
    options = {"loss": total, "optimizer": "adamw", "optimizer_in_backward": True, "machine": MACHINE, "time_limit": 2.0}
    least = planned_for("adamw", 0).minimum
    with pytest.raises(memplan.BudgetError) as caught:
        memplan.plan(net(), least, (X,), allow=ALLOW, host_budget="300KiB", **options)
    assert caught.value.minimum > least + 500_000


def test_a_planned_model_that_moves_its_parameters_is_not_copied():
    """Its code names them."""
    *_, planned, apart, _ = made()
    for _ in range(2):
        with pytest.raises(memplan.MemplanError, match="cannot be copied"):
            copy.deepcopy(planned)
        train(planned, apart, 1)

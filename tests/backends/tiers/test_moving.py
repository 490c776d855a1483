"""Steps that move activations between memory and a disk: eager's numbers, within the budget, whatever goes wrong."""

import copy
import errno
import gc
import os
import time
from functools import cache

import memplan
import msgspec
import pytest
import torch
from memplan.backends.tiers import filetier, spacefile
from memplan.backends.tiers.moving import blank, places_of
from memplan.planner.ir.errors import MemplanError
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.verbs.session import Session
from torch import nn
from torch.nn import functional

WIDTH, ROWS, LAYERS = 32, 64, 4
MACHINE = Machine(
    "tiered", "cpu",
    (Tier("device", 1 << 34, 1e10, alignment=64), Tier("disk", 1 << 34, 1e10, alignment=64)),
    (Unit("cores", "device", {"default": 1e9}),),
    (Link("device", "disk", 1e9), Link("disk", "device", 1e9)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def offload_here(tmp_path, monkeypatch):
    """Files lie where the test looks; nothing is left there."""
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(spacefile, "IN_MEMORY", set())
    yield
    assert not (tmp_path / "offload").is_dir() or not os.listdir(tmp_path / "offload")


class Block(nn.Module):
    """Attention-free, with dropout, a norm over the batch, an operation in place, and views."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + functional.dropout(self.down(torch.tanh(left) * (right * 2).relu_()), 0.2)


@cache
def planned_for(arena: bool, share: float, allow: tuple[str, ...], bandwidth: float, host_budget: int | None) -> memplan.Plan:
    """A plan for a share of the way from the least bytes to those of the step as it is."""
    torch.manual_seed(0)
    links = Link("device", "disk", bandwidth), Link("disk", "device", bandwidth)
    session = Session(
        blocks(), (torch.randn(ROWS, WIDTH),), allow=allow, loss=total, time_limit=2.0, host_budget=host_budget,
        machine=msgspec.structs.replace(MACHINE, links=links),
    )  # fmt: skip
    session.planner.deadline = session.static_planner.deadline = time.monotonic() + 1.0
    least = session.static_floor.peak if arena else session.planner.floor.peak
    return session.plan(least + int(share * max(session.planner.kept.peak - least, 0)), arena)


def total(out: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return out.sum()


def blocks() -> nn.Module:
    """The model."""
    return nn.Sequential(*(Block() for _ in range(LAYERS)))


def made(
    arena: bool = False, share: float = 0.3, allow: tuple[str, ...] = ("offload",), bandwidth: float = 1e9,
    host_budget: int | None = None,
) -> tuple[memplan.Plan, nn.Module, nn.Module, torch.Tensor]:  # fmt: skip
    """A plan, the planned model, a copy of the model as it was, and an input."""
    plan = planned_for(arena, share, allow, bandwidth, host_budget)
    torch.manual_seed(1)
    model, other = blocks(), blocks()
    other.load_state_dict(model.state_dict())
    return plan, plan.apply(model), other, torch.randn(ROWS, WIDTH)


def same_step(planned: nn.Module, other: nn.Module, x: torch.Tensor, seed: int) -> None:
    """One step of each has the same outputs, gradients and statistics, bit for bit."""
    outputs = []
    for net in (planned, other):
        torch.manual_seed(seed)
        net.zero_grad()
        out = net(x)
        out.sum().backward()
        outputs.append(out.detach())
    assert torch.equal(*outputs)
    for found, wanted in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
    for found, wanted in zip(planned.buffers(), other.buffers(), strict=True):
        assert torch.equal(found, wanted)


def traffic_of(planned: nn.Module) -> dict:
    """What the planned module has moved."""
    (tier,) = planned.forward.code.tiers.values()  # type: ignore[union-attr]
    return tier.traffic


@pytest.mark.parametrize("arena", [False, True])
def test_moved_steps_have_eagers_bits(arena):
    """Several steps; and what was planned to be moved is what is moved."""
    plan, planned, other, x = made(arena)
    assert plan.counts.offload > 0
    assert plan.counts.recompute == 0
    for seed in range(3):
        same_step(planned, other, x, seed)
    moved, traffic = plan.moved, traffic_of(planned)
    assert traffic["out"].bytes == 3 * moved["device to disk"]
    assert traffic["in"].bytes == 3 * moved["disk to device"]


@pytest.mark.parametrize("bandwidth", [3e6, 3e7, 1e9])
def test_offload_is_never_slower_than_doing_without(bandwidth):
    """However short the search is."""
    torch.manual_seed(0)
    links = Link("device", "disk", bandwidth), Link("disk", "device", bandwidth)
    session = Session(
        blocks(), (torch.randn(ROWS, WIDTH),), allow=("offload", "recompute", "reorder"), loss=total, time_limit=60.0,
        machine=msgspec.structs.replace(MACHINE, links=links),
    )  # fmt: skip
    planner = session.planner
    planner.effort = 1
    still = planner.still
    assert still is not None
    assert still.still is None
    for share in (0.1, 0.4, 0.7):
        budget = still.floor.peak + int(share * (planner.kept.peak - still.floor.peak))
        assert planner.solve(budget).found.time <= still.solve(budget).found.time


def test_both_levers_together():
    """Recomputation of what is made from what was moved."""
    plan, planned, other, x = made(share=0.2, allow=("offload", "recompute", "reorder"), bandwidth=3e7)
    assert plan.counts.recompute > 0
    assert plan.counts.offload > 0
    same_step(planned, other, x, 4)


def test_a_plan_with_moves_is_saved_and_loaded(tmp_path):
    """The file has the machine with its tiers and links."""
    plan, _, other, x = made()
    plan.save(tmp_path / "plan.json")
    again = memplan.load(tmp_path / "plan.json")
    assert again.counts == plan.counts
    model = blocks()
    model.load_state_dict(other.state_dict())
    same_step(again.apply(model, loss=total), other, x, 5)


@pytest.mark.filterwarnings("ignore:a forward pass began")
def test_two_steps_at_once_and_a_dropped_one():
    """Each step between its passes has a space of its own; one that is dropped gives it back."""
    _, planned, other, x = made()
    planned(x)
    gc.collect()
    first, second = planned(x), planned(2 * x)
    second.sum().backward()
    first.sum().backward()
    planned.zero_grad()
    other.load_state_dict(planned.state_dict())
    same_step(planned, other, x, 6)
    (tier,) = planned.forward.code.tiers.values()  # type: ignore[union-attr]
    assert len(tier.free) <= 2


def test_the_tiers_capacity_is_a_budget_of_its_own():
    """With less room behind the device less is moved; with none the plan is refused, naming a budget that works."""
    plan, *_ = made()
    half = plan.planned.report.peak[1] // 2
    tight, planned, other, x = made(host_budget=half)
    assert 0 < tight.planned.report.peak[1] <= half
    assert tight.minimum > plan.minimum
    same_step(planned, other, x, 8)


def test_where_nothing_is_gained_nothing_is_moved():
    """A step that fits is left alone, and the summary says so."""
    torch.manual_seed(0)
    plan = memplan.plan(blocks(), None, (torch.randn(ROWS, WIDTH),), machine=MACHINE, allow=["offload"], loss=total,
                        time_limit=1.0)  # fmt: skip
    assert plan.counts.offload == 0
    assert plan.moved == {}
    assert "moved" not in plan.summary()
    assert "for the backward pass: " in plan.summary()


FAULTS = {
    "disk full": ("pwrite", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    "write error": ("pwrite", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "read error": ("preadv", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "short read": ("preadv", 0, "short read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_disk_is_one_clear_error(fault, monkeypatch):
    """Parameters are as they were, no gradient is half made, and the next step works."""
    _, planned, other, x = made()
    before = [value.clone() for value in planned.parameters()]
    call, answer, message = FAULTS[fault]

    def fail(*_: object) -> int:
        if isinstance(answer, OSError):
            raise answer
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(filetier.os, call, fail)
        with pytest.raises(MemplanError, match=message):
            planned(x).sum().backward()
    assert all(value.grad is None for value in planned.parameters())
    assert all(torch.equal(one, two) for one, two in zip(planned.parameters(), before, strict=True))
    other.load_state_dict(planned.state_dict())
    same_step(planned, other, x, 7)


def test_no_room_is_refused_before_the_first_step(monkeypatch):
    """The file's blocks are reserved when the plan is applied."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spacefile.os, "posix_fallocate", full)
    with pytest.raises(MemplanError, match="MEMPLAN_OFFLOAD"):
        made()


def test_addresses_in_a_tier_do_not_overlap():
    """What is there at the same time lies apart, and the tier is as large as the highest of them."""
    plan, *_ = made()
    offsets, ends = places_of(plan.program, plan.machine, plan.schedule)
    size = plan.program.buffers
    assert set(ends) == {1}
    assert ends[1] == max(offset + size[buffer].bytes for (buffer, _), offset in offsets.items())
    assert ends[1] >= plan.planned.report.peak[1]


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t(), lambda x: x[1:, 2:], lambda x: x[:, ::2]])
def test_a_blank_tensor_has_the_layout_and_the_storage(layout):
    """Shape, strides, offset and bytes are those of the value it is made for."""
    like = layout(torch.randn(6, 7, dtype=torch.bfloat16))
    found = blank(like, "cpu")()
    assert (found.dtype, found.shape, found.stride()) == (like.dtype, like.shape, like.stride())
    assert found.storage_offset() == like.storage_offset()
    assert found.untyped_storage().nbytes() == like.untyped_storage().nbytes()


@pytest.mark.parametrize("arena", [False, True])
def test_a_deep_copy_moves_values_of_its_own(arena):
    """A copy of a planned model shares the code and the tiers, not the parameters."""
    _, planned, other, x = made(arena)
    twin = copy.deepcopy(planned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(twin.state_dict())
    same_step(twin, other, x, 9)
    other.load_state_dict(planned.state_dict())
    same_step(planned, other, x, 10)

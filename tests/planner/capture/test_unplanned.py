"""The unplanned step is eager's: what runs in which pass, what is held how long, and that no plan starts from worse."""

import copy
import runpy
from pathlib import Path

import memplan
import pytest
import torch
from memplan.backends.measure.training import Request, in_fresh_process
from memplan.passes.defer import Defer
from memplan.planner.ir.program import Phase
from memplan.planner.verbs.session import Session
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

FILE = Path(__file__).parents[3] / "benchmarks" / "losses.py"
LOSSES = runpy.run_path(str(FILE))["LOSSES"]
EXACT = ("gradient_penalty", "gradient_by_func", "kept_masks")  # nothing but autograd holds memory beyond its last use


def session_of(name: str, **options) -> Session:
    """A model of `losses.py` on a machine whose costs are modelled."""
    model, args = LOSSES[name]()
    return Session(model, args, machine="h100-80gb", time_limit=5.0, **options)


@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "contrastive_in_blocks"])
def test_gradients_made_in_forward_stay_there_and_chunks_finish_one_by_one(name):
    """No op that makes or reads a chunk's logits waits for the backward pass, in no order that plans start from."""
    planner = session_of(name).begin()
    program = planner.program
    early = [op for op in program.ops[: program.boundary] if op.target in ("aten.exp.default", "aten.scatter_add.default")]

    assert len(early) == 16
    assert planner.kept.peak <= planner.unplanned.peak
    assert set(planner.orders[0][: program.boundary]) == set(range(program.boundary))


def test_masks_are_made_where_eager_makes_them():
    """In the forward pass, and they stay there, for what they are made of is larger and would have to be kept."""
    planner = session_of("kept_masks").begin()
    program = planner.program
    masks = [index for index, op in enumerate(program.ops) if op.target == "aten.gt.Scalar"]
    order = Defer()(program)

    assert [program.ops[index].phase for index in masks] == [Phase.FORWARD] * 2
    assert [order.index(index) < order.index(program.boundary) for index in masks] == [True, True]
    assert planner.kept.peak <= planner.unplanned.peak


@pytest.mark.parametrize("name", LOSSES)
def test_planned_bits_are_eagers(name):
    """Loss and gradients of the smallest step, and of the fastest, are eager's; neither takes more than the unplanned one."""
    model, args = LOSSES[name]()
    session = Session(model, args, machine="h100-80gb", time_limit=2.0)
    reference = copy.deepcopy(model)
    expected = reference(*args)
    expected.backward()
    for budget in (None, session.begin().floor.peak):
        plan = session.plan(budget)
        model.zero_grad(set_to_none=True)
        loss = plan.apply(model)(*args)
        loss.backward()

        assert plan.peak <= plan.unplanned.peak
        assert torch.equal(loss, expected)
        for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(got.grad, wanted.grad)


HEAP = 512 << 10  # bytes that the heap may hold beside tensors, more or less in each process
QUICK = ("kept_masks", "fused_linear_cross_entropy", "chunked_with_checkpoints")


@pytest.mark.parametrize("name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in LOSSES])
def test_eagers_peak_is_the_measured_one(name):
    """Within 3 %, or half a MiB; the unplanned one where the model's code holds no tensors and no function saves for nobody."""
    measured = in_fresh_process(Request(f"{FILE}:{name}", None, 2)).peak
    model, args = LOSSES[name]()
    session = Session(model, args, time_limit=0.0)

    assert measured is None or session.eager_peak == pytest.approx(measured, rel=0.03, abs=HEAP)
    assert (
        measured is None or name not in EXACT or session.begin().unplanned.peak == pytest.approx(measured, rel=0.03, abs=HEAP)
    )


class Holds(nn.Module):
    """Tensors of 4 KiB, one more of which lives where a variable outlives its use."""

    def __init__(self, holds: bool):
        super().__init__()
        self.weight, self.holds = nn.Parameter(torch.ones(1024)), holds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            first = x + 1
            second = first + 1
            if not self.holds:
                del first
            third = second + 1
        return (third * self.weight).sum()


@pytest.mark.parametrize("holds", [False, True])
def test_a_variable_counts_until_its_name_is_gone(holds):
    """The parameter, the input, `second`, `third`, the product, its sum, and perhaps `first`."""
    session = Session(Holds(holds), (torch.ones(1024),), machine="h100-80gb", time_limit=0.0)
    moments = session.captured.moments

    assert moments is not None
    assert max(live for live, _ in moments.values()) == 4096 * (5 + holds) + 4
    plan = session.plan(None)
    assert plan.eager_peak == 4096 * (5 + holds) + 4
    assert "eager mode takes 2" in plan.summary()


def test_eagers_peak_is_kept_in_a_file(tmp_path):
    """And where nobody knows it, nothing is said: the loss is the caller's, or nothing is trained."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.ones(32, 64)
    options = {"machine": "h100-80gb", "time_limit": 0.0}
    Session(Holds(True), (torch.ones(1024),), **options).plan(None).save(tmp_path / "plan.json")

    assert memplan.load(tmp_path / "plan.json").eager_peak == 4096 * 6 + 4
    assert Session(model, (x,), loss=torch.sum, **options).plan(None).eager_peak is None
    assert Session(model, (x,), train=False, **options).plan(None).eager_peak is None


def test_backward_ops_know_their_autograd_node():
    """Ops of one node share a number, which never comes again later; sums of gradients are between nodes."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, use_cache=False))
    ids = torch.zeros(2, 8, dtype=torch.long)
    program = Session(model, (), {"input_ids": ids, "labels": ids}, machine="h100-80gb", time_limit=0.0).planner.program
    groups = [op.group for op in program.ops[program.boundary + 1 :]]
    numbers = [group for group in groups if group > 0]

    assert numbers == sorted(numbers)
    assert {op.target for op in program.ops if op.group < 0} == {"aten.add.Tensor"}
    assert all(op.group == 0 for op in program.ops[: program.boundary])

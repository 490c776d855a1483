"""The unplanned step is eager's: what runs in which pass, what is held how long, and that no plan starts from worse."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from memplan.backends.trial import Request, in_fresh_process
from memplan.passes.defer import Defer
from memplan.planner.api import Session
from memplan.planner.program import Phase
from transformers import GPT2Config, GPT2LMHeadModel

FILE = Path(__file__).parents[2] / "benchmarks" / "losses.py"
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


@pytest.mark.parametrize("name", [EXACT[-1], *(pytest.param(each, marks=pytest.mark.slow) for each in EXACT[:-1])])
def test_the_unplanned_peak_is_the_measured_one(name):
    """Within 3 %, where neither the model's code holds tensors in variables nor a function saves what nobody reads."""
    measured = in_fresh_process(Request(f"{FILE}:{name}", None, 2)).peak
    model, args = LOSSES[name]()
    predicted = Session(model, args, time_limit=0.0).begin().unplanned.peak

    assert measured is None or predicted == pytest.approx(measured, rel=0.03)


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

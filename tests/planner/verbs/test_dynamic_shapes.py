"""`dynamic_shapes=`: one plan for every size up to its bounds, in the words of `torch.export`."""

import copy

import memplan
import msgspec
import pytest
import torch
from memplan.planner.ir.errors import BudgetError, CaptureError, MemplanError, PlanMismatch
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Varying
from memplan.planner.verbs.dynamicshapes import varying
from torch import nn
from torch.export import Dim
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
BATCH, LENGTH = Dim("batch", min=2, max=6), Dim("length", max=24)
SHAPES = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "labels")}


def gpt2() -> nn.Module:
    """A small one."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).train()


def call(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Arguments."""
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: nn.Module, given: dict) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**given).loss
    loss.backward()
    return [loss.detach(), *(value.grad for value in model.parameters())]


@pytest.mark.parametrize("shapes", [
    {"a": {0: Dim("batch", max=8)}, "b": None},
    ({0: Dim("batch", max=8)},),
    [[Dim("batch", max=8), None], None],
    {"a": (Dim("batch", max=8), 4)},
])  # fmt: skip
def test_the_forms_of_torch_export(shapes):
    """By name or in order, by dimension or one for each."""
    assert varying(shapes, ["a", "b"]) == (Varying("a", 0, "batch", 0, 8),)


def test_names_hints_and_bounds():
    """A string is a size without bounds, a hint one of its own; what is static does not vary."""
    shapes = {"a": {0: "batch", 1: Dim.DYNAMIC(max=9), 2: Dim.STATIC}}
    assert varying(shapes, ["a"]) == (Varying("a", 0, "batch"), Varying("a", 1, "a.1", 0, 9))


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ("batch", "dynamic_shapes='batch': write"),
        ({"c": {0: "batch"}}, "names 'c', and the call has a, b"),
        ({"a": {0: 3.5}}, "says 3.5 of dimension 0 of a"),
        ({"a": {0: 2 * Dim("half")}}, "what is computed from another size is found out by itself"),
        ({"a": [{0: "batch"}]}, "of a, which has to be a tensor"),
        ({"a": None}, "lets no size vary"),
    ],
)
def test_what_cannot_be_read_is_refused(shapes, match):
    """With how to write it."""
    with pytest.raises(MemplanError, match=match):
        varying(shapes, ["a", "b"])


def test_one_plan_serves_every_size_with_eagers_bits(tmp_path):
    """Up to the bounds; also from a file."""
    model = gpt2()
    twin = copy.deepcopy(model)
    made = memplan.plan(model, None, kwargs=call(3, 8), machine=QUICK, dynamic_shapes=SHAPES)
    made.save(tmp_path / "plan.json")
    for planned in (made.apply(model), memplan.load(tmp_path / "plan.json").apply(model)):
        for rows, length in ((3, 8), (6, 24), (2, 2), (5, 17)):
            found, wanted = step(planned, call(rows, length)), step(twin, call(rows, length))
            assert all(map(torch.equal, found, wanted))
        for rows, length in ((7, 8), (3, 25), (1, 8)):
            with pytest.raises(PlanMismatch):
                planned(**call(rows, length))


def test_the_budget_holds_at_the_largest_sizes():
    """It is planned for those; what is larger than fits is refused."""
    model = gpt2()
    top = memplan.plan(model, None, kwargs=call(6, 24), machine=QUICK)
    budget = (top.peak + top.minimum) // 2
    made = memplan.plan(model, budget, kwargs=call(3, 8), machine=QUICK, dynamic_shapes=SHAPES)
    assert made.peak < budget  # the example is smaller than what was planned for
    planned = made.apply(model)
    twin = gpt2()
    assert all(map(torch.equal, step(planned, call(6, 24)), step(twin, call(6, 24))))
    with pytest.raises(BudgetError, match="at batch=6, length=24: no schedule"):
        memplan.plan(model, top.minimum // 2, kwargs=call(3, 8), machine=QUICK, dynamic_shapes=SHAPES)


def test_sizes_for_which_the_model_does_something_else_are_refused():
    """When planning, with what was asked."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).sum() if x.shape[0] > 16 else self.layer(x).mean()

    options = {"machine": QUICK, "dynamic_shapes": {"x": {0: Dim("rows", max=64)}}}
    with pytest.raises(MemplanError, match=r"at rows=64 the model, or torch, does something else .* rows"):
        memplan.plan(Long(), None, (torch.randn(8, 4),), **options)
    with pytest.raises(CaptureError):
        memplan.plan(Long(), None, (torch.randn(1, 4),), **options)


@pytest.mark.parametrize("options", [{"arena": True}, {"calls": 2}, {"accumulate": True}, {"allow": {"offload"}}])
def test_what_does_not_go_together_is_refused(options):
    """In one line."""
    with pytest.raises(MemplanError, match="leave one"):
        memplan.plan(gpt2(), None, kwargs=call(3, 8), machine=QUICK, dynamic_shapes=SHAPES, **options)

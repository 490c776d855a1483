"""Questions about the values of inputs: eager's branch and bits for each answer, and no plan used for another one."""

import copy

import memplan
import msgspec
import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import CaptureError, PlanMismatch
from memplan.planner.ir.machine import load_machine
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(3, 6, dtype=torch.long)
PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])


class Masked(nn.Module):
    """Does something with numbers and a mask."""

    def __init__(self, does):
        super().__init__()
        self.layer, self.other, self.does = nn.Linear(8, 8), nn.Linear(8, 8), does

    def forward(self, x, mask):
        return self.does(self, x, mask).sin().sum()


def all_seen(self, x, mask):
    """The usual question."""
    return self.layer(x) if mask.bool().all() else self.other(x) * mask[..., None]


def longest(self, x, mask):
    """A number, which becomes part of the computation."""
    return self.layer(x[:, : int(mask.sum(1).max())])


def as_float(self, x, mask):
    """What is asked may be computed in floating point."""
    return self.layer(x) if mask.float().mean() > 0.8 else self.other(x)


def against_positions(self, x, mask):
    """What is asked may be compared with constants."""
    run = torch.arange(mask.shape[1])
    return self.layer(x) if torch.equal((mask.cumsum(1) - 1)[0], run) else self.other(x)


def one_by_one(self, x, mask):
    """A list of numbers."""
    return torch.stack([self.layer(row[:count]).sum() for row, count in zip(x, mask.sum(1).tolist(), strict=True)])


def after_writing(self, x, mask):
    """A value that the model changes before it asks."""
    mask = mask.clone()
    mask[:, 0] = 0
    return self.layer(x) if mask.any() else self.other(x)


def in_a_view(self, x, mask):
    """A question about a part."""
    return self.layer(x) if mask[:, 4:].any() else self.other(x)


KINDS = [all_seen, longest, as_float, against_positions, one_by_one, in_a_view]


def plan(model, mask, **options):
    """A plan for a call."""
    return memplan.plan(model, None, (X, mask), machine=QUICK, **options)


def step(model, mask) -> list[torch.Tensor | None]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(X, mask)
    loss.backward()
    return [loss.detach(), *(value.grad for value in model.parameters())]


def same(one, other) -> bool:
    """Whether two steps are one, bit for bit."""
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mask", [ONES, PADDED], ids=["ones", "padded"])
@pytest.mark.parametrize("does", KINDS, ids=lambda does: does.__name__)
def test_the_branch_is_eagers(does, mask):
    """For either answer."""
    model = Masked(does)
    twin = copy.deepcopy(model)
    planned = plan(model, mask).apply(model)

    assert same(step(planned, mask), step(twin, mask))


@pytest.mark.parametrize("does", KINDS, ids=lambda does: does.__name__)
@pytest.mark.parametrize("way", [False, True])
def test_a_batch_with_another_answer_is_refused(does, way):
    """By the line that asks."""
    model = Masked(does)
    first, second = (PADDED, ONES) if way else (ONES, PADDED)
    planned = plan(model, first).apply(model)
    with pytest.raises(PlanMismatch, match=r"test_questions.py:\d+ asks about the values of inputs, and the answer was"):
        planned(X, second)


def test_a_batch_with_the_same_answers_is_run():
    """Whatever else it holds."""
    model = Masked(all_seen)
    twin = copy.deepcopy(model)
    planned = plan(model, PADDED).apply(model)
    other = PADDED.flip(0)

    assert same(step(planned, other), step(twin, other))


def test_what_was_written_is_not_asked_about():
    """Its value is not known any more."""
    with pytest.raises(CaptureError, match="takes a number out of a tensor"):
        capture(Masked(after_writing), (X, ONES))


def test_how_many_elements_there_are_is_no_question():
    """Shapes do not come from data."""
    with pytest.raises(CaptureError, match="the data decide a shape"):
        capture(Masked(lambda self, x, mask: self.layer(x[mask.bool()])), (X, ONES))


def test_numbers_in_floating_point_are_not_looked_into():
    """A batch of them is another at every step."""
    with pytest.raises(CaptureError, match="takes a number out of a tensor"):
        capture(Masked(lambda self, x, mask: self.layer(x) if x.sum() > 0 else self.other(x)), (X, ONES))


def test_each_question_is_kept_once():
    """However often the model is called while it is traced."""
    captured = capture(Masked(all_seen), (X, ONES))
    assert [question.answer for question in captured.questions] == [True]
    assert list(captured.values) == [1]


def test_a_model_that_asks_nothing_has_no_questions():
    """And its calls are not looked into."""
    assert capture(Masked(lambda self, x, mask: self.layer(x) * mask[..., None]), (X, ONES)).questions == ()


def test_what_was_asked_is_in_a_plans_file(tmp_path):
    """So that a fresh process traces the same branch."""
    for mask in (ONES, PADDED, PADDED.t().contiguous().t()):
        model = Masked(all_seen)
        plan(model, mask).save(tmp_path / "plan.json")
        planned = memplan.load(tmp_path / "plan.json").apply(copy.deepcopy(model))

        assert same(step(planned, mask), step(model, mask))


def test_one_tensor_given_twice_is_not_two():
    """What was asked of the one cannot be told from what was asked of the other."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, one, two):
            return (self.layer(x) * (2 if one.all() else 1) * (3 if two.all() else 1)).sum()

    model = Two()
    planned = memplan.plan(model, None, (X, ONES, ONES), machine=QUICK).apply(model)
    planned(X, ONES, ONES).backward()
    with pytest.raises(PlanMismatch, match="lay in the memory of"):
        planned(X, PADDED, ONES)
    with pytest.raises(PlanMismatch, match="lay in the memory of"):
        planned(X, ONES.clone(), PADDED)


def test_distributions_are_not_validated():
    """Where nobody has asked for it; else the refusal says how not to."""

    def drawn(validate):
        return lambda self, x, mask: torch.distributions.Normal(self.layer(x), 1.0, validate_args=validate).log_prob(x)

    before = torch.distributions.Distribution._validate_args  # torch.compile switches it off, for good
    model = Masked(drawn(None))
    twin = copy.deepcopy(model)
    assert same(step(plan(model, ONES).apply(model), ONES), step(twin, ONES))
    assert torch.distributions.Distribution._validate_args == before
    with pytest.raises(CaptureError, match="validate_args=False"):
        capture(Masked(drawn(True)), (X, ONES))

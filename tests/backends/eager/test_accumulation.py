"""Steps that add to the gradients that are there: eager's bits, within the budget, and autograd's where somebody listens."""

import copy
import warnings

import memplan
import msgspec
import pytest
import torch
from memplan.passes.liveness import held_bytes
from memplan.planner.ir.errors import BudgetError, MemplanError
from memplan.planner.ir.machine import load_machine
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
WIDTH, DEPTH = 32, 6


def net() -> nn.Module:
    """A small model, some of whose parameters share an update."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())))


def batch(seed: int) -> torch.Tensor:
    """An input."""
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))


def total(output: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return output.float().sin().sum()


def plan(model, budget=None, args=None, **options):
    """A plan for a call."""
    options = {"loss": total, "machine": QUICK, "accumulate": True} | options
    return memplan.plan(model, budget, args or (batch(0),), **options)


def gradients(model) -> dict[str, torch.Tensor | None]:
    """By name."""
    return {name: value.grad for name, value in model.named_parameters()}


def same(one, other) -> bool:
    """Whether gradients are the same, bit for bit."""
    return all((one[name] is None) == (other[name] is None) and (one[name] is None or torch.equal(one[name], other[name]))
               for name in one | other)  # fmt: skip


@pytest.mark.parametrize("tight", [False, True])
def test_micro_batches_have_eagers_bits(tight):
    """Four of them, from no gradients at all, and again after they have been dropped."""
    model, twin = net(), net()
    made = plan(model)
    if tight:
        made = plan(model, made.minimum)
    planned = made.apply(model)
    for _ in range(2):
        for seed in range(4):
            total(planned(batch(seed))).backward()
            total(twin(batch(seed))).backward()

        assert same(gradients(model), gradients(twin))
        model.zero_grad()
        twin.zero_grad()


def test_the_budget_counts_the_gradients_that_are_there():
    """All of them are resident, and what is made of them piles up no more."""
    model = net()
    once, added = plan(model, accumulate=False), plan(model)
    all_gradients = sum(buffer.bytes for buffer in once.program.buffers if buffer.kind == "parameter")

    assert added.program.resident_bytes == once.program.resident_bytes + all_gradients
    assert added.minimum < once.minimum + all_gradients
    assert added.recipe.accumulate


def test_nothing_is_said_of_gradients_that_are_counted():
    """The plan expects them."""
    model = net()
    planned = plan(model, "90%").apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            total(planned(batch(seed))).backward()


def test_gradients_asked_for_are_returned_and_not_added():
    """`torch.autograd.grad`, and `backward(inputs=...)` for those that it leaves out."""
    model, twin = net(), net()
    planned = plan(model).apply(model)
    found = torch.autograd.grad(total(planned(batch(1))), list(model.parameters()))
    wanted = torch.autograd.grad(total(twin(batch(1))), list(twin.parameters()))

    assert all(map(torch.equal, found, wanted))
    assert all(value.grad is None for value in model.parameters())

    total(planned(batch(1))).backward(inputs=[model[0].weight, model[2].bias])
    total(twin(batch(1))).backward(inputs=[twin[0].weight, twin[2].bias])
    assert same(gradients(model), gradients(twin))


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_who_listens_to_a_gradient_hears_it(kind):
    """Then autograd adds it up."""
    model, twin = net(), net()
    planned = plan(model).apply(model)
    heard = []
    for each in (model, twin):
        getattr(each[2].weight, kind)(lambda value: heard.append(value.sum().item()))
    for seed in range(2):
        total(planned(batch(seed))).backward()
        total(twin(batch(seed))).backward()

    assert len(heard) == 4
    assert heard[0] == heard[1]
    assert heard[2] == heard[3]
    assert same(gradients(model), gradients(twin))


class Odd(nn.Module):
    """Gradients that share memory, are views, are transposed, are expanded, or are none."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.rows = nn.Parameter(torch.randn(4, 8))
        self.unused = nn.Parameter(torch.randn(3))
        self.tied = nn.Linear(8, 8)
        self.tied_again = self.tied

    def forward(self, x):
        y = self.one + self.two  # whose gradients are one tensor
        y = y + self.rows.sum(0)  # whose gradient is expanded
        return self.tied_again(self.tied(x @ self.turned + y))


def test_gradients_that_share_memory_are_not_kept_as_they_are():
    """Or the next step would add to both."""
    torch.manual_seed(1)
    model = Odd()
    twin, x = copy.deepcopy(model), torch.randn(5, 8)
    planned = plan(model, args=(x,)).apply(model)
    for seed in range(3):
        total(planned(x + seed)).backward()
        total(twin(x + seed)).backward()

        assert same(gradients(model), gradients(twin))
        for name, value in model.named_parameters():
            if value.grad is not None:
                assert value.grad.stride() == twin.get_parameter(name).grad.stride()


def test_a_parameter_that_is_another_tensor_by_now_gets_its_gradient():
    """As after `load_state_dict(assign=True)`."""
    model, twin = net(), net()
    planned = plan(model).apply(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    total(planned(batch(0))).backward()
    total(twin(batch(0))).backward()

    assert same(gradients(model), gradients(twin))


def test_outputs_that_nobody_differentiates_leave_no_gradient():
    """As in eager mode: None, not zeros."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.one(x), self.two(x)

    model, x = Two(), torch.randn(3, 8)
    twin = copy.deepcopy(model)
    planned = plan(model, args=(x,), loss=lambda out: out[0].sum() + out[1].sum()).apply(model)
    for each in (planned, twin):
        each(x)[0].sum().backward()

    assert model.two.weight.grad is None
    assert same(gradients(model), gradients(twin))


def test_a_copy_adds_to_its_own():
    """The code names no parameter."""
    model, twin = net(), net()
    planned = copy.deepcopy(plan(model).apply(model))
    total(planned(batch(0))).backward()
    total(twin(batch(0))).backward()

    assert all(value.grad is None for value in model.parameters())
    assert all(map(torch.equal, (v.grad for v in planned.parameters()), (v.grad for v in twin.parameters())))


def test_a_plans_file_says_that_it_accumulates(tmp_path):
    """And the step that is made of it does."""
    model, twin = net(), net()
    plan(model).save(tmp_path / "plan.json")
    planned = memplan.load(tmp_path / "plan.json").apply(model, loss=total)
    for seed in range(2):
        total(planned(batch(seed))).backward()
        total(twin(batch(seed))).backward()

    assert same(gradients(model), gradients(twin))


def test_the_optimizer_reads_what_has_been_added_up():
    """Its state is counted, and its step follows."""
    model = net()
    made = plan(model, optimizer="adamw")
    last = made.program.ops[-1]

    assert last.phase == "update"
    assert last.reads == ()  # the gradients are resident
    assert last.workspace > 0


def test_several_calls_fit_together():
    """What the others hold between their passes is left to them."""
    model = net()
    alone = plan(model)
    budget = alone.peak + 2 * held_bytes(alone.program, alone.schedule)
    loose, tight = plan(model, budget, calls=3), plan(model, budget * 7 // 10, calls=3)
    for made in (loose, tight):
        assert made.peak + 2 * held_bytes(made.program, made.schedule) <= made.budget
    assert loose.time <= tight.time

    twin = copy.deepcopy(model)
    planned = tight.apply(model)
    for each in (planned, twin):
        sum(total(each(batch(seed))) for seed in range(3)).backward()
    assert same(gradients(model), gradients(twin))


def test_too_many_calls_are_told_what_they_need():
    """All of them together."""
    model = net()
    floor = plan(model, "80%").minimum
    with pytest.raises(BudgetError, match=r"with 4 calls before one backward pass: together they need .* bytes\)") as refused:
        plan(model, floor, calls=4)
    again = plan(model, refused.value.minimum, calls=4)
    assert again.peak <= refused.value.minimum


def test_what_is_reserved_is_not_used():
    """A budget less what others take."""
    model = net()
    top = plan(model).peak
    made = plan(model, top, reserved=top // 4)
    assert made.peak <= top - top // 4
    with pytest.raises(BudgetError, match="a percentage has nothing to refer to"):
        plan(model, top, reserved="10%")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"calls": 0}, "calls=0: give how many"),
        ({"calls": 2, "train": False}, "calls=2 is of training"),
        ({"arena": True}, "accumulate=True does not go with arena=True"),
        ({"optimizer": "adamw", "optimizer_in_backward": True}, "does not go with optimizer_in_backward=True"),
    ],
)
def test_what_does_not_go_together_is_refused(options, match):
    """Before anything is traced."""
    with pytest.raises(MemplanError, match=match):
        plan(net(), **options)


def test_calls_that_share_a_pass_and_earlier_gradients_are_told_of():
    """Eager adds the calls' gradients first."""
    model = net()
    planned = plan(model).apply(model)
    total(planned(batch(0))).backward()
    with pytest.warns(UserWarning, match="gradients of an earlier one are there"):
        (total(planned(batch(0))) + total(planned(batch(1)))).backward()


class Tied(nn.Module):
    """Parameters that are used several times in a call, under one name and under two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(20, 16)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        y = self.embed(x)
        for _ in range(3):
            y = torch.tanh(self.layer(y))
        return self.head(y)


@pytest.mark.parametrize("tight", [False, True])
def test_calls_in_which_a_parameter_is_used_several_times_have_eagers_bits(tight):
    """Term by term, as autograd adds them; of gradients that were there before, which is told, the last bits may differ."""
    model, x = Tied(), torch.randint(20, (4, 6))
    twin = copy.deepcopy(model)
    made = plan(model, args=(x,), calls=3)
    if tight:
        made = plan(model, made.minimum * 2, args=(x,), calls=3)
    planned = made.apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for each in (planned, twin):
            sum(total(each((x + call) % 20)) * (call + 1) for call in range(3)).backward()
    assert same(gradients(model), gradients(twin))


def test_one_call_beside_earlier_gradients_adds_its_sum():
    """Also where it was planned to be one of several."""
    model, x = Tied(), torch.randint(20, (4, 6))
    twin = copy.deepcopy(model)
    planned = plan(model, args=(x,), calls=2).apply(model)
    for each in (planned, twin):
        for call in range(3):
            total(each((x + call) % 20)).backward()
    assert same(gradients(model), gradients(twin))


def test_terms_that_autograd_is_to_have_are_summed_up():
    """Where somebody listens, or asks for gradients."""
    model, x = Tied(), torch.randint(20, (4, 6))
    twin = copy.deepcopy(model)
    planned = plan(model, args=(x,), calls=2).apply(model)
    found = torch.autograd.grad(total(planned(x)), list(model.parameters()))
    assert all(map(torch.equal, found, torch.autograd.grad(total(twin(x)), list(twin.parameters()))))
    for each in (model, twin):
        each.embed.weight.register_hook(lambda value: value * 2)
    for each in (planned, twin):
        total(each(x)).backward()
    assert same(gradients(model), gradients(twin))


def test_the_sums_of_terms_are_no_ops_any_more():
    """They would keep terms alive until the last one is there."""
    model, x = Tied(), torch.randint(20, (4, 6))
    one, several = plan(model, args=(x,)), plan(model, args=(x,), calls=2)
    added = [op for op in several.program.ops if op.target == "accumulate"]
    assert len(several.program.ops) - len(one.program.ops) < len(added)
    assert sum(op.target == "aten.add.Tensor" for op in several.program.ops) < sum(
        op.target == "aten.add.Tensor" for op in one.program.ops
    )

"""Running in one arena: who may use it when, what asks the allocator all the same, and how much."""

import copy
from concurrent.futures import ThreadPoolExecutor

import memplan
import pytest
import torch
from memplan.backends.eager.out_forms import (
    SPECIAL,
    dropout_is_a_product,
    find_operator,
    out_form,
    out_names,
    results_of,
)
from memplan.planner.ir.errors import MemplanError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, ROWS = 64, 128


def made(
    *parts: nn.Module, budget: str | None = None, lend: bool = False
) -> tuple[memplan.Plan, nn.Module, nn.Module, torch.Tensor]:
    """A placed plan of a few layers, the planned model, a copy of the model, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), *copy.deepcopy(parts)) for _ in range(4)))
    x = torch.randn(ROWS, WIDTH)
    plan = memplan.plan(model, budget, (x,), loss=lambda out: out.sum(), machine="h100-80gb", time_limit=5, arena=True,
                        lend_gradients=lend)  # fmt: skip
    return plan, plan.apply(model), copy.deepcopy(model), x


class Outside(TorchDispatchMode):
    """Bytes of the results that are newly made outside an arena, by operator."""

    def __init__(self, arena: torch.Tensor):
        super().__init__()
        self.home, self.found = arena.untyped_storage().data_ptr(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage().data_ptr() for leaf in torch.utils._pytree.tree_leaves((args, kwargs))
               if isinstance(leaf, torch.Tensor)}  # fmt: skip
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in old | {self.home}:
                self.found[str(func)] = self.found.get(str(func), 0) + leaf.untyped_storage().nbytes()
        return out


def arena_of(planned: nn.Module):
    """The arena of an applied plan."""
    return planned.forward.code.arena  # type: ignore[union-attr]


def test_inferences_from_several_threads_take_turns():
    """They share one arena: each gets the outputs of its own input."""
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    inputs = [torch.randn(ROWS, WIDTH) for _ in range(8)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    plan = memplan.plan(model, None, (inputs[0],), train=False, machine="h100-80gb", arena=True, time_limit=5)
    planned = plan.apply(model)

    def infer(number: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(planned(inputs[number]), wanted[number]) for _ in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(infer, range(len(inputs))))


def test_only_what_the_caller_gets_lies_outside_the_arena():
    """Linear layers and pointwise ones have forms that write where they are told: gradients and the loss remain."""
    plan, planned, _, x = made(nn.Tanh())
    arena = arena_of(planned)
    assert arena.bytes == plan.arena > 0
    assert not arena.transients
    planned(x).sum().backward()
    gradients = sum(parameter.numel() * 4 for parameter in planned.parameters())
    planned.zero_grad(set_to_none=True)
    with Outside(arena.tensor) as outside:
        loss = planned(x).sum()
        loss.backward()
    assert sum(outside.found.values()) <= gradients + 4 * ROWS * WIDTH * 4, outside.found  # output, its gradient, the loss


def test_lent_gradients_lie_in_the_arena():
    """Then a step allocates its output alone, nothing need lie beside the arena but that, and bits are the same."""
    plan, planned, other, x = made(nn.Tanh(), lend=True)
    arena = arena_of(planned)
    resident, whole = plan.program.resident_bytes, made(nn.Tanh())[0]
    gradients = sum(parameter.numel() * 4 for parameter in planned.parameters())
    assert len(plan.schedule.lent) == len(list(planned.parameters()))
    assert plan.peak <= whole.peak - gradients // 2
    assert plan.peak <= resident + plan.arena + 2 * 4 * ROWS * WIDTH  # the output lies outside
    for _ in range(3):
        with Outside(arena.tensor) as outside:
            planned(x).sum().backward()
        other(x).sum().backward()
        for found, wanted in zip(planned.parameters(), other.parameters(), strict=True):
            assert torch.equal(found.grad, wanted.grad)
            start = arena.tensor.data_ptr()
            assert start <= found.grad.data_ptr() < start + arena.bytes
        planned.zero_grad()
        other.zero_grad()
        assert sum(outside.found.values()) <= 4 * ROWS * WIDTH * 4, outside.found


def test_a_gradient_that_is_still_held_is_never_written_over():
    _, planned, other, x = made(nn.Tanh(), lend=True)
    planned(x).sum().backward()
    other(x).sum().backward()
    for _ in range(2):
        with pytest.raises(MemplanError, match=r"the gradient of 0\.0\.weight \(8 in all\).*zero_grad"):
            planned(x)
        planned.zero_grad(set_to_none=False)
    kept = planned[0][0].weight.grad.T  # a view holds it as well
    planned.zero_grad()
    with pytest.raises(MemplanError, match=r"\(1 in all\)"):
        planned(x)
    kept = kept.clone()
    planned(x).sum().backward()
    gradient = planned[0][0].weight.grad
    assert torch.equal(gradient, kept.T.zero_() + other[0][0].weight.grad)
    del planned  # the gradient keeps its bytes
    assert torch.equal(gradient, other[0][0].weight.grad)


def test_gradients_are_lent_only_where_they_can_be():
    """Not those whose kernel returns memory of its own, nor one that two parameters share; and only from an arena."""
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(WIDTH), *(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

        def forward(self, x):
            return (self.norm(x) + (self.one + self.two)).square().sum()

    model, x = Shared(), torch.randn(ROWS, WIDTH)
    other = copy.deepcopy(model)
    options = {"machine": "h100-80gb", "time_limit": 5, "lend_gradients": True}
    with pytest.raises(MemplanError, match="arena=True"):
        memplan.plan(model, None, (x,), **options)
    plan = memplan.plan(model, None, (x,), arena=True, **options)
    assert plan.schedule.lent == ()
    planned = plan.apply(model)
    for net in (planned, other):
        for _ in range(2):  # what is not lent may be accumulated
            net(x).backward()
    for found, wanted in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


def test_what_passes_through_memory_of_its_own_is_reported():
    """Layer norm has no such form: what it makes is left there if it is short-lived, else copied, and counted."""
    plan, planned, other, x = made(nn.LayerNorm(WIDTH), nn.Tanh())
    program, copied = plan.program, arena_of(planned).transients
    assert copied
    assert plan.schedule.outside
    for op in program.ops:
        if op.target.startswith("aten.native_layer_norm"):
            inside = [buffer for buffer in op.writes if buffer not in {*plan.schedule.outside, *program.outputs}]
            assert copied.get(op.name, 0) == sum(program.buffers[buffer].bytes for buffer in inside)
    for net in (planned, other):
        net(x).sum().backward()
    for found, wanted in zip(planned.parameters(), other.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


def test_two_steps_cannot_share_an_arena():
    """A second forward pass before the first one's backward pass is refused, and works once that is done or dropped."""
    _, planned, _, x = made(nn.Tanh())
    first = planned(x)
    with pytest.raises(MemplanError, match="arena holds the tensors of a forward pass"):
        planned(x)
    first.sum().backward()
    second = planned(x)
    del second, first
    planned(x).sum().backward()


def test_an_output_survives_the_next_step():
    """Outputs and gradients are the caller's: nothing writes over them."""
    _, planned, _, x = made(nn.Tanh())
    output = planned(x)
    kept = output.detach().clone()
    output.sum().backward()
    gradients = [parameter.grad for parameter in planned.parameters()]
    copies = [gradient.clone() for gradient in gradients]
    planned.zero_grad(set_to_none=True)
    planned(2 * x).sum().backward()
    assert torch.equal(output.detach(), kept)
    assert all(torch.equal(gradient, known) for gradient, known in zip(gradients, copies, strict=True))


def test_a_placed_plan_is_saved_with_its_addresses(tmp_path):
    """A plan that is read again runs in an arena of the same size."""
    plan, _, other, x = made(nn.Tanh())
    model = copy.deepcopy(other)
    plan.save(tmp_path / "plan.json")
    again = memplan.load(tmp_path / "plan.json")
    assert again.arena == plan.arena
    planned = again.apply(model, loss=lambda out: out.sum())
    assert arena_of(planned).bytes == plan.arena
    for net in (planned, other):
        net(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(planned.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("target", "names"), [
    (torch.ops.aten.mm.default, ["out"]),
    (torch.ops.aten.addmm.default, ["out"]),
    (torch.ops.aten.add.Tensor, ["out"]),
    (torch.ops.aten.sum.dim_IntList, ["out"]),
    (torch.ops.aten.max_pool2d_with_indices.default, ["out", "indices"]),
    (torch.ops.aten.native_layer_norm.default, None),
    (torch.ops.aten.native_dropout.default, None),
    (torch.ops.aten.relu_.default, None),
])  # fmt: skip
def test_out_forms_are_torchs_own(target, names):
    """Only forms with a kernel of their own count: a generated one allocates and copies inside."""
    form = out_form(target)
    assert (None if form is None else out_names(form)) == names


INF = float("-inf")
CALLS = {
    "clone": ((torch.randn(4, 6).t(),), {}),
    "_to_copy": ((torch.randn(4, 6),), {"dtype": torch.bfloat16}),
    "relu": ((torch.tensor([-1.0, -0.0, 0.0, 2.0, float("nan"), float("-inf")]),), {}),
    "mul.Scalar": ((torch.randn(5).bfloat16(), 0.3), {}),
    "div.Scalar": ((torch.arange(5), 3), {}),
    "embedding": ((torch.randn(7, 3), torch.randint(7, (4, 5)), 2), {}),
    "_safe_softmax": ((torch.tensor([[0.3, -1.0, INF], [INF, INF, INF], [float("nan"), INF, 1.0]]), 1), {}),
    "slice_backward": ((torch.randn(2, 3), [2, 8], 1, 1, 7, 2), {}),
    "select_backward": ((torch.randn(2, 3), [2, 5, 3], 1, -2), {}),
    "native_dropout_backward": ((torch.randn(9), torch.rand(9) < 0.5, 1 / 0.7), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_written_out_has_torchs_bits(name):
    """Every operator without an `out=` form that is given one here, results of any former contents."""
    args, kwargs = CALLS[name]
    target = find_operator("aten." + (name if "." in name else name + ".default"))
    wanted = target(*args, **kwargs)
    place = torch.empty_like(wanted).fill_(77)
    assert results_of(target, "cpu", False) == 1
    SPECIAL[target]([place], *args, **kwargs)
    assert place.dtype == wanted.dtype
    assert place.isnan().equal(wanted.isnan())
    assert place.nan_to_num().equal(wanted.nan_to_num())
    assert place.signbit().equal(wanted.signbit())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_written_out_as_what_it_is(train, dtypes, layout):
    """All five results, in plain and mixed types; the statistics it is given are left alone."""
    torch.manual_seed(1)
    value = torch.randn(3, 4, 5, 6, dtype=dtypes[0]).contiguous(memory_format=layout)
    weight, bias, mean, variance = (torch.rand(4, dtype=dtypes[1]) for _ in range(4))
    target = torch.ops.aten._native_batch_norm_legit_functional.default
    wanted = target(value, weight, bias, mean, variance, train, 0.1, 1e-5)
    before = mean.clone(), variance.clone()
    places = [torch.empty_like(each).fill_(77) for each in wanted]
    assert results_of(target, "cpu", False) == 5
    SPECIAL[target](places, value, weight, bias, mean, variance, train, 0.1, 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(places, wanted, strict=True))
    assert torch.equal(mean, before[0])
    assert torch.equal(variance, before[1])


def test_every_operator_written_out_is_tried():
    """The table above has them all; dropout and batch norm have tests of their own."""
    named = {find_operator("aten." + (name if "." in name else name + ".default")) for name in CALLS}
    apart = {torch.ops.aten.native_dropout.default, torch.ops.aten._native_batch_norm_legit_functional.default}
    assert named | apart == set(SPECIAL)


def test_dropout_is_written_out_as_what_it_is():
    """The product with a mask is torch's own dropout bit for bit, and trying it leaves the generator alone."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert dropout_is_a_product.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)
    _, planned, other, x = made(nn.Tanh(), nn.Dropout(0.3))
    copied = [name for name in arena_of(planned).transients if name.startswith("native_dropout")]
    assert len(copied) <= 1  # the last one's result is the caller's
    for net in (planned, other):
        torch.manual_seed(9)
        net(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(planned.parameters(), other.parameters(), strict=True))

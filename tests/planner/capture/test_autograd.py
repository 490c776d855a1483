"""What a model arranges with autograd beside operators: traced with eager's bits and its gradients, or refused by name."""

from functools import partial
from typing import Any

import memplan
import msgspec
import pytest
import torch
import torch.nn.utils.prune
from memplan.planner.ir.errors import BudgetError, CaptureError, MemplanError, PlanMismatch
from memplan.planner.ir.machine import load_machine
from memplan.planner.verbs.session import Session
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("hasty")

WIDTH = 32
QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring


class Says(nn.Module):
    """A model of one function over some submodules."""

    def __init__(self, says, **modules):
        super().__init__()
        self.says = says
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.says(self, *args)


def line() -> nn.Linear:
    """A layer."""
    return nn.Linear(WIDTH, WIDTH)


def block() -> nn.Sequential:
    """A few, with dropout."""
    return nn.Sequential(line(), nn.GELU(), nn.Dropout(0.2), line(), nn.Tanh())


def three(says) -> Says:
    """Layers a, b and c."""
    return Says(says, a=line(), b=line(), c=line())


def total(x: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return x.sin().sum()


def plan_for(model: nn.Module, x: torch.Tensor, tight: bool = False, **options) -> memplan.Plan:
    """A plan without a budget, or for the smallest that works."""
    session = Session(model, (x,), machine=QUICK, time_limit=2.0, **options)
    session.planner.effort = 1500
    if not tight:
        return session.plan(None)
    with pytest.raises(BudgetError) as caught:
        session.plan(1)
    assert caught.value.minimum is not None
    return session.plan(caught.value.minimum)


def same_as_eager(make, tight: bool = False, steps: int = 2) -> memplan.Plan:
    """Plan a model, and hold losses, gradients, which of them are None, buffers and random numbers to eager's."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make())
    x = torch.randn(16, WIDTH)
    plan = plan_for(models[0], x, tight)
    seen = []
    for model, run in ((models[0], plan.apply(models[0])), (models[1], models[1])):
        torch.manual_seed(7)
        for _ in range(steps):
            model.zero_grad()
            loss = run(x)
            loss.backward()
            seen.append([loss, *(value.grad for value in model.parameters()), *model.buffers(), torch.get_rng_state()])
            seen[-1] = [value if value is None else value.detach().clone() for value in seen[-1]]
    for found, wanted in zip(seen[:steps], seen[steps:], strict=True):
        assert [value is None for value in found] == [value is None for value in wanted]
        assert all(a is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    return plan


# Checkpointing


def policy(context, op, *args, **kwargs):
    """Saves products."""
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "other": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
        preserve_rng_state=True,
    ),
    "sequential": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=True),
}


def chain(call) -> Says:
    """Blocks on a residual stream."""

    def says(model, x):
        x = model.a(x)
        for part in (model.b, model.c):
            x = x + call(part, x)
        return total(x)

    return Says(says, a=line(), b=block(), c=block())


def branches(call) -> Says:
    """A function that reads its input three times, beside a residual stream: what is added up first decides the last bit."""

    def says(model, x):
        x = model.a(x)
        return total(x + call(lambda y: (model.b(y) * model.c(y)).sin() * model.d(y), x))

    return Says(says, a=line(), b=line(), c=line(), d=line())


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_inside_is_a_plain_call(way):
    """Every gradient is there, with eager's bits, and the program is that of the model without checkpointing."""
    plan = same_as_eager(lambda: chain(WAYS[way]))
    plain = plan_for(chain(lambda part, x: part(x)), torch.randn(16, WIDTH))

    assert [op.target for op in plan.program.ops] == [op.target for op in plain.program.ops]


@pytest.mark.parametrize("way", ["reentrant", "other"])
def test_gradients_of_what_a_checkpoint_reads_are_added_up_as_in_eager(way):
    """Of reentrant checkpointing those inside first."""
    same_as_eager(lambda: branches(WAYS[way]))


def test_checkpointing_inside_leaves_recomputation_to_the_plan():
    """At the smallest budget, dropout and all."""
    plan = same_as_eager(lambda: chain(WAYS["reentrant"]), tight=True)

    assert plan.counts.recompute > 0


def test_reentrant_checkpointing_of_data_trains_nothing_inside():
    """As eager has it, which warns of it: None of the gradients inside are there."""
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        same_as_eager(lambda: Says(lambda m, x: total(checkpoint(m.a, x, use_reentrant=True) + m.b(x)), a=line(), b=line()))


CHECKPOINTED = {
    "nested": lambda: Says(
        lambda m, x: total(checkpoint(lambda y: m.c(checkpoint(m.b, y, use_reentrant=True)) + y, m.a(x), use_reentrant=True)),
        a=line(), b=block(), c=line(),
    ),
    "wrapper": lambda: Says(lambda m, x: total(m.b(m.a(x))), a=line(), b=checkpoint_wrapper(block())),
    "composable": lambda: Says(lambda m, x: total(m.b(m.a(x))), a=line(), b=composable_checkpoint(block())),
    "offload": lambda: Says(lambda m, x: total(m.b(m.a(x))), a=line(), b=offload_wrapper(block())),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_by_other_doors(name):
    """Torch's wrappers are plain calls as well."""
    same_as_eager(CHECKPOINTED[name])


def test_a_weight_cast_in_several_reentrant_checkpoints_is_refused():
    """Eager adds up its gradients in 32 bits there, and one region's in 16."""
    model = Says(lambda m, x: total(checkpoint(m.b, m.b(m.a(x)), use_reentrant=True)), a=line(), b=line())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match=r"b\.weight is cast more than once"):
        plan_for(model, torch.randn(16, WIDTH))


class Written(torch.autograd.Function):
    """Checkpointing written by hand, as deepspeed's and fairscale's is."""

    @staticmethod
    def forward(ctx, part, preserve, *args):
        ctx.part, ctx.preserve = part, preserve
        ctx.state = torch.get_rng_state()
        ctx.save_for_backward(*args)
        with torch.no_grad():
            return part(*args)

    @staticmethod
    def backward(ctx, gradient):
        args = [value.detach().requires_grad_(value.requires_grad) for value in ctx.saved_tensors]
        now = torch.get_rng_state()
        if ctx.preserve:
            torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            output = ctx.part(*args)
        if ctx.preserve:
            torch.set_rng_state(now)
        torch.autograd.backward(output, gradient)
        return (None, None, *(value.grad for value in args))


class Reversible(torch.autograd.Function):
    """A reversible block: its input is computed again from its output."""

    @staticmethod
    def forward(ctx, x, one, two):
        left, right = x.chunk(2, -1)
        with torch.no_grad():
            left = left + one(right)
            right = right + two(left)
        ctx.parts = one, two
        output = torch.cat([left, right], -1)
        ctx.save_for_backward(output.detach())
        return output

    @staticmethod
    def backward(ctx, gradient):
        one, two = ctx.parts
        left, right = (ctx.saved_tensors[0].narrow(-1, at, WIDTH // 2) for at in (0, WIDTH // 2))
        to_left, to_right = gradient.chunk(2, -1)
        with torch.enable_grad():
            left = left.detach().requires_grad_()
            added = two(left)
            added.backward(to_right)
        right, to_left = (right - added).detach(), to_left + left.grad
        with torch.enable_grad():
            right.requires_grad_()
            one(right).backward(to_left)
        return torch.cat([to_left, to_right + right.grad], -1), None, None


def half() -> nn.Sequential:
    """What a reversible block adds to one half."""
    return nn.Sequential(nn.Linear(WIDTH // 2, WIDTH // 2), nn.GELU(), nn.Linear(WIDTH // 2, WIDTH // 2))


WRITTEN = {
    "checkpoint": lambda: chain(lambda part, x: Written.apply(nn.Sequential(part[0], part[1], part[3]), True, x)),
    "branches": lambda: branches(lambda part, x: Written.apply(part, True, x)),
    "shared": lambda: Says(
        lambda m, x: total(Written.apply(m.b, True, Written.apply(m.b, True, m.b(m.a(x))))), a=line(), b=line()
    ),
    "reversible": lambda: Says(
        lambda m, x: total(Reversible.apply(Reversible.apply(m.a(x), m.b, m.c), m.c, m.d)),
        a=line(),
        b=half(),
        c=half(),
        d=half(),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_function_that_calls_backward_is_followed(name):
    """What its backward pass adds to the parameters' gradients arrives, in eager's order and with its bits."""
    same_as_eager(WRITTEN[name])


def test_a_function_that_repeats_random_numbers_by_hand_is_refused():
    """The plan would draw others when the function draws them again."""
    model = chain(lambda part, x: Written.apply(part, True, x))
    with pytest.raises(CaptureError, match=r"sets the state of a random generator at .*test_autograd.py:\d+ \(torch.set_rng"):
        plan_for(model, torch.randn(16, WIDTH))


class Sets(torch.autograd.Function):
    """Puts a gradient where it belongs by itself."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.layer.weight.grad = torch.ones_like(ctx.layer.weight) * gradient.sum()
        return gradient * 2, None


def test_a_gradient_that_the_tracer_loses_is_refused():
    """By the parameter's name: in silence it would be None."""
    model = Says(lambda m, x: total(Sets.apply(m.a(x), m.b)), a=line(), b=line())
    with pytest.raises(CaptureError, match=r"b\.weight gets no gradient, and does in eager"):
        plan_for(model, torch.randn(16, WIDTH))


# Which gradients are None


def without_grad(model, x):
    """A part is called without gradients."""
    x = model.a(x)
    torch.set_grad_enabled(False)
    try:
        y = model.b(x)
    finally:
        torch.set_grad_enabled(True)
    return total(model.c(x) * y)


def inference(model, x):
    """A part is called in inference mode."""
    x = model.a(x)
    with torch.inference_mode():
        y = model.b(x)
    return total(model.c(x) * y.clone())


def penalty(model, x):
    """A gradient is part of the loss."""
    x = x.detach().requires_grad_()
    y = total(model.b(model.a(x)))
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    return y + slope.square().sum()


def on_cpu(model, x):
    """What is saved is to be kept on the CPU."""
    with save_on_cpu():
        x = model.b(model.a(x))
    with save_on_cpu(pin_memory=True):
        return total(model.c(x))


def without_hooks(model, x):
    """Nobody may set hooks on what is saved."""
    with disable_saved_tensors_hooks("none here"):
        return total(model.b(model.a(x)))


def frozen() -> Says:
    """One weight is frozen."""
    model = three(lambda m, x: total(m.b(m.a(x))))
    model.a.weight.requires_grad_(False)
    return model


class Forgets(torch.autograd.Function):
    """Has no gradient for its second operand."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


def doubled(model, x):
    """A hook on a tensor changes a gradient."""
    y = model.a(x)
    y.register_hook(lambda gradient: gradient * 2)
    return total(model.b(y))


NONE = {
    "set_grad_enabled": partial(three, without_grad),
    "inference_mode": partial(three, inference),
    "detach": partial(three, lambda m, x: total(m.a(x) * m.b(x).detach() + m.c(x))),
    "unused": partial(three, lambda m, x: m.a(x).sum()),
    "penalty": partial(three, penalty),
    "save_on_cpu": partial(three, on_cpu),
    "no hooks": partial(three, without_hooks),
    "frozen": frozen,
    "function": partial(three, lambda m, x: total(Forgets.apply(m.a(x), m.b.weight[0]))),
    "no gradient of data": partial(three, lambda m, x: total(m.a(x).requires_grad_() + m.b(x.detach().requires_grad_()))),
    "changed by a hook": partial(three, doubled),
}


def named(name: str) -> Any:
    """Inference mode in a model is refused before torch 2.12, whose tracer cannot make a tensor in it."""
    old = name == "inference_mode" and TorchVersion(torch.__version__) < "2.12"
    return pytest.param(name, marks=pytest.mark.xfail(raises=CaptureError, strict=True)) if old else name


@pytest.mark.parametrize("name", map(named, NONE))
def test_gradients_are_none_where_eagers_are(name):
    """And have its bits elsewhere."""
    same_as_eager(NONE[name])


def test_parameters_of_an_output_that_nobody_differentiates_get_none():
    """Not zeros, which an optimizer with weight decay would take for a reason to step."""
    torch.manual_seed(0)
    model = three(lambda m, x: (m.a(x), m.b(x), m.a(x) + m.b(x)))
    x = torch.randn(16, WIDTH)
    fast = plan_for(model, x, loss=lambda out: sum(map(total, out))).apply(model)
    total(fast(x)[0]).backward()
    assert model.a.weight.grad is not None
    assert model.b.weight.grad is None
    wanted = torch.autograd.grad(total(model(x)[0]), model.a.weight)[0]
    assert torch.equal(model.a.weight.grad, wanted)
    model.zero_grad()
    total(fast(x)[2]).backward()
    assert torch.equal(model.b.weight.grad, torch.autograd.grad(total(model(x)[2]), model.b.weight)[0])


def test_no_parameter_is_updated_for_an_output_that_nobody_differentiates():
    """An optimizer in the backward pass would step by zeros, and its weight decay by more."""
    model = three(lambda m, x: (m.a(x), m.b(x)))
    x = torch.randn(16, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plan = memplan.plan(model, None, (x,), loss=lambda out: total(out[0]) + total(out[1]), machine=QUICK,
                        optimizer=optimizer, optimizer_in_backward=True)  # fmt: skip
    loss = total(plan.apply(model, optimizer=optimizer)(x)[0])
    with pytest.raises(MemplanError, match=r"no gradient reaches b\.weight"):
        loss.backward()


# Refusals


def froze(model, x):
    """Changes what a parameter is for."""
    model.b.weight.requires_grad_(False)
    return total(model.b(model.a(x)))


def packed(model, x):
    """Saves in 16 bits."""
    with saved_tensors_hooks(lambda value: value.half(), lambda value: value.float()):
        return total(model.b(model.a(x)))


def retained(model, x):
    """Keeps a gradient."""
    y = model.a(x)
    y.retain_grad()
    return total(model.b(y))


def backwards(model, x):
    """Takes a step of its own."""
    model.a(x).sum().backward()
    return total(model.b(x))


def seeded(model, x):
    """Draws the same noise each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = torch.randn_like(x)
    return total(model.a(x + noise))


REFUSED = {
    froze: "requires_grad_ on b.weight in its forward",
    packed: r"hooks on saved tensors \(packed.<locals>.<lambda>\)",
    retained: "calls retain_grad in forward",
    backwards: r"calls backward\(\) in its forward",
    seeded: r"sets the state of a random generator at .*\(torch.manual_seed\(3\)\)",
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_a_planned_step_would_not_repeat_is_refused(says):
    """In words that name it and its line."""
    with pytest.raises(CaptureError, match=REFUSED[says]):
        plan_for(three(says), torch.randn(16, WIDTH))


def test_hooks_on_saved_tensors_around_a_planned_call():
    """Torch's own move things, and change none; others, which may, are refused. Planning inside of them sees neither."""
    torch.manual_seed(0)
    model = three(lambda m, x: total(m.b(m.a(x))))
    x = torch.randn(16, WIDTH)
    with saved_tensors_hooks(lambda value: value * 0, lambda value: value):
        fast = plan_for(model, x).apply(model)
        with pytest.raises(MemplanError, match="do not see those of a planned step"):
            fast(x)
    with save_on_cpu():
        found = torch.autograd.grad(fast(x), model.a.weight)[0]

    assert torch.equal(found, torch.autograd.grad(model(x), model.a.weight)[0])


# Hooks on modules


def hooked(kind, hook):
    """A model with a hook on its first layer."""

    def make():
        model = Says(lambda m, x: total(m.a(m.b(x))), a=line(), b=line())
        getattr(model.a, kind)(hook)
        return model

    return make


CHANGING = {
    "forward": hooked("register_forward_hook", lambda module, args, out: out * 2),
    "before": hooked("register_forward_pre_hook", lambda module, args: (args[0] * 2,)),
    "backward": hooked("register_full_backward_hook", lambda module, to, back: tuple(v if v is None else v * 3 for v in to)),
    "before backward": hooked("register_full_backward_pre_hook", lambda module, back: (back[0] * 3,)),
    "asks for a gradient": hooked("register_forward_hook", lambda module, args, out: out.requires_grad_(True)),
    "spectral norm": lambda: nn.Sequential(torch.nn.utils.spectral_norm(line()), Says(lambda m, x: total(x))),
    "pruned": lambda: nn.Sequential(torch.nn.utils.prune.l1_unstructured(line(), "weight", 0.3), Says(lambda m, x: total(x))),
    "parametrized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(line()), Says(lambda m, x: total(x))),
}


@pytest.mark.parametrize("name", CHANGING)
def test_hooks_that_change_values_are_traced(name):
    """With eager's bits, among them those by which torch computes weights."""
    same_as_eager(CHANGING[name])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_old_weight_norm_is_traced():
    """Its hook sets an attribute."""
    same_as_eager(lambda: nn.Sequential(torch.nn.utils.weight_norm(line()), Says(lambda m, x: total(x))))


def looks(module, *args):
    """A hook that does something with what it sees, outside of the model."""
    print(module, len(args))


def test_hooks_set_and_removed_after_planning_are_noticed():
    """On a module, on all, and the removal of one that changes what is computed."""
    x = torch.randn(16, WIDTH)
    model = CHANGING["forward"]()
    fast = plan_for(model, x).apply(model)
    everywhere = nn.modules.module.register_module_forward_pre_hook(looks)
    try:
        with pytest.raises(PlanMismatch, match="every module has been given a hook"):
            fast(x)
    finally:
        everywhere.remove()
    fast(x)
    model.a._forward_hooks.clear()
    with pytest.raises(PlanMismatch, match="module a has lost a hook"):
        fast(x)


def test_hooks_of_parameters_and_of_the_model_run():
    """In every step: autograd calls those of parameters, and the others lie around the planned forward."""
    torch.manual_seed(0)
    model = three(lambda m, x: total(m.b(m.a(x))))
    x, seen = torch.randn(16, WIDTH), []
    model.register_forward_hook(lambda module, args, out: seen.append("forward"))
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.register_full_backward_hook(lambda module, to, back: seen.append("backward"))
    x.requires_grad_()
    model.a.weight.register_hook(lambda gradient: gradient * 2)
    model.a.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    fast = plan_for(model, x).apply(model)
    assert seen == []
    for _ in range(2):
        model.zero_grad()
        fast(x).backward()
    assert sorted(seen) == sorted(["before", "forward", "backward", "accumulated"] * 2)
    wanted = torch.autograd.grad(total(model.b(model.a(x))), model.a.weight)[0]

    assert torch.equal(model.a.weight.grad, wanted)

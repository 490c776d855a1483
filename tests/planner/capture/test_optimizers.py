"""What an optimizer's step allocates, measured with torch's profiler; and plans made with one, through their files."""

from itertools import product

import memplan
import pytest
import torch
from memplan.planner.capture.optimizers import check_alone, kept_by
from memplan.planner.ir.errors import CaptureError
from memplan.planner.ir.names import OPTIMIZERS as NAMES
from torch import nn
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.usefixtures("hasty")

SIZE = 1 << 16  # elements of a parameter
SWITCH = (False, True)
CASES = [
    *(("SGD", {"momentum": 0.9 * momentum, "nesterov": nesterov, "weight_decay": 0.1 * decay, "maximize": maximize})
      for momentum, nesterov, decay, maximize in product(SWITCH, repeat=4) if momentum or not nesterov),
    *((name, {"amsgrad": amsgrad, "weight_decay": 0.1 * decay, "maximize": maximize})
      for name in ("Adam", "AdamW") for amsgrad, decay, maximize in product(SWITCH, repeat=3)),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]  # fmt: skip


def allocated(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """The most that a step has allocated at once, in parameters' sizes."""
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            optimizer.step()
    live = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most / (4 * SIZE)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_temporaries_are_those_of_the_step(name, options, foreach, count):
    """For every combination of options, of one parameter and of several; a few scalars do not count."""
    parameters = [nn.Parameter(torch.randn(SIZE)) for _ in range(count)]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, foreach=foreach, **options)
    known = kept_by(optimizer, "cpu")

    assert allocated(optimizer, parameters) == pytest.approx(known.workspace([SIZE] * count) / SIZE, abs=0.01)


class Lion(torch.optim.Optimizer):
    """An optimizer of one's own: the sign of a mixture of gradient and momentum, which is kept in 32 bits."""

    def __init__(self, params, lr=1e-3, decay=0.0):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                update = (state["momentum"] * 0.9 + p.grad * 0.1).sign_()
                p.mul_(1 - group["lr"] * group["decay"]).sub_(update.to(p.dtype), alpha=group["lr"])
                state["momentum"].lerp_(p.grad.float(), 0.01)


class Normed(Lion):
    """Looks at the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = 1 / max(1.0, torch.stack([grad.norm() for grad in grads]).norm().item())
        for grad in grads:
            grad.mul_(scale)
        super().step()


class Wraps(torch.optim.Optimizer):
    """Another optimizer's shell."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


TRIED = [name for name in NAMES.values() if name not in ("SGD", "Adam", "AdamW", "Muon") and hasattr(torch.optim, name)]


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps; a few scalars do not count."""
    return sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(list(optimizer.state.values()))
               if isinstance(leaf, torch.Tensor) and leaf.dim())  # fmt: skip


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("name", [*TRIED, "Lion"])
def test_any_optimizer_is_counted_by_what_its_step_makes(name, foreach):
    """State to the byte, by shape; temporaries as the profiler sees them, or, of lists of several operations, more."""
    if name == "Lion" and foreach:
        return
    parameters = {f"p{n}": nn.Parameter(torch.randn(shape)) for n, shape in enumerate([(256, 256), (256, 256), (SIZE // 2,)])}
    kind = Lion if name == "Lion" else getattr(torch.optim, name)
    optimizer = kind(parameters.values(), lr=0.1, **({"foreach": True} if foreach else {}))
    known = kept_by(optimizer, "cpu", parameters)
    found = allocated(optimizer, [*parameters.values()]) * 4 * SIZE
    figures = [known.made[known.which[each]] for each in parameters]
    workspace = known.workspace_of({each: value.nbytes for each, value in parameters.items()})

    assert sum(sum(each.states) + each.others for each in figures) == bytes_of_state(optimizer)
    assert found <= workspace + 2000
    assert workspace == pytest.approx(found, rel=1.0 if foreach else 0.03, abs=2000)


def test_state_of_other_types_and_shapes_counts_as_it_is():
    """Of weights of 16 bits kept in 32, and rows and columns in place of a matrix."""
    weight, bias = nn.Parameter(torch.randn(64, 32).bfloat16()), nn.Parameter(torch.randn(64).bfloat16())
    lion = kept_by(Lion([weight, bias]), "cpu", {"w": weight, "b": bias})
    factored = kept_by("adafactor", "cpu", {"w": weight, "b": bias})

    assert [(each.states, each.others) for each in lion.made] == [((64 * 32 * 4,), 0), ((64 * 4,), 0)]
    assert [(each.states, each.others) for each in factored.made] == [((), (64 + 32) * 2), ((64 * 2,), 0)]


def test_a_trial_leaves_the_optimizer_alone():
    """Parameters, gradients, state, settings, attributes and the random numbers are as they were."""
    model = body()
    optimizer = Lion(model.parameters())
    optimizer.extra = {"seen": [], "own": [*model.parameters()]}
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("called"))
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    before = [value.detach().clone() for value in model.parameters()]
    random = torch.get_rng_state()
    memplan.plan(model, None, (torch.randn(4, 16),), loss=total, optimizer=optimizer, machine="h100-80gb", time_limit=1.0)
    torch.set_rng_state(random)
    kept_by(optimizer, "cpu", dict(model.named_parameters()))
    check_alone(optimizer, dict(model.named_parameters()))

    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(value.grad is None for value in model.parameters())
    assert not optimizer.state
    assert optimizer.extra["own"][0] is model[0].weight


def test_a_class_that_only_bears_a_known_name_is_tried_out():
    """Its state is what it keeps, not what torch's keeps."""
    other = type("AdamW", (Lion,), {})
    weight = nn.Parameter(torch.randn(8, 8))

    assert kept_by(other([weight]), "cpu", {"w": weight}).made[0].states == (256,)


REFUSED = {
    "a misspelt name": ("rmspop", "unknown optimizer 'rmspop': do you mean 'rmsprop'"),
    "no name at all": ("xyz", "unknown optimizer 'xyz': The names are sgd, adam, adamw"),
    "what is none": (3, "optimizer=3: give the name of one of torch's, or a torch.optim.Optimizer"),
    "LBFGS by name": ("lbfgs", "lbfgs needs all parameters at once"),
    "LBFGS": (lambda values: torch.optim.LBFGS(values), "lbfgs needs all parameters at once"),
    "SparseAdam": (lambda values: torch.optim.SparseAdam(values), "sparseadam takes sparse gradients alone"),
    "a shell": (lambda values: Wraps(torch.optim.SGD(values)), "Wraps wraps another optimizer: pass that one"),
    "Muon of biases": ("muon", "optimizer='muon' does not take this model's parameters: Muon only supports 2D"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_counted_is_refused_by_name(case):
    """In one line, with what to do."""
    optimizer, message = REFUSED[case]
    if case == "Muon of biases" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = body()
    optimizer = optimizer([*model.parameters()]) if callable(optimizer) else optimizer
    with pytest.raises(CaptureError, match=message) as error:
        memplan.plan(model, None, (torch.randn(4, 16),), loss=total, optimizer=optimizer, machine="h100-80gb", time_limit=1.0)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_looks_at_all_gradients_does_not_update_in_backward():
    """Each parameter by itself would have another step; after the backward pass it is counted as any other."""
    model = body()
    options = {"loss": total, "optimizer": Normed(model.parameters()), "machine": "h100-80gb", "time_limit": 1.0}
    memplan.plan(model, None, (torch.randn(4, 16),), **options)

    with pytest.raises(CaptureError, match="Normed steps a parameter otherwise by itself than beside others"):
        memplan.plan(model, None, (torch.randn(4, 16),), optimizer_in_backward=True, **options)


def total(output):
    """A loss."""
    return output.square().mean()


def body() -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "some": lambda model: torch.optim.Adam(model[0].parameters(), weight_decay=0.1),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "rmsprop by name": lambda model: "rmsprop",
    "lion, two groups": lambda model: Lion([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]),
}


@pytest.mark.parametrize("machine", ["h100-80gb", None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plan_with_an_optimizer_survives_its_file(name, machine, tmp_path):
    """Applied from there it traces to the same program, without the optimizer, and trains as the model does."""
    model, other, x = body(), body(), torch.randn(4, 16)
    memplan.plan(model, None, (x,), loss=total, optimizer=OPTIMIZERS[name](model), machine=machine, time_limit=5.0).save(
        tmp_path / "plan.json"
    )
    planned = memplan.load(tmp_path / "plan.json").apply(model, loss=total)
    for module in (planned, other):
        total(module(x)).backward()

    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))

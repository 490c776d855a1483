"""Hooks that look on run at planned steps as in eager PyTorch: as often, in its order, on its values; else they are refused."""

import copy
import warnings
from collections import Counter

import memplan
import msgspec
import pytest
import torch
from memplan.planner.ir.errors import CaptureError, MemplanError, PlanMismatch, UnplannedWarning
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.schedule import Run
from memplan.planner.verbs.session import Session
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("hasty"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Error detected in:UserWarning"),
]

WIDTH, ROWS = 16, 32
QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring


class Layer(nn.Module):
    """A layer that looks at the gradient of what it has made, if it has a log."""

    def __init__(self, log=None):
        super().__init__()
        self.lin, self.log, self.looks = nn.Linear(WIDTH, WIDTH), log, log is not None

    def forward(self, x):
        y = self.lin(x)
        if self.looks:
            y.register_hook(lambda gradient: self.log.append(("gradient", gradient.norm().item())))
        return nn.functional.gelu(y)


def net(log=None, depth=2):
    """A few of them."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(log) for _ in range(depth)))


def total(out):
    """A scalar."""
    return out.float().sin().sum()


def rows(seed=0, count=ROWS):
    """A batch."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def plan(model, budget=None, **options):
    """Of one step."""
    return memplan.plan(model, budget, (rows(),), **{"loss": total, "machine": QUICK} | options)


def smallest(model, log):
    """A planned module within the smallest budget that is known, in which values are computed again."""
    session = Session(model, (rows(),), loss=total, machine=QUICK)
    found = session.plan(session.plan(None).minimum)
    assert max(Counter(step.op for step in found.schedule.instructions if isinstance(step, Run)).values()) > 1
    assert log == []
    return found.apply(model)


def same(one, other):
    """Whether two logs are the same, bit for bit."""
    return len(one) == len(other) and all(map(equal, one, other))


def equal(one, other):
    """Whether two of their entries are."""
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def beside(hook, make=net, door=smallest, sizes=(ROWS,) * 3):
    """Planned steps beside eager ones, each model with hooks of its own. Returns the planned module, its model and its log."""
    mine, theirs = [], []
    model, eager = make(mine if make is tensors else None), make(theirs if make is tensors else None)
    hook(model, mine)
    hook(eager, theirs)
    fast = door(model, mine)
    for seed, count in enumerate(sizes):
        losses = [total(called(rows(seed, count))) for called in (fast, eager)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), eager.parameters(), strict=True))
        model.zero_grad()
        eager.zero_grad()
    assert theirs
    assert same(mine, theirs)
    return fast, model, mine


def numbers(model, log):
    """Every kind of hook on every layer, each of which takes a number out."""

    def note(kind):
        return lambda module, *given: log.append((kind, *(norm(value) for values in given for value in values)))

    for layer in model:
        layer.lin.register_forward_pre_hook(note("before"))
        layer.lin.register_forward_hook(note("after"))
        layer.lin.register_full_backward_pre_hook(note("before backward"))
        layer.lin.register_full_backward_hook(note("backward"))
        layer.lin.weight.register_hook(lambda gradient: gradient * 2)


def norm(value):
    """Of what a hook is given."""
    return None if value is None else value.norm().item()


def counts(model, log):
    """Counts its calls, and keeps a number for each."""

    class Count:
        seen = 0

        def __call__(self, module, args, output):
            self.seen += 1
            log.append((self.seen, output.requires_grad, float(output.detach().mean())))

    hook = Count()
    for layer in model:
        layer.register_forward_hook(hook)


def keeps(model, log):
    """Activations, and gradients."""
    model[0].register_forward_hook(lambda module, args, output: log.append(output.detach()))
    model[1].register_full_backward_hook(lambda module, taken, given: log.append(given[0]))


def checks(model, log):
    """Looks for what is not a number, and says so."""

    def sound(module, args, output):
        if torch.isnan(output).any():
            raise ValueError("not a number")
        log.append(output.max().item())

    model[1].lin.register_forward_hook(sound)


def speaks(model, log):
    """Prints as well as keeps."""

    def say(module, args, output):
        print("seen", tuple(output.shape))
        log.append(output.detach().mean())

    model[0].register_forward_hook(say)


def twice(model, log):
    """Each layer is called twice in a step."""
    model[0].lin.register_forward_hook(lambda module, args, output: log.append(output.sum().item()))
    model.forward = lambda x: nn.Sequential.forward(model, nn.Sequential.forward(model, x))


def tensors(log):
    """With hooks of tensors."""
    return net(log)


def together(model, log):
    """All of these."""
    for hook in (counts, keeps, checks, speaks):
        hook(model, log)


@pytest.mark.parametrize("hook", [numbers, together, pytest.param(twice, marks=pytest.mark.slow)])
def test_hooks_that_look_on_run_as_in_eager(hook, capsys):
    """Once a call, in eager's order, on eager's bits, where values are computed again; planning leaves nothing behind."""
    beside(hook)
    assert capsys.readouterr().out == ("seen (32, 16)\n" * 6 if hook is together else "")


def test_hooks_of_tensors_run_as_in_eager():
    """Forward sets them, on what it makes, and is not run again; such a module is not copied with them."""
    fast, _, _ = beside(lambda model, log: None, make=tensors)
    with pytest.raises(MemplanError, match=r"cannot be copied with the hook set in forward at .*test_observers.py"):
        copy.deepcopy(fast)


def test_within_runs_them_too():
    """At every size, planned."""

    def door(model, log):
        return memplan.within(model, "8MiB", loss=total, machine=QUICK)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnplannedWarning)
        beside(numbers, door=door, sizes=(32, 24, 40, 32))


def test_an_inference_runs_them():
    """Those that all modules share among them, and only for the model's own."""
    seen = []
    model = net().eval()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append((type(module).__name__, output.sum().item()))
    )
    try:
        fast = plan(model, train=False, loss=None).apply(model)
        assert seen == []
        fast(rows())
        planned, seen = seen[:], seen.clear() or seen
        with torch.no_grad():
            model(rows())
        assert planned == seen
        assert len(planned) == 1 + 2 * len(model)
    finally:
        everywhere.remove()


def test_what_a_hook_keeps_counts():
    """In the plan's peak: the activations that hooks keep live until the step ends."""

    def kept(model):
        for layer in model:
            layer.register_forward_hook(
                lambda module, args, output: (print(end=""), store.append(output.detach()))[:0] and None
            )

    store = []
    plain, keeping = net(), net()
    kept(keeping)
    size = ROWS * WIDTH * 4
    assert plan(keeping).minimum >= plan(plain).minimum + (len(plain) - 1) * size
    assert store == []


def test_a_removed_one_is_called_no_more_and_a_new_one_is_not_passed_over():
    """A plan refuses the new one; within a budget it is planned for."""
    log = []
    model = net()
    handle = model[0].register_forward_hook(lambda module, args, output: log.append(output.sum().item()))
    fast = plan(model).apply(model)
    again = copy.deepcopy(fast)
    fast(rows())
    handle.remove()
    fast(rows())
    assert len(log) == 1
    again(rows())
    assert len(log) == 2, "a copy has hooks of its own"
    model[1].register_forward_hook(lambda module, args, output: log.append(output.sum().item()))
    with pytest.raises(PlanMismatch, match=r"module 1 has been given a hook"):
        fast(rows())
    flexible = memplan.within(net(), "8MiB", loss=total, machine=QUICK)
    flexible(rows())
    flexible[1].register_forward_hook(lambda module, args, output: log.append(output.sum().item()))
    flexible(rows())
    assert len(log) == 3


@pytest.mark.slow
def test_one_that_removes_itself_is_called_once():
    """As in eager mode."""

    def once(model, log):
        def hook(module, args, output):
            log.append(output.sum().item())
            handle.remove()

        handle = model[1].register_forward_hook(hook)

    assert len(beside(once)[2]) == 1


@pytest.mark.slow
def test_under_autocast_and_without_gradients_it_sees_what_eager_shows():
    """Types, whether gradients are on, and whether a tensor wants one."""

    class Mixed(Layer):
        def forward(self, x):
            with torch.no_grad():
                frozen = super().forward(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x) + frozen

    def look(model, log):
        def note(module, args, output):
            product = module.weight @ module.weight
            log.append((output.dtype, output.requires_grad, torch.is_grad_enabled(), product.dtype, output.sum().item()))

        for layer in model:
            layer.lin.register_forward_hook(note)

    def make(log):
        torch.manual_seed(0)
        return nn.Sequential(Mixed(), Mixed())

    beside(look, make=make, door=lambda model, log: plan(model).apply(model))


# What can be neither called nor traced


def may_change(module, args, output):
    """Returns a value where the data say so."""
    if torch.isnan(output).any():
        return torch.nan_to_num(output)
    return None


def reads_gradient(module, taken, given):
    """Of a parameter, which a planned step has not added yet."""
    print(module.lin.weight.grad, end="")


def both(module, taken, given):
    """Changes a gradient and keeps another."""
    STORE.append(given[0])
    return (taken[0] * 2,)


STORE: list = []


def retains(module, args, output):
    """Asks for a gradient that no planned step keeps."""
    output.retain_grad()


REFUSED = {
    may_change: ("register_forward_hook", r"forward hook \(may_change\) of module 1 asks for values .* and may change some"),
    reads_gradient: ("register_full_backward_hook", r"backward hook \(reads_gradient\) .* the gradient of 1.lin.weight"),
    both: ("register_full_backward_hook", r"backward hook \(both\) of module 1 changes values, .* writes to STORE"),
    retains: ("register_forward_hook", "calls retain_grad in forward"),
}


@pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=pytest.mark.slow) if hook in (retains, both) else hook for hook in REFUSED]
)
def test_hooks_that_can_be_neither_are_refused(hook):
    """By module, kind and name; within a budget such a model runs as it is, and says why."""
    register, told = REFUSED[hook]
    model = net()
    getattr(model[1], register)(hook)
    with pytest.raises(CaptureError, match=told):
        plan(model)
    assert STORE == []
    if hook is not retains:
        model = memplan.within(model, "8MiB", loss=total, machine=QUICK)
        with pytest.warns(UnplannedWarning, match=told):
            total(model(rows())).backward()
    STORE.clear()


def test_a_hook_that_sees_what_forward_stores_is_refused():
    """It would see what the call before has stored."""

    class Stores(Layer):
        def forward(self, x):
            self.kept = x.mean()
            return super().forward(x)

    model = nn.Sequential(Stores(), Layer())
    model[0].register_forward_hook(lambda module, args, output: print(module.kept.item()))
    with pytest.raises(CaptureError, match=r"can look at 0\.kept, which the model's forward stores"):
        plan(model)


def test_a_hook_that_looks_at_statistics_is_refused():
    """BatchNorm's are written when the forward pass ends."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    log = []
    handle = model[1].register_forward_hook(lambda module, args, output: log.append(output.sum().item()))
    plan(model).apply(model)(rows())
    assert len(log) == 1
    handle.remove()
    model[1].register_forward_hook(lambda module, args, output: print(module.running_mean.sum().item()))
    with pytest.raises(CaptureError, match=r"looks at 1\.running_mean, which a planned step changes at the end"):
        plan(model)


def test_what_a_model_writes_over_later_is_not_kept():
    """Eager would show the hook's list what came after; a planned step writes nothing over."""

    class Over(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return nn.functional.relu(self.lin(x), inplace=True)

    kept, model = [], Over()
    keep = [True]

    def late(module, args, output):
        if output.sum().item() == output.sum().item() and keep[0]:
            kept.append(output.detach())

    model.lin.register_forward_hook(late)
    fast = plan(model).apply(model)
    with pytest.raises(MemplanError, match="keeps a tensor that the model changes in place afterwards"):
        fast(rows())
    keep[0] = False
    fast(rows())
    model.lin._forward_hooks.clear()
    model.lin.register_forward_hook(lambda module, args, output: kept.append(output.detach()) or print(end=""))
    with pytest.raises(CaptureError, match="keeps a tensor that the model changes in place afterwards"):
        plan(model)


SLOW = {"writes", "sets a hook"}  # ways that are tried with the slow tests
CHANGED = {
    "returns": (lambda module, output: output * 2, "has returned a value"),
    "writes": (lambda module, output: output.detach().mul_(2), "has changed a tensor in place"),
    "writes past autograd": (lambda module, output: output.data.mul_(2), "has changed a tensor in place"),
    "sets a hook": (lambda module, output: output.register_hook(print), "has set a hook on a tensor"),
    "a parameter": (lambda module, output: module.weight.detach().mul_(2), "has changed 1.lin.weight in place"),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in SLOW else way for way in CHANGED])
def test_what_a_hook_did_not_do_when_it_was_planned_is_an_error(way):
    """Never a step with other numbers than eager's."""
    does, told = CHANGED[way]
    model, on = net(), [False]

    def hook(module, args, output):
        if on[0] and output.sum().item():
            return does(module, output) if way == "returns" else (does(module, output), None)[1]
        return None

    model[1].lin.register_forward_hook(lambda *given: hook(*given))
    fast = plan(model).apply(model)
    fast(rows())
    on[0] = True
    with pytest.raises(MemplanError, match=told):
        fast(rows())


def test_a_gradient_stops_at_what_such_a_hook_has_kept_and_says_so():
    """A distillation loss over it would lack gradients; a hook that does nothing but store is traced, and has them."""

    def loud(module, args, output):
        print(end="")
        STORE.append(output)

    model = net()
    handle = model[0].register_forward_hook(loud)
    fast = plan(model).apply(model)
    out = fast(rows())
    with pytest.raises(MemplanError, match="a gradient reaches what the forward hook"):
        (total(out) + STORE.pop().sum()).backward()
    handle.remove()
    STORE.clear()
    features, wanted = {}, {}
    model, eager = net(), net()
    model[0].register_forward_hook(lambda module, args, output: features.__setitem__("h", output))
    eager[0].register_forward_hook(lambda module, args, output: wanted.__setitem__("h", output))
    fast = plan(model, loss=lambda out: total(out) + features["h"].square().mean()).apply(model)
    (total(fast(rows())) + features["h"].square().mean()).backward()
    (total(eager(rows())) + wanted["h"].square().mean()).backward()
    assert torch.equal(features["h"], wanted["h"])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), eager.parameters(), strict=True))


def test_what_forward_reads_a_hook_does_not_write():
    """The call under way would have been another."""

    class Reads(Layer):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = nn.Sequential(Layer(), Reads())
    model[0].register_forward_hook(lambda module, args, output: setattr(model[1], "scale", output.sum().item()))
    with pytest.raises(PlanMismatch, match=r"1\.scale was .*, and the model's forward reads it"):
        plan(model).apply(model)(rows())


def test_an_arena_and_updates_in_backward_are_refused_beside_them():
    """A hook may keep what lies in an arena, and look at parameters that are updated by then."""
    model = net()
    model[0].register_forward_hook(lambda module, args, output: print(output.sum().item()))
    with pytest.raises(MemplanError, match="over which an arena writes other values"):
        plan(model, arena=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan(model, optimizer=optimizer, optimizer_in_backward=True)
    model[0].register_full_backward_hook(lambda module, taken, given: print(given[0].sum().item()))
    with pytest.raises(MemplanError, match="may look at a parameter, which optimizer_in_backward=True has updated"):
        plan(model, optimizer=optimizer, optimizer_in_backward=True)
    with pytest.raises(MemplanError, match="an inference on a scratchpad calls no hooks"):
        memplan.map_model(model.eval(), "1MiB", (rows(),))

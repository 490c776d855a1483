"""What capture refuses, in which words; what it leaves alone; and which budgets are budgets."""

import copy
import sys
import threading

import memplan
import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import BudgetError, CaptureError, MachineError, MemplanError, PlanMismatch
from memplan.planner.ir.program import Kind, Phase
from memplan.planner.verbs.plan import sweep
from memplan.planner.verbs.session import Session
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

X = (torch.randn(64, 32),)


def net() -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(32, 32), nn.GELU())))


def total(output: torch.Tensor) -> torch.Tensor:
    """A loss."""
    return output.sum()


def make(budget, model=None, args=X, **options) -> memplan.Plan:
    """A plan on the h100's roofline."""
    return memplan.plan(model or net(), budget, args, **{"loss": total, "machine": "h100-80gb", "time_limit": 5.0, **options})


class Says(nn.Module):
    """A model whose forward is a function."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def branch(model, x):
    """Control flow that depends on data."""
    y = model.layer(x)
    if y.sum() > 0:  # the line that the error must name
        return y
    return -y


def number(model, x):
    """A number out of a tensor."""
    return model.layer(x) * x.max().item()


def shape(model, x):
    """A shape that depends on data."""
    return model.layer(x)[x[:, 0] > 0]


def mismatch(model, x):
    """Two shapes that do not fit."""
    return model.layer(x) + x[:, :5]


def failing(model, x):
    """The model's own error."""
    raise KeyError("missing")


@pytest.mark.parametrize("function", [branch, number, shape, mismatch, failing])
def test_what_cannot_be_traced_names_the_line_of_the_model(function):
    """File and line of the model, not of torch, and the code there."""
    with pytest.raises(CaptureError) as caught:
        make(None, Says(function))

    assert "test_capture.py:" in str(caught.value)
    line = int(str(caught.value).split("test_capture.py:")[1].split(" ")[0])
    first = function.__code__.co_firstlineno
    assert first < line <= first + 5


@pytest.mark.parametrize(
    ("model", "args", "options", "words"),
    [
        (lambda x: x, X, {}, "needs an nn.Module, not a function"),
        (net(), (), {}, "arguments do not fit"),
        (net(), (*X, *X), {}, "arguments do not fit"),
        (net(), X, {"kwargs": {"nonsense": 1}}, "arguments do not fit"),
        (net(), (torch.randn(64, 31),), {}, "trace"),
        (net(), X, {"loss": None}, "scalar"),
        (net(), X, {"loss": lambda out: out}, "scalar"),
        (net(), X, {"loss": lambda out: 3.0}, "scalar"),
        (net().requires_grad_(False), X, {"loss": None}, "scalar|gradient"),
        (Says(lambda m, x: {m.layer(x)}), X, {"loss": None}, "."),
        (Says(lambda m, x: "text"), X, {"loss": None}, "."),
        (Says(lambda m, x: None), X, {"loss": None}, "."),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_words(model, args, options, words):
    """One CaptureError each, that says what is wrong."""
    with pytest.raises(CaptureError, match=words):
        make(None, model, args, **options)


class Holds(nn.Module):
    """A model with an unregistered parameter, a plain tensor and an embedding, whose forward is a function."""

    def __init__(self, function, **options):
        super().__init__()
        self.function = function
        self.layer, self.embed = nn.Linear(32, 32), nn.Embedding(50, 32, **options)
        self.weights, self.count = [nn.Parameter(torch.ones(32))], torch.zeros(1)

    def forward(self, x):
        return self.function(self, x)


def counting(model, x):
    """In place."""
    model.count += 1
    return model.layer(x) * model.count


def replacing(model, x):
    """With a new tensor."""
    model.count = model.count + 1
    return model.layer(x) * model.count


def shrinking(model, x):
    """A parameter changed on the way."""
    with torch.no_grad():
        model.layer.weight.mul_(0.9)
    return model.layer(x)


TOKENS = torch.zeros(4, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (Holds(lambda m, x: m.layer(x) * m.weights[0]), X[0], r"not one of its parameters: register it \(nn.Parameter"),
        (Holds(counting), X[0], r"test_capture.py:\d+ \(model.count \+= 1\): .* is no buffer: use register_buffer"),
        (Holds(replacing), X[0], "changes count, a tensor that is no buffer: use register_buffer"),
        (Holds(shrinking), X[0], "changes a parameter or an input in its forward pass"),
        (Holds(lambda m, x: m.embed(x), max_norm=1.0), TOKENS, "as an embedding with max_norm does"),
        (Holds(lambda m, x: m.embed(x), sparse=True), TOKENS, "sparse tensor.*leave out sparse=True"),
        (Says(lambda m, x: (y := m.layer(x), y.view(-1))), X[0], "output 1 .* is a view.*return a clone of it"),
        (Says(lambda m, x: (m.layer(x), m.layer.weight)), X[0], "output 1 of the model.*return a clone of it"),
        (Says(lambda m, x: sys.exit(0)), X[0], r"test_capture.py:\d+ .*SystemExit"),
    ],
)  # fmt: skip
def test_what_would_run_with_other_numbers_is_refused_in_words(model, x, words):
    """Tensors that are no state of the model's, changed parameters, sparse gradients, outputs that share memory."""
    with pytest.raises(CaptureError, match=words):
        make(None, model, (x,), loss=lambda out: sum(leaf.sum() for leaf in (out if isinstance(out, tuple) else (out,))))
    if isinstance(model, Holds):
        assert torch.equal(model.count, torch.zeros(1))


def test_a_view_that_the_loss_does_not_read_is_no_matter():
    """It comes back as a value."""
    make(None, Says(lambda m, x: (y := m.layer(x), y.view(-1))), loss=lambda out: out[0].sum())


def test_a_loss_without_a_gradient_is_refused():
    """As one of the model's own is."""
    with pytest.raises(CaptureError, match="does not depend on what requires a gradient"):
        make(None, loss=lambda out: out.mean().detach())


def test_what_a_model_stores_is_not_left_fake():
    """An attribute that keeps the last output is as it was."""

    def storing(model, x):
        model.last = model.layer(x)
        model.count = model.last.detach().sum()
        return model.last

    model = Holds(storing)
    make(None, model)
    assert torch.equal(model.count, torch.zeros(1))
    assert not hasattr(model, "last")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_limit": "5"}, "time_limit='5'"), ({"time_limit": -1.0}, "time_limit=-1.0"), ({"seed": "a"}, "seed='a'"),
        ({"time_limit": float("nan")}, "time_limit=nan"), ({"seed": -1}, "seed=-1"), ({"seed": 10**30}, "2\\^31"),
        ({"kwargs": 5}, "kwargs=5"), ({"allow": ("tile",)}, "tile"),
        ({"host_budget": "50 parsecs"}, "host budget.*of the tier"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, words):
    """One line each."""
    with pytest.raises(MemplanError, match=words):
        make(None, **options)


def test_a_default_that_is_spelled_out_is_the_same_call():
    """And strides that differ are told."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x, mask=None, *, scale=1.0):
            return self.layer(x) * scale

    model = Masked()
    planned = make(None, model).apply(model)
    assert torch.equal(planned(*X), planned(X[0], None, scale=1.0))
    with pytest.raises(PlanMismatch, match=r"float32\[64, 32\] with strides \[1, 64\] now"):
        planned(torch.randn(32, 64).t())


def test_several_threads_may_plan():
    """Tracing changes torch and the model for a while; each thread waits for the others."""
    found: list[memplan.Plan] = []
    model = nn.Sequential(nn.Linear(32, 32), nn.Upsample(scale_factor=2), nn.Linear(64, 8))
    x = (torch.randn(4, 2, 32),)
    threads = [threading.Thread(target=lambda: found.append(make(None, model, x, allow=()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({plan.program.digest for plan in found}) == 1
    assert len(found) == 4


def test_a_result_that_nobody_reads_is_counted():
    """The indices of a pooling, eight bytes for each element of four, are there while it runs."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2))
    program = make(None, model, (torch.empty(4, 3, 66, 66),), train=False, loss=None, allow=()).program
    (pool,) = [op for op in program.ops if "max_pool2d" in op.target]
    assert pool.workspace >= 8 * 4 * 8 * 32 * 32


def test_time_is_spent_once():
    """What tracing and measuring take of the first plan's limit is not there for its search; a later budget has it all."""
    session = Session(net(), X, loss=total, machine="h100-80gb", time_limit=50.0)
    session.began -= 40.0
    assert session.left() < 10.0
    session.plan(None)
    assert session.left() == 50.0


def test_a_sweep_takes_plans_other_arguments():
    """Arena and strategy."""
    plans = sweep(net(), 2, X, loss=total, machine="h100-80gb", time_limit=2.0, arena=True)
    assert all(plan.arena for plan in plans)
    with pytest.raises(MemplanError, match="memo"):
        sweep(net(), 2, X, loss=total, machine="h100-80gb", time_limit=2.0, strategy="other")


def test_a_cache_that_a_model_returns_is_refused_saying_which_switch():
    """As transformers' language models do unless told not to."""
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(CaptureError, match=r"DynamicCache.*config\.use_cache = False"):
        memplan.plan(GPT2LMHeadModel(config), None, kwargs={"input_ids": ids, "labels": ids})


def test_nothing_that_needs_a_gradient():
    """A frozen model cannot be planned for training, and the message says how else."""
    with pytest.raises(CaptureError, match="train=False"):
        make(None, Says(lambda m, x: m.layer(x).sum()).requires_grad_(False), loss=None)


@pytest.mark.parametrize(
    "budget", [0, -1, -5.0, "abc", "12 parsecs", float("nan"), float("inf"), True, "", "-3GiB", "0%", [1], 1.5]
)
def test_a_nonsense_budget_is_refused(budget):
    """BudgetError, with no minimum, for what cannot be read."""
    with pytest.raises(BudgetError) as caught:
        make(budget)

    assert caught.value.minimum is None


@pytest.mark.parametrize("budget", [None, "200%", "100%", "1GiB", 10**12, 5e8])
def test_a_roomy_budget_repeats_nothing(budget):
    """More room than the step needs is no error."""
    plan = make(budget)

    assert plan.planned.report.repeated == 0
    assert plan.peak <= plan.unplanned.peak


def test_below_the_floor_the_error_knows_a_budget_that_works():
    """Planning at `.minimum` succeeds, and one byte less does not."""
    with pytest.raises(BudgetError, match="smallest budget known to work") as caught:
        make(1)
    minimum = caught.value.minimum
    plan = make(minimum)

    assert plan.peak <= minimum
    assert plan.minimum <= minimum
    assert plan.planned.report.repeated > 0
    with pytest.raises(BudgetError):
        make(min(plan.minimum, minimum) - 512)


def test_machines_and_levers_are_checked():
    """Unknown names are refused with the known ones."""
    with pytest.raises(MachineError, match="h100-80gb"):
        make(None, machine="h1000")
    with pytest.raises(MemplanError, match="recompute"):
        make(None, allow=("recompote",))
    with pytest.raises(BudgetError):
        make(1, allow=())


def test_a_model_is_left_as_it_was():
    """Capture changes neither parameters, buffers, gradients, modes, nor the stream of random numbers, even when it fails."""
    for model in (nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)), Says(branch)):
        before = copy.deepcopy(model.state_dict())
        objects = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
        state = torch.get_rng_state()
        try:
            make(None, model)
        except CaptureError:
            assert isinstance(model, Says)

        assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == objects
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        assert torch.equal(state, torch.get_rng_state())


def test_a_model_on_meta_is_planned_without_data():
    """The same program, byte for byte, as of the model with data."""
    with torch.device("meta"):
        empty = net()
    plan = make(None, empty, (torch.empty(64, 32, device="meta"),))

    assert plan.program.digest == make(None).program.digest
    tight = make(plan.minimum, empty, (torch.empty(64, 32, device="meta"),))
    assert tight.peak <= plan.minimum < plan.peak


def test_capture_is_repeatable():
    """Two captures of one model are one program."""
    assert capture(net(), X, loss=total).program == capture(net(), X, loss=total).program


def test_phases_and_kinds_are_found():
    """Forward, loss, backward, update in this order; parameters, state, inputs, activations and gradients by their kind."""
    program = make(None, optimizer="adamw").program
    phases = [op.phase for op in program.ops]
    kinds = {kind: sum(buffer.kind is kind for buffer in program.buffers) for kind in Kind}

    assert phases == sorted(phases, key=list(Phase).index)
    assert set(phases) == set(Phase)
    assert kinds[Kind.PARAMETER] == kinds[Kind.GRADIENT] == 6
    assert kinds[Kind.STATE] >= 12
    assert kinds[Kind.INPUT] == 1
    assert kinds[Kind.ACTIVATION] >= 5


def test_tied_weights_are_one_buffer():
    """A parameter with two names is resident once."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 32, bias=False))
    untied = capture(model, X, loss=total).program
    model[2].weight = model[0].weight
    tied = capture(model, X, loss=total).program

    assert sum(buffer.kind is Kind.PARAMETER for buffer in untied.buffers) == 2
    assert sum(buffer.kind is Kind.PARAMETER for buffer in tied.buffers) == 1


def test_views_are_no_ops():
    """Reshapes, transposes and slices share their base's buffer."""
    plain = capture(Says(lambda m, x: m.layer(x).sin()), X, loss=total).program
    viewed = capture(Says(lambda m, x: m.layer(x).view(32, 64).t().sin()), X, loss=total).program

    # the gradient of `view` is a reshape, which copies or not as the layout that the torch version gives it demands
    assert [op.target for op in plain.ops] == [op.target for op in viewed.ops if op.target != "aten.clone.default"]
    assert not [op for op in viewed.ops if op.target == "aten.clone.default" and op.phase == Phase.FORWARD]


def test_a_model_that_does_nothing_is_planned():
    """Its loss is a parameter: there is nothing to run, to keep or to free."""
    model = Says(lambda m, x: m.scale)
    model.scale = nn.Parameter(torch.ones(()))
    plan = make(None, model, X, loss=None)

    assert plan.status == "optimal"
    assert plan.peak == plan.unplanned.peak


def test_programs_and_schedules_read_well(golden):
    """The printed program and tight schedule of a tiny MLP, as a reviewer sees them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 8))
    plan = make(None, model, (torch.empty(256, 32),))
    tight = make(plan.minimum, model, (torch.empty(256, 32),))
    from memplan.planner.ir.text import show_schedule

    assert golden == f"{tight.program}\n{show_schedule(tight.program, tight.schedule)}"

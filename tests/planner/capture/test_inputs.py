"""Inputs of every kind are planned, saved, and found again in another process; a call may differ only where it does no harm."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import input_cases
import memplan
import pytest
import torch
from input_cases import Net, built, every, floats, ids, step
from memplan.planner.ir.errors import CaptureError, PlanMismatch
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

MACHINE = {"machine": "h100-80gb", "time_limit": 1.0}


def planned(model: nn.Module, args: tuple, kwargs: dict | None = None, **options) -> memplan.Plan:
    """A plan made in no time."""
    return memplan.plan(model, None, args, kwargs, **{**MACHINE, **options})


@pytest.fixture(scope="module")
def answers(hasty: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What another process says of plans that this one saves."""
    folder = tmp_path_factory.mktemp("plans")
    for name, (case, chosen) in every().items():
        model, args, kwargs, options = built(case, chosen)
        planned(model, args, kwargs, **options).save(folder / f"{name}.json")
    file = Path(input_cases.__file__)
    done = subprocess.run(
        [sys.executable, file, folder], capture_output=True, text=True, timeout=600, check=False, cwd=file.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", every())
def test_a_saved_plan_is_applied_in_another_process_with_eagers_bits(name: str, answers: dict[str, str]):
    """Tensors that share memory, views, odd types, nested classes and plain values, alone and with each of plan's options."""
    assert answers[name] == ""


@pytest.mark.parametrize("case", input_cases.SHARED)
def test_a_plan_is_applied_to_another_model_of_the_same_structure(case: str):
    """Traced anew from its recipe in the same process."""
    model, args, kwargs, _ = built(case, {})
    plan = planned(model, args, kwargs)
    other, args, kwargs, _ = built(case, {})
    wanted = step(*built(case, {}))

    assert all(map(torch.equal, step(plan.apply(other), args, kwargs, {}), wanted))


def test_tensors_on_meta_share_memory_as_real_ones_do():
    """Inputs and parameters without values give the program that real ones give, so that a plan made for one fits the other."""
    for make in (lambda base: (base, base), lambda base: (base[:2], base[2:]), lambda base: (base[1:3],)):
        plan = planned(Net(), make(ids()))
        assert planned(Net().to("meta"), make(ids().to("meta"))).program.digest == plan.program.digest
        plan.apply(Net())


def test_a_call_needs_no_more_memory_for_inputs_than_was_counted():
    """Two arguments that were one tensor are refused as two; as another one tensor, or as parts of it, they are not."""
    model, other = Net(), Net()
    fast = planned(model, (), {"x": (same := ids()), "labels": same}).apply(model)
    with pytest.raises(PlanMismatch, match=r"labels lay in the memory of another input .* 512 bytes where 256 were counted"):
        fast(x=ids(), labels=ids())
    fresh = ids().flip(0)
    wanted = other(x=fresh, labels=fresh)
    wanted.backward()
    fast(x=fresh, labels=fresh.view(4, 8)).backward()

    assert all(torch.equal(one.grad, two.grad) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_a_call_may_share_memory_where_the_plan_did_not():
    """Less memory, and the same numbers; and batches may be views of a data set."""
    model, other = Net(), Net()
    fast = planned(model, (floats(4, 8), floats(4, 8).clone())).apply(model)
    data = floats(64, 8)
    for args in (
        (data[:4], data[:4]),
        (data[:4], data[2:6]),
        (data[8:12], floats(4, 8)),
        (model.first.weight.detach()[:4],) * 2,
    ):
        assert torch.equal(fast(*args), other(*args))


def test_a_plan_for_parts_of_a_data_set_takes_batches_of_their_own():
    """The data set was counted whole; two tensors take less."""
    model, other, data = Net(), Net(), floats(64, 8)
    fast = planned(model, (data[:4], data[4:8])).apply(model)
    args = floats(4, 8), floats(4, 8) + 1

    assert torch.equal(fast(*args), other(*args))


def test_an_input_may_not_lie_in_what_the_step_changes():
    """A view of a weight would be read after the weight's update, if the plan does not know of it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = planned(model, (floats(4, 8),) * 2, optimizer=optimizer, optimizer_in_backward=True)
    fast = plan.apply(model, optimizer=optimizer)

    with pytest.raises(PlanMismatch, match=r"x lies in first\.weight, which the step changes, and did not"):
        fast(model.first.weight.detach()[:4], model.first.weight.detach()[:4])


def test_an_input_that_lay_in_a_parameter_has_to():
    """Its bytes were counted with the parameter's."""
    model = Net()
    fast = planned(model, (model.first.weight.detach(),)).apply(model)
    with torch.no_grad():
        wanted = Net()(Net().first.weight.detach())

    assert torch.equal(fast(model.first.weight.detach()), wanted)
    with pytest.raises(PlanMismatch, match=r"x lay in the parameter or buffer first\.weight when the plan was made"):
        fast(floats(16, 8))


def test_an_input_on_another_device_is_refused_by_name():
    """Where eager would fail in the middle of the step, or make numbers of nothing."""
    model = Net()
    fast = planned(model, (), {"x": floats(4, 8)}).apply(model)

    with pytest.raises(PlanMismatch, match="x is on meta, and the plan's ops are cpu's"):
        fast(x=floats(4, 8).to("meta"))


class Scaled(nn.Module):
    """Is told how by an object."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, how=None, scale=1.0):
        return (self.linear(x) * (how.scale if how is not None else 1) / (scale if abs(scale) > 0 else 1)).sum() * (
            1 if str(scale) != "-0.0" else 3
        )


def test_an_object_among_the_inputs_is_compared_by_what_it_holds():
    """Equal settings are the call that was planned; changed ones, in the same object even, are another."""
    model, how = Scaled(), SimpleNamespace(scale=2.0, inner={"a": [1, 2]})
    fast, x = planned(model, (floats(4, 8), how)).apply(model), floats(4, 8)
    same = SimpleNamespace(scale=2.0, inner={"a": [1, 2]})

    assert torch.equal(fast(x, same), model(x, same))
    how.scale = 3.0
    with pytest.raises(PlanMismatch, match="how was a SimpleNamespace when the plan was made"):
        fast(x, how)
    with pytest.raises(PlanMismatch, match="how was"):
        fast(x, SimpleNamespace(scale=2.0, inner={"a": [1, 3]}))


def test_floats_are_compared_by_their_bits():
    """Not a number is what was planned for; a negative zero is not zero."""
    model = Scaled()
    x = floats(4, 8)
    fast = planned(model, (x,), {"scale": float("nan")}).apply(model)
    assert fast(x, scale=float("nan")).isnan() == model(x, scale=float("nan")).isnan()
    fast = planned(model, (x,), {"scale": 0.0}).apply(model)
    assert torch.equal(fast(x, scale=0.0), model(x, scale=0.0))
    with pytest.raises(PlanMismatch, match=r"scale was 0\.0 when the plan was made and is -0\.0 now"):
        fast(x, scale=-0.0)


class Bag:
    """Holds a tensor, and is no pytree node."""

    def __init__(self, x: torch.Tensor):
        self.inner = {"x": [x]}


class Opens(nn.Module):
    """Reads a bag."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, bag):
        x = bag["input_ids"] if not isinstance(bag, Bag) else bag.inner["x"][0]
        return self.linear(x).sum()


def test_an_object_that_hides_tensors_is_refused():
    """A plan would read the tensors of the first call ever after."""
    with pytest.raises(CaptureError, match=r"bag is a Bag, which holds tensors that memplan cannot see: pass its tensors"):
        planned(Opens(), (Bag(floats(4, 8)),))
    transformers = pytest.importorskip("transformers")
    with pytest.raises(CaptureError, match=r"bag is a BatchEncoding, .* pass its items as arguments \(\*\*bag\)"):
        planned(Opens(), (transformers.BatchEncoding({"input_ids": floats(4, 8)}),))


def test_a_file_says_which_of_the_inputs_it_cannot_hold(tmp_path: Path):
    """An object's settings cannot be saved; whoever saves is warned, and whoever applies is told which and what to do."""
    plan = planned(Scaled(), (floats(4, 8), SimpleNamespace(scale=2.0)))
    with pytest.warns(UserWarning, match="how is a SimpleNamespace"):
        plan.save(tmp_path / "plan.json")

    with pytest.raises(PlanMismatch, match="cannot say what its inputs were, for how is a SimpleNamespace: pass tensors"):
        memplan.load(tmp_path / "plan.json").apply(Scaled())


def test_a_file_names_the_class_that_has_to_be_imported(tmp_path: Path):
    """Loading a plan imports nothing by itself."""
    plan = planned(Net(), (input_cases.Pair(floats(4, 8), floats(2, 8)),))
    plan.save(tmp_path / "plan.json")
    code = f"import memplan, torch; memplan.load({str(tmp_path / 'plan.json')!r}).apply(torch.nn.Linear(1, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert "have a Pair of the module 'input_cases' among them: import it" in done.stderr


def test_a_transformers_output_is_an_input(tmp_path: Path):
    """A `ModelOutput` is a registered node: its tensors are the plan's inputs."""
    outputs = pytest.importorskip("transformers.modeling_outputs")
    given = outputs.BaseModelOutput(last_hidden_state=floats(4, 8), hidden_states=(floats(2, 8),))
    planned(Net(), (given,)).save(tmp_path / "plan.json")
    model = Net()
    fast = memplan.load(tmp_path / "plan.json").apply(model)

    assert torch.equal(fast(given), Net()(given))

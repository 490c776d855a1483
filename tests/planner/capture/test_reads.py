"""What a model's forward reads beside its tensors is watched: a change is refused by name, any other is not."""

import argparse
import copy
import dataclasses
import re
import types

import memplan
import msgspec
import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.ir.errors import PlanMismatch
from memplan.planner.ir.machine import load_machine
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
SCALE = 0.5
TABLE = {"scale": 0.5}


class Config:
    """As libraries keep their settings."""

    kind = "first"

    def __init__(self):
        self.p, self.unread, self.inner = 0.25, 1, {"a": [1, 2]}


@dataclasses.dataclass
class Fields:
    """A data class."""

    p: float = 0.5
    unread: int = 1


class Slots:
    """An object without a dict."""

    __slots__ = ("p",)

    def __init__(self):
        self.p = 0.5


class Part(nn.Module):
    """A module of nobody's library, with a property and a fallback for attributes."""

    scale = 2.0

    def __init__(self):
        super().__init__()
        self._active, self.merged, self.inner = "default", [], {"default": 0.5}

    @property
    def active(self):
        return self._active

    def __getattr__(self, name):
        if name == "elsewhere":
            return self.inner["default"]
        return super().__getattr__(name)

    def forward(self, x):
        if self.merged:
            return x
        return x * self.inner[self.active] * self.scale * self.elsewhere


class Net(nn.Module):
    """Something of every kind."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer, self.part, self.free = nn.Linear(4, 4, bias=False), Part(), nn.Linear(4, 4)
        self.tau, self.unread, self.mask = 0.5, 1, torch.ones(4)
        self.config, self.fields, self.slots = Config(), Fields(), Slots()
        self.space, self.names = types.SimpleNamespace(p=0.5), argparse.Namespace(p=0.5)
        self.table, self.row, self.hidden = {"p": 0.5}, [0.5], [nn.Dropout(0.5)]

    def forward(self, x):
        return self.function(self, x).sum()


def whole(m, x):
    """Reads all of it."""
    y = m.part(m.layer(x)) * m.tau * m.mask * SCALE * TABLE["scale"]
    y = m.hidden[0](y) * m.config.p * m.config.inner["a"][0] * len(m.config.kind) * m.fields.p * m.slots.p
    return y * m.space.p * m.names.p * m.table["p"] * m.row[0] * (2 if m.training else 1)


def put(thing, key, value):
    """Set an attribute or an element."""
    if isinstance(thing, dict | list):
        thing[key] = value
    else:
        setattr(thing, key, value)


CHANGES = {
    "tau": lambda m: put(m, "tau", 0.9),
    "mask": lambda m: put(m, "mask", torch.zeros(4)),
    "function": lambda m: put(m, "function", lambda m, x: x),
    "config.p": lambda m: put(m.config, "p", 0.9),
    r"config.inner\['a'\]": lambda m: put(m.config.inner["a"], 0, 9),
    "config.kind": lambda m: put(m.config, "kind", "second one"),
    "config is another": lambda m: put(m, "config", Config()),
    "fields.p": lambda m: put(m.fields, "p", 0.9),
    "slots.p": lambda m: put(m.slots, "p", 0.9),
    "space.p": lambda m: put(m.space, "p", 0.9),
    "names.p": lambda m: put(m.names, "p", 0.9),
    r"table\['p'\]": lambda m: put(m.table, "p", 0.9),
    "table was": lambda m: put(m.table, "q", 0.9),
    "row": lambda m: put(m.row, 0, 0.9),
    r"hidden\[0\].training": lambda m: m.hidden[0].eval(),
    r"hidden\[0\].p": lambda m: put(m.hidden[0], "p", 0.1),
    "part._active": lambda m: put(m.part, "_active", "other"),
    "part.merged": lambda m: m.part.merged.append("default"),
    r"part.inner\['default'\]": lambda m: put(m.part.inner, "default", 0.1),
    "part.scale": lambda m: put(m.part, "scale", 3.0),
    "part.forward": lambda m: put(m.part, "forward", lambda x: x),
    "layer.bias": lambda m: put(m.layer, "bias", nn.Parameter(torch.ones(4))),
    "training": lambda m: put(m, "training", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_to_what_forward_reads_is_refused_by_name(name):
    """Through the planned module, and through the model; put back, it runs again."""
    model, x = Net(whole), torch.randn(2, 4)
    plan = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0)
    fast = plan.apply(model)
    for changed in (fast, model):
        if changed is model and name == "training":  # the planned module has a mode of its own
            continue
        fast(x)
        own = dict(vars(changed))
        CHANGES[name](changed)
        with pytest.raises(PlanMismatch, match=name):
            fast(x)
        if name in ("tau", "mask", "function", "config is another", "training"):
            vars(changed).update(own)
            fast(x)
        else:
            break


def test_an_equal_setting_in_the_place_of_another_is_the_same():
    """As peft sets its list of adapters anew."""
    model, x = Net(whole), torch.randn(2, 4)
    fast = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0).apply(model)
    model.part.merged, model.row, model.table, model.config.inner = [], [0.5], {"p": 0.5}, {"a": [1, 2]}
    fast(x)
    model.config.inner["a"] = [1, 3]
    with pytest.raises(PlanMismatch, match=r"config\.inner was"):
        fast(x)


@pytest.mark.parametrize("space", ["SCALE", "TABLE"])
def test_a_global_of_the_models_own_module_is_watched(space, monkeypatch):
    """As attributes are."""
    model, x = Net(whole), torch.randn(2, 4)
    fast = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0).apply(model)
    if space == "SCALE":
        monkeypatch.setitem(globals(), "SCALE", 0.75)
    else:
        monkeypatch.setitem(TABLE, "scale", 0.75)
    with pytest.raises(PlanMismatch, match=space):
        fast(x)


def test_what_forward_does_not_read_may_change():
    """A counter of the training loop's, a configuration's other entries, a part that is not called."""
    model, x = Net(whole), torch.randn(2, 4)
    fast = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0).apply(model)
    torch.manual_seed(0)
    wanted = fast(x)
    for net in (model, fast):
        net.unread, net.new, net.config.unread, net.config.new, net.fields.unread = 2, 3, 4, 5, 6
        net.free.note = "seen"
    torch.manual_seed(0)
    assert torch.equal(fast(x), wanted)


def test_a_change_between_planning_and_applying_is_noticed():
    """The model is traced anew, and the plan refused where it is another program by then."""
    model, x = Net(lambda m, x: m.layer(x) * m.table["p"]), torch.randn(2, 4)
    plan = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0)
    model.table["p"] = 0.25
    with pytest.raises(PlanMismatch, match="does not trace"):
        plan.apply(model)
    model.table["p"] = 0.5
    assert torch.equal(plan.apply(model)(x), model(x))


def test_a_copy_of_a_planned_model_is_watched_by_itself():
    """What is changed in the copy matters to the copy."""
    model, x = Net(whole), torch.randn(2, 4)
    fast = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0).apply(model)
    twin = copy.deepcopy(fast)
    twin(x)
    twin.config.p = 0.75
    fast(x)
    with pytest.raises(PlanMismatch, match=r"config\.p"):
        twin(x)


def test_a_hook_that_is_gone_is_noticed():
    """What it did is in the plan."""
    model, x = Net(lambda m, x: m.layer(x)), torch.randn(2, 4)
    handle = model.layer.register_forward_hook(lambda module, args, out: out * 2)
    fast = memplan.plan(model, None, (x,), machine=QUICK, time_limit=2.0).apply(model)
    fast(x)
    handle.remove()
    with pytest.raises(PlanMismatch, match="lost a hook"):
        fast(x)


def test_reading_is_noted_while_tracing_alone():
    """Modules and configurations read as before afterwards, also when tracing fails."""
    model = Net(lambda m, x: m.layer(x) * m.config.p if m.layer(x).sum() > 0 else x)
    with pytest.raises(memplan.CaptureError):
        memplan.plan(model, None, (torch.randn(2, 4),), machine=QUICK)
    assert "__getattribute__" not in vars(nn.Module) | vars(Config) | vars(Fields)


class Odd:
    """Has something else where its attributes should be, as a library of C functions does."""

    @property
    def __dict__(self):
        return print


def test_what_cannot_be_looked_into_is_left_alone():
    """Objects whose `__dict__` is none, and those of compiled classes that let nothing be set."""
    import itertools

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.odd, self.compiled = nn.Linear(4, 4), Odd(), re.compile("a")
            self.tables = itertools.count()

        def forward(self, x):
            return self.layer(x) * len(self.compiled.pattern)

    assert capture(Holds(), (torch.randn(2, 4),), loss=lambda out: out.sum()).train

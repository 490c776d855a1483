"""The scratchpad machine: a model's numbers on exactly so many bytes, and wrong numbers from a wrong program."""

import random
from dataclasses import replace

import memplan
import msgspec
import pytest
import torch
from memplan.backends.scratchpad.machine import Await, Copy, Exec, Scratchpad
from memplan.planner.ir.errors import MemplanError, PlanMismatch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A bottleneck with a skip, so that a value has to wait."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.grow, self.mix, self.norm = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.mix(F.hardswish(self.grow(x)))))


class Branches(nn.Module):
    """Several branches, a concatenation, pooling with indices nobody reads, two outputs of which one is a view."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.arms = nn.ModuleList(nn.Conv2d(8, 8, size, padding=size // 2) for size in (1, 3, 5))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        parts = [arm(x).relu() for arm in self.arms]
        return {"all": torch.cat([*parts, x], 1), "turned": parts[0].transpose(1, 2)}


class Attends(nn.Module):
    """Token ids, an embedding, a mask made in the model, attention written out."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(40, 16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9)
        return x + self.out(scores.softmax(-1) @ v), ids


MODELS = {
    "residual": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Residual(), Residual()), lambda: (torch.randn(1, 3, 12, 12),)),
    "branches": (Branches, lambda: (torch.randn(2, 3, 24, 24),)),
    "attention": (Attends, lambda: (torch.randint(0, 40, (2, 12)),)),
    "sparse input": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), lambda: (torch.randn(16, 32).t()[:8].t(),)),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()).bfloat16(), lambda: (torch.randn(4, 8).bfloat16(),)),
}


def build(name: str):
    """A model in evaluation mode, and inputs."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make().eval(), inputs()


def leaves(value) -> list[torch.Tensor]:
    """Its tensors."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("size", ["M_R", "M_H", "M_P"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_s_numbers_in_so_many_bytes(name, size, weights):
    """Bit for bit; the bytes and the clock that the machine counts are the referee's."""
    model, args = build(name)
    made = memplan.map_model(model, size, args, weights=weights)
    found = made.run(*args)
    with torch.no_grad():
        wanted = model(*args)
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(wanted)
    assert all(torch.equal(one, other) for one, other in zip(leaves(found), leaves(wanted), strict=True))
    counted, report = made.counted, made.mapping.report
    assert (counted.stored, counted.loaded) == report.moved
    assert counted.time == pytest.approx(report.time, rel=1e-12)
    assert counted.busy == pytest.approx(sum(op.seconds for op in made.mapping.fused.program.ops), rel=1e-12)
    again = [torch.randn_like(arg) if arg.is_floating_point() else arg.flip(0) for arg in args]
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(leaves(made.run(*again)), leaves(model(*again)), strict=True))


class Gated(nn.Module):
    """A wide branch decides what passes of a value that waits, and that is cheap to make again."""

    def __init__(self):
        super().__init__()
        self.stem, self.narrow, self.wide = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 32, 1)
        self.gate, self.out = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.out(x * self.gate(self.wide(self.narrow(x)).mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("weights", [False, True])
def test_ops_run_again_have_the_model_s_numbers(weights):
    """Where an op runs once more the bytes are the model's, and fewer of them move."""
    torch.manual_seed(0)
    model, args = Gated().eval(), (torch.randn(1, 3, 14, 14),)
    once, again = (memplan.map_model(model, "M_R", args, weights=weights, recompute=each) for each in (False, True))
    found = again.run(*args)
    with torch.no_grad():
        assert torch.equal(found, model(*args))
    assert again.mapping.report.repeated > 0 == once.mapping.report.repeated
    assert again.mapping.noncompulsory < once.mapping.noncompulsory
    assert (again.counted.stored, again.counted.loaded) == again.mapping.report.moved
    assert again.counted.time == pytest.approx(again.mapping.report.time, rel=1e-12)


def moved(step: Exec, which: int) -> Exec:
    """The same with one operand a few bytes further."""
    operands = list(step.operands)
    operands[which] = msgspec.structs.replace(operands[which], address=max(operands[which].address - 16, 0))
    return msgspec.structs.replace(step, operands=tuple(operands))


@pytest.mark.parametrize("seed", range(12))
def test_a_wrong_program_gives_wrong_numbers(seed):
    """An operand elsewhere, a load that is not waited for, a store left out: none goes unseen."""
    rng = random.Random(seed)
    model, args = build("residual")
    made = memplan.map_model(model, "M_R", args, weights=seed % 2 == 0)
    machine = Scratchpad(model, made.captured, made.mapping)
    code = list(machine.assembly.code)
    with torch.no_grad():
        wanted = model(*args)
    assert torch.equal(machine.run(*args), wanted)
    kind = ("operand", "wait", "store")[seed % 3]
    if kind == "operand":
        at = rng.choice([i for i, step in enumerate(code) if isinstance(step, Exec) and any(o.address for o in step.operands)])
        which = rng.choice([i for i, operand in enumerate(code[at].operands) if operand.address])
        code[at] = moved(code[at], which)
    elif kind == "wait":
        code.pop(rng.choice([i for i, step in enumerate(code) if isinstance(step, Await) and step.what == "LOAD"]))
    else:
        at = rng.choice([i for i, step in enumerate(code) if isinstance(step, Copy) and step.what == "STORE"])
        end = next(i for i in range(at, len(code)) if isinstance(code[i], Await) and code[i].buffer == code[at].operand.buffer)
        del code[end], code[at]
    machine.assembly = replace(machine.assembly, code=tuple(code))
    try:
        found = machine.run(*args)
    except (RuntimeError, KeyError, IndexError, MemplanError):
        return
    assert not torch.equal(found, wanted)


def test_the_program_reads_well(golden):
    """The assembly of a small net at the smallest scratchpad that any order allows."""
    model, args = build("residual")
    assert golden == str(memplan.map_model(model, "M_R", args).assembly)


def test_a_mapping_of_fewer_bits_is_not_run():
    model, args = build("residual")
    made = memplan.map_model(model, "M_R", args, bits=8)
    with pytest.raises(MemplanError, match="fewer bits"):
        made.run(*args)


class Told(nn.Module):
    """Takes a pair and a word."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(16, 16), nn.LayerNorm(16), nn.Dropout(0.5)

    def forward(self, pair, how="sum", *, scale=1.0):
        x = self.drop(self.norm(self.linear(pair[0]))) + pair[1]
        return (x.cumsum(1) if how == "sum" else x) * scale


def other_layer(model):
    """Another layer of the same shape."""
    model.linear = nn.Linear(16, 16)


CHANGED = {
    "a row to be spread": (lambda x, y: (((x[:, :1], y),), {}), r"pair\[0\] was float32\[1, 32, 16\] .* is float32\[1, 1"),
    "a batch": (lambda x, y: (((x, torch.cat([y, y])),), {}), r"pair\[1\] was float32\[1, 32, 16\] .* float32\[2, 32, 16\]"),
    "a type": (lambda x, y: (((x.double(), y),), {}), r"pair\[0\] was float32.* is float64"),
    "a device": (lambda x, y: (((x.to("meta"), y),), {}), r"pair\[0\] is on meta"),
    "a nesting": (lambda x, y: (([x, y],), {}), "nested otherwise"),
    "a word": (lambda x, y: (((x, y), "last"), {}), "this one has pair.*how|how was"),
    "a number": (lambda x, y: (((x, y),), {"scale": 2.0}), "scale"),
    "an argument less": (lambda x, y: ((), {}), "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_a_call_that_was_not_mapped_is_refused_by_the_argument_s_name(case):
    """It would be spread over the mapped shapes, or give the numbers of other arguments."""
    torch.manual_seed(0)
    model, x, y = Told().eval(), torch.randn(1, 32, 16), torch.randn(1, 32, 16)
    made = memplan.map_model(model, "M_P", ((x, y),))
    call, message = CHANGED[case]
    args, kwargs = call(x, y)
    with pytest.raises(PlanMismatch, match=message):
        made.run(*args, **kwargs)


CHANGES = {
    "trained": (lambda model: model.train(), r"drop\.training was False when the plan was made and is True now"),
    "a layer in training": (
        lambda model: model.drop.train(),
        r"drop\.training was False when the plan was made and is True now",
    ),
    "another layer": (other_layer, "submodule linear has been replaced"),
    "another setting": (lambda model: setattr(model.norm, "eps", 0.5), r"norm\.eps was 1e-05 .* is 0\.5"),
    "another type": (lambda model: model.double(), "was float32.* has changed since"),
    "another device": (lambda model: model.to("meta"), "is on meta"),
    "a hook": (lambda model: model.linear.register_forward_hook(lambda *_: None), "module linear has been given a hook"),
    "a parameter's shape": (lambda model: setattr(model.linear, "bias", nn.Parameter(torch.zeros(1))), "linear.bias was"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_has_changed_since_is_refused(case):
    """Its program is the one that was mapped."""
    torch.manual_seed(0)
    model, x = Told().eval(), torch.randn(1, 32, 16)
    made = memplan.map_model(model, "M_P", ((x, x.clone()),))
    change, message = CHANGES[case]
    change(model)
    with pytest.raises(PlanMismatch, match=message):
        made.run((x, x.clone()))


def test_parameters_have_the_values_of_now_and_arguments_any_order():
    """Weights changed in place or put in others' place are read as they are; keywords and other strides are the same call."""
    torch.manual_seed(0)
    model, x, y = Told().eval(), torch.randn(1, 32, 16), torch.randn(1, 32, 16)
    made = memplan.map_model(model, "M_P", ((x, y), "sum"), {"scale": 2.0})
    with torch.no_grad():
        model.linear.weight.mul_(3)
        model.linear.bias = nn.Parameter(torch.ones(16))
        wanted = model((x, y), "sum", scale=2.0)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)

    assert torch.equal(made.run(scale=2.0, pair=(x, y), how="sum"), wanted)
    assert torch.equal(made.run((strided, y), scale=2.0), wanted)

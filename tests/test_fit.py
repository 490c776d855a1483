"""Which sizes fit: the largest is right by brute force, whatever is made larger, and what cannot be asked is refused."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import memplan
import pytest
import torch
from memplan.planner.capture.sized import difference
from memplan.planner.cli import app as cli
from memplan.planner.ir.errors import BudgetError, MemplanError
from memplan.planner.pipeline.peak import modules_at_peak, numberless
from memplan.planner.verbs.session import Session
from memplan.planner.verbs.steps import Steps, resized
from quick import hasty
from torch import nn

GPT2 = "hf:gpt2?n_layer=1&n_embd=16&n_head=2&vocab_size=64&batch=2&seq=8&n_positions=13"
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    def forward(self, x):
        return self.inner(x).square().sum()

def net():
    return Net(), (torch.randn(4, 32),)
"""
H100: dict[str, Any] = {"machine": "h100-80gb"}
KIB = 1024


class Chain(nn.Module):
    """Layers and their loss."""

    def __init__(self, layers: int = 4, width: int = 32):
        super().__init__()
        self.inner = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))

    def forward(self, x):
        return self.inner(x).square().sum()


class Scaled(nn.Module):
    """One number for all that comes in: the step is as large as its widest op."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x * self.scale).square().sum()


@pytest.fixture(autouse=True)
def in_haste() -> Iterator[None]:
    """What is right does not depend on how long anything is searched."""
    with hasty():
        yield


@cache
def chain() -> Chain:
    """Kept as long as its traces."""
    return Chain()


def deep(layers: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A chain of some depth."""
    return Chain(layers), (torch.randn(64, 32),)


def fits(model: nn.Module, args: tuple, budget: int, **options: Any) -> bool:
    """Whether a plan by itself is found."""
    try:
        memplan.plan(model, budget, args, **H100, **options)
    except BudgetError:
        return False
    return True


@pytest.mark.parametrize("allow", [{"reorder"}, {"recompute", "reorder"}], ids=["keeping", "recomputing"])
def test_the_largest_batch_is_that_of_brute_force(allow: set[str]):
    """One trace says what a plan for every batch by itself says: all up to the largest fit, and the next does not."""
    budget = 120 * KIB
    found = memplan.fit(chain(), budget, (torch.randn(8, 32),), allow=allow, time_limit=1, **H100)
    around = range(found.largest - 1, found.largest + 3)
    known = [size for size in around if fits(chain(), (torch.randn(size, 32),), budget, allow=allow)]

    assert found.traces == 1
    assert known == [size for size in around if size <= found.largest]
    assert all(point.fits == (point.peak <= budget) == (point.size <= found.largest) for point in found.points)
    assert found.points[-1].size == found.largest + 1


def test_the_largest_depth_is_that_of_brute_force():
    """Each depth is traced that is tried."""
    budget = 100 * KIB
    found = memplan.fit(deep, budget, over="layers", time_limit=0, **H100)
    known = [fits(*deep(found.largest + more), budget) for more in range(3)]

    assert known == [True, False, False]
    assert found.largest >= 3


def test_the_most_that_is_asked_for_is_the_most_that_is_tried():
    """And said."""
    found = memplan.fit(chain(), "80GB", (torch.randn(2, 32),), most=9, time_limit=0, **H100)

    assert (found.largest, found.why, found.points[-1].fits) == (9, "most", True)
    assert "10 was not tried" in found.summary()


def test_a_sequence_is_no_longer_than_the_positions():
    """Of a model with a table of them, whose trace does not know."""
    found = memplan.fit(GPT2, "80GB", over="seq", time_limit=0, **H100)

    assert (found.largest, found.why, found.unit) == (13, "built", "tokens")
    assert "14 cannot be built: seq=14 is longer than the 13 positions" in repr(found)


def test_what_cannot_fit_is_told_from_what_is_not_found():
    """A step whose widest op alone is too large is proved to be."""
    found = memplan.fit(Scaled(), 400 * KIB, (torch.randn(2, 4096),), time_limit=0, **H100)

    assert found.why == "bytes"
    assert "cannot fit" in found.summary()


@pytest.mark.parametrize("levers", [{"optimizer_in_backward": True}, {"allow": {"recompute", "offload"}}])
def test_the_step_at_another_size_is_that_of_a_trace_there(levers: dict[str, Any]):
    """Also with levers that plans for many sizes cannot run yet."""
    base, make = resized(chain(), (torch.randn(2, 32),), {}, "batch")
    options = {"optimizer": "adamw", **H100, **levers}
    steps = Steps(make, base, "batch", options)
    model, args, kwargs = make(5)
    other = Session(model, args, kwargs, **options)

    assert steps.plans is not None
    assert difference(steps.program(5), other.program) == ""
    assert steps.at(5).planner.homes == other.planner.homes


def test_levers_and_modules():
    """What a lever gives is in bytes; modules at the peak add up to it."""
    found = memplan.fit(chain(), 160 * KIB, (torch.randn(8, 32),), optimizer="adamw", time_limit=1, **H100)
    session = Session(chain(), (torch.randn(4, 32),), **H100)
    side = session.planner.kept

    assert set(found.levers) == {"recompute", "reorder", "offload", "optimizer_in_backward"}
    assert found.allowed == {"recompute", "reorder"}
    assert found.levers["recompute"] > 0
    assert sum(found.modules.values()) == found.peak
    assert sum(modules_at_peak(session.program, side).values()) == side.peak
    assert [numberless(name) for name in ("h.0.mlp", "0.1", "conv1.2")] == ["h.*.mlp", "*.*", "conv1.*"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"over": "width"}, "over='width': it is batch, seq or layers"),
        ({"over": "layers"}, "a module has a depth of its own: give a function"),
        ({"over": "seq"}, r"no input has the shape \(batch, seq\)"),
        ({"most": 0}, "most=0: give a whole number, 1 or more"),
        ({"start": -2}, "start=-2: give a whole number"),
        ({"points": 1.5}, "points=1.5: give a whole number"),
        ({"budget": "60%"}, "a percentage has nothing to refer to"),
        ({"machine": "abacus"}, "abacus"),
        ({"budget": 4 * KIB}, "at batch 1: no schedule of Chain fits"),
        ({"model": lambda size: None}, r"returns \(model, args\)"),
        ({"model": lambda size: (chain(), (torch.randn(4, 32),))}, "the model has no batch"),
        ({"model": "hf:vit?image=32&num_hidden_layers=1", "over": "seq"}, "the model has no seq"),
        ({"model": "hf:resnet?image=32", "over": "layers"}, "hf:resnet has no number of layers"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], message: str):
    """In one line."""
    options: dict[str, Any] = {
        "model": chain(),
        "budget": "1MiB",
        "args": (torch.randn(4, 32),),
        **H100,
        "time_limit": 0,
        **asked,
    }
    with pytest.raises(MemplanError, match=message) as told:
        memplan.fit(options.pop("model"), options.pop("budget"), options.pop("args"), **options)
    assert "\n" not in str(told.value)


def test_the_command_answers_in_json_and_in_words(capsys: pytest.CaptureFixture[str], tmp_path):
    """With the keys that programs rely on, and a picture."""
    (tmp_path / "net.py").write_text(FACTORY)
    words = [
        "fit",
        f"{tmp_path / 'net.py'}:net",
        "--budget",
        "100KiB",
        "--machine",
        "h100-80gb",
        "--time-limit",
        "0",
        "--points",
        "3",
        "--quiet",
    ]
    cli.main([*words, "--json"])
    facts = json.loads(capsys.readouterr().out)
    cli.main([*words, "--png", str(tmp_path / "fit.png")])
    told = capsys.readouterr().out

    assert {"over", "largest", "peak", "time", "points", "levers"} <= set(facts)
    assert {"size", "peak", "time", "fits"} <= set(facts["points"][0])
    assert facts["over"] == "batch"
    assert f"largest batch of Net: {facts['largest']}," in told
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--budget", "1KiB"], 3, "at batch 1: no schedule"),
        (["--budget", "60%"], 2, "a percentage has nothing to refer to"),
        (["--over", "width"], 2, "'width' is not one of"),
        (["--most", "0"], 2, "greater than or equal to 1"),
        (["--machine", "abacus"], 2, "abacus"),
    ],
)
def test_how_the_command_ends(capsys: pytest.CaptureFixture[str], tmp_path, words: list[str], status: int, message: str):
    """As other commands do: 2 for usage, 3 for a budget that nothing meets."""
    (tmp_path / "net.py").write_text(FACTORY)
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", f"{tmp_path / 'net.py'}:net", "--machine", "h100-80gb", "--time-limit", "0", "--quiet", *words])
    assert ended.value.code == status
    assert message in capsys.readouterr().err

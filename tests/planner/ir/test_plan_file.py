"""Plan files: what is saved is what is loaded, and nothing else is."""

import hashlib
import json
import random
from pathlib import Path

import memplan
import pytest
import torch
from memplan.planner.ir.errors import BudgetError, InvalidSchedule, PlanMismatch
from torch import nn

WRONG = (PlanMismatch, InvalidSchedule)


def net(width: int = 32) -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))))


def square(output: torch.Tensor) -> torch.Tensor:
    """A loss."""
    return output.square().mean()


def make(budget, train: bool = True) -> memplan.Plan:
    """A plan of `net`."""
    options = {"loss": square} if train else {"train": False}
    return memplan.plan(net(), budget, (torch.randn(64, 32),), machine="h100-80gb", time_limit=5.0, **options)


@pytest.fixture(scope="module")
def plan() -> memplan.Plan:
    """A tight plan."""
    try:
        return make(1)
    except BudgetError as error:
        return make(error.minimum)


@pytest.fixture(scope="module")
def text(plan, tmp_path_factory) -> bytes:
    """The plan's file."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    """Where a test writes its file."""
    return tmp_path / "plan.json"


def signed(body: dict) -> bytes:
    """A file with this body and the checksum that goes with it, as somebody determined would write it."""
    raw = json.dumps(body).encode()
    return b'{"format":1,"sha256":"' + hashlib.sha256(raw).hexdigest().encode() + b'","plan":' + raw + b"}"


def test_a_plan_survives_its_file(plan, text, path):
    """Everything but the traced model comes back."""
    path.write_bytes(text)
    found = memplan.load(path)

    assert found == plan
    assert found.summary() == plan.summary()
    assert found.captured is None


def test_a_loaded_plan_gives_the_same_numbers(text, path):
    """Applied to the right model with its loss, it trains as the eager model does, dropout included."""
    path.write_bytes(text)
    model, other = net(), net()
    fast = memplan.load(path).apply(model, loss=square)
    x = torch.randn(64, 32)
    for module in (fast, other):
        torch.manual_seed(3)
        square(module(x)).backward()

    assert all(torch.equal(a.grad, b.grad) for a, b in zip(fast.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "model",
    [lambda: net(16), lambda: net()[:6], lambda: net().eval(), lambda: net().double(), lambda: nn.Sequential(net(), nn.Tanh())],
)
def test_a_loaded_plan_refuses_another_model(model, text, path):
    """Other widths, depths, modes and types trace to another program."""
    path.write_bytes(text)

    with pytest.raises((PlanMismatch, memplan.CaptureError)):
        memplan.load(path).apply(model(), loss=square)


def test_a_loaded_plan_asks_for_its_loss(text, path):
    """A function cannot be in a file."""
    path.write_bytes(text)

    with pytest.raises(PlanMismatch, match="loss"):
        memplan.load(path).apply(net())


def test_a_plan_of_the_last_release_is_still_applied():
    """Its description of inputs has no places and another nesting; its optimizer has fewer figures."""
    model, other = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    plan = memplan.load(Path(__file__).parents[2] / "data" / "plan-of-0.1.0.json")
    fast, x = plan.apply(model, loss=square), torch.randn(4, 8)
    for module in (fast, other):
        square(module(x)).backward()

    assert plan.recipe.counted is not None
    assert plan.recipe.counted.kept.states == 2
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_truncated_file_is_refused(text, path):
    """Cut anywhere."""
    for end in [*range(0, len(text) - 2, max(1, len(text) // 150)), len(text) - 2]:
        path.write_bytes(text[:end])
        with pytest.raises(PlanMismatch):
            memplan.load(path)


def test_a_flipped_byte_is_refused(text, path):
    """Any bit of any byte; a flip of white space at the end may do no harm."""
    rng = random.Random(0)
    for _ in range(150):
        at = rng.randrange(len(text) - 1)
        changed = bytearray(text)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(WRONG):
            memplan.load(path)


NONSENSE = {
    "empty": b"",
    "space": b" \n",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"1",
    "binary": bytes(range(256)),
    "latin": '{"format": "é"}'.encode("latin-1"),
    "deep list": b"[" * 100_000,
    "deep object": b'{"plan":' * 100_000,
    "deep body": b'{"format":1,"sha256":"","plan":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no plan": b'{"format":1,"sha256":""}',
    "format is text": b'{"format":"1","sha256":"","plan":{}}',
    "format is null": b'{"format":null,"sha256":"","plan":{}}',
    "checksum is a number": b'{"format":1,"sha256":1,"plan":{}}',
    "empty body": signed({}),
    "huge number": b'{"format":' + b"9" * 5000 + b',"sha256":"","plan":{}}',
    "not utf-8": b'{"format":1,"sha256":"\xff","plan":{}}',
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(case, path):
    """Whatever is in the file, the answer is PlanMismatch."""
    path.write_bytes(NONSENSE[case])

    with pytest.raises(PlanMismatch):
        memplan.load(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    """So is what cannot be opened."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanMismatch):
            memplan.load(path)


def test_a_newer_format_says_what_to_do(text, path):
    """The message names both versions."""
    path.write_bytes(text.replace(b'"format":1', b'"format":2', 1))

    with pytest.raises(PlanMismatch, match="format 2, this memplan reads 1"):
        memplan.load(path)


def test_an_edited_number_is_refused(text, path):
    """Without a new checksum no edit passes."""
    body = json.loads(text)
    body["plan"]["budget"] = 1
    path.write_text(json.dumps(body))

    with pytest.raises(PlanMismatch, match="changed since"):
        memplan.load(path)


def places(value, at=()):
    """The path to every leaf of nested JSON."""
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        for index in range(len(value)):
            yield from places(value[index], (*at, index))
    else:
        yield at


def with_change(body: dict, at: tuple, value: object) -> dict:
    """A copy with one leaf changed."""
    changed = json.loads(json.dumps(body))
    spot = changed
    for key in at[:-1]:
        spot = spot[key]
    spot[at[-1]] = value
    return changed


def test_edits_under_a_new_checksum_are_refused_or_harmless(text, path):
    """A forged file is checked by types, by the program's own rules and by the referee; no other error comes out."""
    body = json.loads(text)["plan"]
    rng = random.Random(1)
    leaves = list(places(body))
    values = [-1, 0, 1, 5, 10**6, 2**63, 10**30, -(2**62), 0.5, 1e300, "", "x", None, True, [], {}, [[1, 2]]]
    refused = 0
    for _ in range(250):
        path.write_bytes(signed(with_change(body, rng.choice(leaves), rng.choice(values))))
        try:
            found = memplan.load(path)
            found.summary()
        except WRONG:
            refused += 1
            continue
        assert 0 <= found.peak <= (2**62 if found.budget is None else found.budget)
        assert found.time >= 0

    assert refused > 125


def test_a_forged_description_of_inputs_is_refused(text, path):
    """The inputs are described in a text of its own, read when the plan is applied."""
    body = json.loads(text)["plan"]
    inputs = json.loads(body["recipe"]["inputs"])
    rng = random.Random(2)
    forged = ["", "{}", "[]", "nonsense", "[" * 10_000, '{"leaves": [], "spec": "[1, {}]"}']
    for at in places(inputs):
        for value in (-1, 10**12, "x", None, [], rng.random()):
            forged.append(json.dumps(with_change(inputs, at, value)))
    for one in forged:
        path.write_bytes(signed({**body, "recipe": {**body["recipe"], "inputs": one}}))
        found = memplan.load(path)
        try:
            found.apply(net(), loss=square)
        except (PlanMismatch, memplan.CaptureError):
            continue
        assert without_grad(json.loads(one)) == without_grad(inputs)


def without_grad(inputs: dict) -> dict:
    """A description of inputs that does not say whether they want gradients, which the program's structure may not show."""
    for leaf in inputs["leaves"]:
        leaf.get("tensor", {}).pop("requires_grad", None)
    return inputs


@pytest.mark.parametrize(
    ("name", "value"), [("bound", 1e9), ("bound", -1.0), ("minimum", -1), ("minimum", 2**61), ("solve_seconds", -1.0)]
)
def test_figures_that_cannot_be_are_refused(name, value, text, path):
    """Those that no instruction speaks of."""
    path.write_bytes(signed(json.loads(text)["plan"] | {name: value}))
    with pytest.raises(PlanMismatch, match=name):
        memplan.load(path)

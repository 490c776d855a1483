"""What a plan says of where its times come from."""

import hashlib
import json
from pathlib import Path

import memplan
import msgspec
import pytest
import torch
from memplan.backends.measure import worker as measuring
from memplan.planner.cli.tables import plan_facts
from memplan.planner.cost import local
from memplan.planner.cost.gauge import Reading
from memplan.planner.cost.local import Rates
from memplan.planner.cost.table import Figures
from memplan.planner.ir.coverage import Coverage
from torch import nn

pytestmark = pytest.mark.cold

DAY = 86_400
NOON = Reading(1_796_040_000, 1e-3, 1e-3)  # 2026-11-30, in any time zone but a few


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Reading]:
    """A machine that is measured in no time, at the pace and on the day that a test says; every op takes a millisecond."""
    state = {"now": NOON}
    monkeypatch.setattr(local, "probe", lambda device: Rates({"default": 1e11}, 1e10, 1e-6))
    monkeypatch.setattr(local, "read_pace", lambda device: state["now"])
    monkeypatch.setattr(measuring, "read_pace", lambda device: state["now"])

    def measure(keys, *_, **__):
        return {key: Figures(1e-3, 0, state["now"].disturbed, state["now"]) for key in keys}

    monkeypatch.setattr(measuring, "measure", measure)
    return state


def net(device: str = "cpu") -> nn.Module:
    """Two layers."""
    with torch.device(device):
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def plan_of(model: nn.Module, **options) -> memplan.Plan:
    """A plan of it, with nothing to choose."""
    device = next(model.parameters()).device
    return memplan.plan(model, None, (torch.randn(8, 32, device=device),), loss=torch.sum, time_limit=5.0, **options)


def test_a_plan_says_what_was_measured_on_what_and_when():
    """Of the ops of this step all but the loss, which is a call of the caller's own."""
    plan = plan_of(net())
    found = plan.coverage
    assert found is not None
    assert 0.9 < found.share < 1.0
    assert found.device == local.device_key()
    assert found.since == found.until
    line = next(line for line in plan.summary().splitlines() if line.startswith("times: "))
    assert line.startswith(f"times: {found.share:.0%} measured on {local.device_key()}, {found.until}")
    facts = plan_facts(plan)["measured"]
    assert (facts["share"], facts["device"], facts["when"], facts["disturbed"]) == (
        found.share, local.device_key(), found.until, 0.0
    )  # fmt: skip
    assert json.dumps(facts)


def test_measurements_of_several_days_are_a_range():
    assert "2026-11-28 to 2026-11-30" in Coverage(2, 2, 1.0, 1.0, 0.0, "a device", "2026-11-28", "2026-11-30").describe("m")


def test_what_was_timed_beside_other_work_is_said(measured):
    """And no longer once it has been timed in quiet."""
    measured["now"] = NOON._replace(disturbed=True)
    with pytest.warns(UserWarning, match="timed while other work held the cores"):
        plan = plan_of(net())
    assert plan.coverage is not None
    assert plan.coverage.disturbed == plan.coverage.share
    assert "beside other work, known only to take no longer" in plan.summary()
    measured["now"] = NOON
    plan = plan_of(net())
    assert plan.coverage is not None
    assert plan.coverage.disturbed == 0.0
    assert "beside other work" not in plan.summary()


def test_a_model_without_memory_uses_what_the_table_has(measured):
    """What is on meta is not measured: its plan rests on what was measured before, and says when nothing was."""
    plan = plan_of(net("meta"))
    assert plan.coverage is not None
    assert plan.coverage.share == 0.0
    assert "times: none measured, estimated from the rates of local-cpu" in plan.summary()
    assert "memplan calibrate measures them" in plan.summary()
    same = plan_of(net())
    plan = plan_of(net("meta"))
    assert plan.time == same.time
    assert plan.coverage is not None
    assert same.coverage is not None
    assert plan.coverage.share == same.coverage.share


def test_a_preset_is_all_estimated():
    plan = plan_of(net(), machine="h100-80gb")
    assert "times: none measured, estimated from the rates of h100-80gb" in plan.summary().splitlines()
    assert plan_facts(plan)["measured"]["device"] is None


def test_rates_of_a_busy_hour_are_said(measured):
    """Where nothing else is known of a machine than a probe that other work got in the way of."""
    measured["now"] = NOON._replace(disturbed=True)
    plan = plan_of(net("meta"))
    assert "a probe that other work got in the way of" in plan.summary()


def test_it_survives_the_plans_file_and_older_files_lack_it(tmp_path: Path):
    plan = plan_of(net())
    plan.save(tmp_path / "plan.json")
    assert memplan.load(tmp_path / "plan.json").coverage == plan.coverage

    body = msgspec.json.decode((tmp_path / "plan.json").read_bytes())["plan"]
    del body["coverage"], body["compile_seconds"]
    (tmp_path / "old.json").write_bytes(signed(body))
    old = memplan.load(tmp_path / "old.json")
    assert old.coverage is None
    assert "times:" not in old.summary()
    assert plan_facts(old)["measured"] is None


@pytest.mark.parametrize("change", [{"measured_seconds": 1e9}, {"seconds": -1.0}, {"measured": -1}, {"disturbed_seconds": 1e9}])
def test_a_forged_share_is_refused(change, tmp_path: Path):
    plan = plan_of(net())
    plan.save(tmp_path / "plan.json")
    body = msgspec.json.decode((tmp_path / "plan.json").read_bytes())["plan"]
    body["coverage"] |= change
    (tmp_path / "forged.json").write_bytes(signed(body))
    with pytest.raises(memplan.PlanMismatch, match="coverage"):
        memplan.load(tmp_path / "forged.json")


def signed(body: dict) -> bytes:
    """A plan's file with this body."""
    raw = json.dumps(body).encode()
    return b'{"format":1,"sha256":"' + hashlib.sha256(raw).hexdigest().encode() + b'","plan":' + raw + b"}"

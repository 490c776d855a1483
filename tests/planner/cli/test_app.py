"""The command line: what goes where, and how it ends."""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import pytest
from memplan.planner.cli import app as cli
from memplan.planner.ir.errors import BudgetError, CaptureError
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Run, Schedule
from memplan.planner.verbs import plan as api

MODEL = "hf:bert?num_hidden_layers=1&hidden_size=32&num_attention_heads=2&intermediate_size=32&vocab_size=50&seq=8"


def small_plan(budget: int | None = None) -> Plan:
    """A weight, an activation made twice, its gradient."""
    kinds = [("w", Kind.PARAMETER), ("a", Kind.ACTIVATION), ("l", Kind.TEMPORARY), ("w.grad", Kind.GRADIENT)]
    ops = (
        Op("fwd", "aten.mm.default", "fwd", Phase.FORWARD, (0,), (1,), seconds=1e-3, where="net"),
        Op("loss", "loss", "loss", Phase.LOSS, (1,), (2,), repeatable=False),
        Op("bwd", "aten.mm.default", "bwd", Phase.BACKWARD, (0, 1, 2), (3,), seconds=2e-3),
    )
    program = Program("net", tuple(Buffer(name, 1 << 20, kind) for name, kind in kinds), ops, (3,))
    machine = load_machine("h100-80gb")
    plain = Schedule(program.digest, (Run(0, (1,)), Run(1, (2,)), Run(2, (3,)), Free(1), Free(2)))
    again = Schedule(program.digest, (Run(0, (1,)), Run(1, (2,)), Free(1), Run(0, (1,)), Run(2, (3,)), Free(1), Free(2)))
    sides = [Side(program, schedule, referee(program, unlimited(machine), schedule)) for schedule in (again, plain)]
    return Plan(program, machine, budget, *sides, "feasible", 0.25, 3e-3, 4 << 20, 0.1, 0.2, Recipe("{}", True, False, None))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan file."""
    path = tmp_path / "plan.json"
    small_plan().save(path)
    return path


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, without its progress."""
    try:
        cli.main([*(str(word) for word in words), "--quiet"])
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
    printed = capsys.readouterr()
    assert isinstance(status, int)
    return status, printed.out, printed.err


def test_plan_prints_one_object_and_writes_the_file(capsys, monkeypatch, tmp_path):
    asked = {}

    def made(model, budget, args, kwargs, **options):
        asked.update(options, budget=budget, device=next(model.parameters()).device.type, kwargs=set(kwargs))
        return small_plan(5 << 20)

    monkeypatch.setattr(api, "plan", made, raising=False)

    words = ("--budget", "60%", "--optimizer", "adamw", "--allow", "recompute", "--allow", "reorder", "--machine", "h200")
    status, out, err = call(capsys, "plan", MODEL, *words, "--json", "-o", tmp_path / "p.json")

    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert set(facts) == {
        "budget",
        "peak",
        "time",
        "unplanned",
        "eager_peak",
        "status",
        "gap",
        "minimum_budget",
        "capture_seconds",
        "solve_seconds",
        "compile_seconds",
        "measured",
        "counts",
        "machine",
        "ops",
        "buffers",
        "output",
    }
    assert facts["unplanned"] == {"peak": 4 << 20, "time": pytest.approx(3e-3)}
    assert facts["counts"] == {"keep": 0, "recompute": 1, "offload": 0}
    assert (tmp_path / "p.json").is_file()
    assert asked["device"] == "meta"
    assert asked["kwargs"] == {"input_ids", "labels"}
    assert asked["allow"] == {"recompute", "reorder"}
    assert (asked["budget"], asked["optimizer"], asked["machine"], asked["train"]) == ("60%", "adamw", "h200", True)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_beside_the_answer(capsys, monkeypatch):
    def made(*_, **__):
        warnings.warn("3 of 9 ops were timed [badly]", stacklevel=2)
        return small_plan()

    monkeypatch.setattr(api, "plan", made, raising=False)
    status, out, err = call(capsys, "plan", MODEL, "--json")
    assert status == 0
    assert json.loads(out)["status"] == "feasible"
    assert err == "memplan: warning: 3 of 9 ops were timed [badly]\n"


def test_people_get_tables_on_standard_output(capsys, saved):
    """Where they can be piped; without colour, and as wide as they are."""
    status, out, err = call(capsys, "show", saved)

    assert (status, err) == (0, "")
    assert "planned" in out
    assert "4 ms" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("error", "status", "minimum"),
    [
        (BudgetError("too small\nby far", 123), 3, 123),
        (BudgetError("what is 'x'?"), 2, None),
        (CaptureError("cannot trace line 3"), 1, "absent"),
        (MemoryError(), 1, "absent"),
        (OSError(28, "No space left on device", "plan.json"), 1, "absent"),
    ],
)
def test_errors_end_in_one_line_and_their_status(capsys, monkeypatch, error, status, minimum):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(api, "plan", refuse, raising=False)

    ended, out, err = call(capsys, "plan", MODEL, "--json")

    assert ended == status
    assert err.startswith("memplan: ")
    assert err.count("\n") == 1
    assert json.loads(out)["kind"] == type(error).__name__
    assert json.loads(out).get("minimum_budget", "absent") == minimum
    assert call(capsys, "plan", MODEL)[:2] == (status, "")


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", MODEL, "--budget", "lots"],
        ["plan", MODEL, "--budget", "-5"],
        ["plan", MODEL, "--budget", "0"],
        ["plan", MODEL, "--allow", "magic"],
        ["plan", MODEL, "--optimizer", "lion"],
        ["plan", MODEL, "-o", "no/such/folder/plan.json"],
        ["run", MODEL, "--steps", "0"],
        ["sweep", MODEL, "--points", "1"],
        ["show", "plan.json", "--png", "/"],
        ["bogus"],
    ],
)
def test_usage_is_status_2_without_loading_the_model(capsys, monkeypatch, words):
    monkeypatch.setattr("memplan.planner.models.byname.load_transformers", lambda *_, **__: pytest.fail("loaded"))

    status, out, err = call(capsys, *words)

    assert (status, out) == (2, "")
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["plan", "no.py:f"], ["plan", "hf:lama"], ["check", "none.json"], ["show", "none.json"]])
def test_what_is_not_there_is_status_1(capsys, words):
    status, out, err = call(capsys, *words)

    assert (status, out) == (1, "")
    assert err.count("\n") == 1


def test_check_reports_the_replay(capsys, saved):
    status, out, _ = call(capsys, "check", saved, "--json")

    facts = json.loads(out)
    assert (status, facts["valid"], facts["peak"], facts["repeated"]) == (0, True, 4 << 20, 1)
    assert facts["moved"] == {"device->host": 0, "host->device": 0}


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("fwd", "fxd"), lambda text: "{}"]
)
def test_check_refuses_a_damaged_file(capsys, saved, damage):
    saved.write_text(damage(saved.read_text()))

    status, out, err = call(capsys, "check", saved, "--json")

    assert status == 1
    assert json.loads(out)["kind"] == "PlanMismatch"
    assert err.count("\n") == 1


def test_check_names_the_rule_that_a_schedule_breaks(capsys, tmp_path):
    plan = small_plan()
    broken = Schedule(plan.program.digest, plan.schedule.instructions[:-1])
    plan = Plan(**{**vars(plan), "planned": Side(plan.program, broken, plan.planned.report)})
    plan.save(tmp_path / "leaky.json")

    status, out, err = call(capsys, "check", tmp_path / "leaky.json", "--json")

    assert status == 1
    assert json.loads(out)["rule"] == "leak"
    assert "'leak'" in err


def test_show_writes_every_export(capsys, saved, tmp_path):
    files = {"--png": "t.png", "--svg": "t.svg", "--trace": "c.json", "--snapshot": "s.pickle", "--html": "r.html"}
    words = [word for flag, name in files.items() for word in (flag, tmp_path / name)]

    status, out, _ = call(capsys, "show", saved, *words, "--text", "--json")

    facts = json.loads(out)
    assert status == 0
    assert facts["written"] == [str(tmp_path / name) for name in files.values()]
    assert "again" in facts["text"]
    assert all((tmp_path / name).stat().st_size for name in files.values())


def test_sweep_prints_the_curve(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "sweep", lambda *_, **__: [small_plan(6 << 20), small_plan(4 << 20)], raising=False)

    status, out, _ = call(capsys, "sweep", MODEL, "--csv", tmp_path / "c.csv", "--svg", tmp_path / "c.svg", "--json")

    facts = json.loads(out)
    assert status == 0
    assert [point["budget"] for point in facts["points"]] == [6 << 20, 4 << 20]
    assert facts["points"][0]["overhead"] == pytest.approx(1 / 3)
    assert (tmp_path / "c.csv").read_text().splitlines()[0] == "budget,peak,time,overhead,gap,status"
    assert "6 MiB" in call(capsys, "sweep", MODEL)[1]


def test_run_puts_predictions_beside_measurements(capsys, monkeypatch):
    from memplan.backends.measure import compare as turns
    from memplan.backends.measure import training as trial

    def pretend(plain, planned, peaks, device, tell):
        assert (plain.plan, peaks, device) == (None, (4 << 20, small_plan().peak), "cuda")
        assert planned.plan
        losses = (0.5).hex(), float("nan").hex()
        trials = (trial.Trial(peak, 0.01, losses, ("x", "y")) for peak in (5 << 20, None))
        return turns.Comparison(*trials, 1.25, rounds=3, disturbed=2)

    monkeypatch.setattr(api, "plan", lambda *_, **__: small_plan(), raising=False)
    monkeypatch.setattr(turns, "compare", pretend)

    status, out, _ = call(capsys, "run", MODEL, "--json")
    shown = call(capsys, "run", MODEL)

    facts = json.loads(out)
    assert status == 0
    assert facts["unplanned"]["peak"] == {"predicted": 4 << 20, "measured": 5 << 20}
    assert facts["planned"]["losses"] == [0.5, None]
    assert facts["ratio"]["measured"] == 1.25
    assert facts["rounds"] == {"counted": 3, "in_turns": True, "disturbed": 2}
    assert "times: 1.250 of unplanned" in shown[1]
    assert "other work held the cores in 2 of 3" in " ".join(shown[1].split())
    assert facts["losses_equal"]
    assert facts["gradients_equal"]
    assert "bit-equal" in shown[1]


def test_calibrate_says_what_is_known_of_the_step(capsys):
    status, out, _ = call(capsys, "calibrate", MODEL, "--json", "--time-limit", "600")

    facts = json.loads(out)
    assert status == 0
    assert 0 < facts["measured"] < facts["ops"]  # equal operators once
    assert facts["coverage"]["measured"] == facts["ops"] - 1  # all but the caller's loss
    assert Path(facts["file"]).is_file()


def test_help_needs_no_torch():
    code = """
import sys
from memplan.planner.cli import app as cli
try:
    cli.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "sweep" in done.stdout


@pytest.mark.slow
def test_a_trial_measures_itself_and_repeats_in_any_process():
    from memplan.backends.measure.training import Request, in_fresh_process, run

    request = Request(MODEL, None, 2)

    fresh, here = in_fresh_process(request), run(request)

    assert fresh.losses == here.losses
    assert fresh.gradients == here.gradients
    assert fresh.losses[0] != fresh.losses[1]
    assert fresh.peak is None or fresh.peak > 0


def test_a_trial_that_fails_says_why(capsys, monkeypatch):
    from memplan.backends.measure import training as trial

    request = msgspec.json.encode(trial.Request("no.py:f", None, 1))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(request)))

    trial.main()

    assert json.loads(capsys.readouterr().out)["error"].startswith("no file no.py")


USERS = """
import sys
import torch
from torch import nn

print("imported")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        print("called")
        return self.layer(x).sum()

def good():
    print("made")
    return Model(), (torch.randn(2, 4),)

def misfit():
    return Model(), (torch.randn(2, 5),)

def leaving():
    sys.exit(0)

def wanting(width):
    return Model(), ()
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    """A user's file."""
    (tmp_path / "users.py").write_text(USERS)
    return str(tmp_path / "users.py")


@pytest.mark.parametrize("words", [("plan",), ("sweep", "--points", "2")])
def test_what_a_model_prints_is_beside_the_answer(capsys, users, words):
    """Standard output is one object."""
    command, *rest = words
    status, out, err = call(capsys, command, f"{users}:good", "--machine", "h100-80gb", *rest, "--json")
    assert status == 0
    assert json.loads(out)["machine"] == "h100-80gb"
    assert {"imported", "made", "called"} <= set(err.split())


@pytest.mark.parametrize(
    ("name", "words"),
    [("misfit", "cannot trace the model at"), ("leaving", "SystemExit: 0"), ("wanting", "a factory takes no arguments")],
)
def test_a_users_mistake_is_one_line(capsys, users, name, words):
    """And ends with 1, whatever the file wants."""
    status, out, err = call(capsys, "plan", f"{users}:{name}", "--machine", "h100-80gb")
    told = [line for line in err.splitlines() if line not in ("imported", "made", "called")]
    assert (status, out, len(told)) == (1, "", 1)
    assert words in told[0]


def test_a_syntax_error_begins_with_its_place(capsys, tmp_path):
    """File and line."""
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef f(:\n    pass\n")
    status, _, err = call(capsys, "plan", f"{path}:f")
    assert status == 1
    assert err.startswith(f"memplan: {path}:2: SyntaxError")


@pytest.mark.parametrize(
    "words",
    [
        ("plan", MODEL, "--seed", "99999999999999999999"), ("plan", MODEL, "--allow", "tile"),
        ("alloc", "in.csv", "--align", "9" * 30), ("sweep", MODEL, "--png", "a.bogus"), ("show", "p.json", "--png", "noext"),
    ],
)  # fmt: skip
def test_options_are_refused_before_anything_is_loaded(capsys, words):
    """With status 2, and no traceback."""
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_one_line(capsys, users, device):
    """Of `run`."""
    status, out, err = call(capsys, "run", f"{users}:good", "--device", device)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"memplan: no device {device!r}")


def test_a_negative_size_is_refused(capsys):
    """Of a transformers configuration."""
    status, _, err = call(capsys, "plan", "hf:gpt2?n_layer=-1")
    assert status == 1
    assert "n_layer=-1 does not fit" in err


def test_a_mapping_is_as_optimal_from_its_file(capsys, users, tmp_path):
    """Its status is of the bytes that it moves."""
    words = ("--scratchpad", "1MiB", "--save", tmp_path / "p.json", "--json")
    mapped = json.loads(call(capsys, "map", f"{users}:good", *words)[1])
    shown = json.loads(call(capsys, "show", tmp_path / "p.json", "--json")[1])
    assert (shown["status"], shown["gap"]) == (mapped["status"], mapped["gap"]) == ("optimal", 0.0)

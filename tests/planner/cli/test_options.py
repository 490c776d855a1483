"""What the command line refuses, and how soon; its help and its completion."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from memplan.planner.cli import app as cli

MODEL = "hf:gpt2?n_layer=1"
COMMANDS = ("", "plan", "fit", "show", "check", "run", "sweep", "machines", "calibrate", "cache", "alloc", "map")


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    status = 0
    try:
        cli.main([str(word) for word in words])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert isinstance(status, int)
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", MODEL, "--lend-gradients"], "--arena"),
        (["plan", MODEL, "--host-budget", "1GiB"], "--allow offload"),
        (["plan", MODEL, "--host-budget", "1GiB", "--allow", "reorder"], "--allow offload"),
        (["plan", MODEL, "--strategy", "memo", "--arena"], "leave out --arena"),
        (["plan", MODEL, "--strategy", "memo", "--allow", "recompute"], "--allow offload"),
        (["plan", MODEL, "--strategy", "memo", "--infer"], "leave out --infer"),
        (["plan", MODEL, "--strategy", "mimo"], "'memo'"),
        (["plan", MODEL, "--optimizer-in-backward"], "--optimizer"),
        (["plan", MODEL, "--optimizer", "sgd", "--optimizer-in-backward", "--infer"], "--infer"),
        (["plan", MODEL, "--optimizer", "sgd", "--infer"], "--infer"),
        (["plan", MODEL, "--arena", "--lend-gradients", "--infer"], "no gradients"),
        (["plan", MODEL, "--allow", "recompute", "--allow", "magic"], "'magic'"),
        (["plan", MODEL, "--allow", ","], "--allow is empty"),
        (["plan", MODEL, "--machine", "h1000"], "no machine 'h1000'"),
        (["plan", MODEL, "--time-limit", "nan"], "0"),
        (["plan", MODEL, "--time-limit", "-1"], "--time-limit"),
        (["plan", MODEL, "--bugdet", "1GiB"], "did you mean --budget"),
        (["run", MODEL, "--optimizer-in-backward"], "--optimizer"),
        (["run", MODEL, "--machine", "h200"], "--machine"),
        (["sweep", MODEL, "--optimizer-in-backward"], "--optimizer"),
        (["sweep", MODEL, "--budget", "1GiB"], "--budget"),
        (["plan", MODEL, "--points", "3"], "--points"),
        (["calibrate", MODEL, "--device", "cuda", "--offload"], "leave it out"),
        (["calibrate", MODEL, "--device", "tpu"], "cpu or cuda"),
        (["map", MODEL, "--scratchpad", "M_X"], "M_R"),
        (["map", MODEL, "--scratchpad", "1MiB", "--bits", "7"], "8, 16, 32"),
        (["map", MODEL, "--scratchpad", "1MiB", "--bits", "8", "--run"], "leave out --run"),
        (["plan", MODEL, "--solver", "glpk"], "'glpk' is not known: the solvers are highs, cbc, scip, gurobi, cplex"),
        (["run", MODEL, "--solver", "cplex"], "'cplex' is not installed: pip install cplex"),
        (["sweep", MODEL, "--solver", "CBC"], "'CBC' is not known"),
        (["map", MODEL, "--scratchpad", "M_R", "--solver", "cplex"], "pip install cplex"),
        (["alloc", "none.csv", "--solver", "glpk"], "'glpk' is not known"),
        (["alloc", "none.csv", "--solver", "highs", "--method", "cp-sat"], "--method cp-sat is none"),
        (["plan", MODEL, "--solver", "highs", "--strategy", "memo"], "leave out --solver"),
        (["plan", MODEL, "--solver", "highs", "--allow", "reorder"], "leaves nothing to solve"),
        (["plna", MODEL], "'plan'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_torch(capsys, monkeypatch, words, told):
    """One line with what to do, status 2; with --json one object that says the same."""
    monkeypatch.setitem(sys.modules, "memplan.planner.models.byname", None)  # an import of it fails
    monkeypatch.setattr("memplan.solvers.programs.names.find_class", lambda name: None)
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err
    assert "=True" not in err
    status, out, _ = call(capsys, *words, "--json")
    assert (status, json.loads(out)["kind"]) == (2, "UsageError")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("gpt2", "as in hf:gpt2"),
        ("llama?num_hidden_layers=2", "as in hf:llama?num_hidden_layers=2"),
        ("here.py", "here.py:factory"),
        ("there.py:f", "no file there.py"),
        ("hf:gpt2?n_layer", "write name=value"),
        ("hf:gpt2?n_layer=1&n_layer=2", "leave one out"),
        (":f", "path/to/file.py:factory"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_before_torch(capsys, monkeypatch, tmp_path, spec, told):
    """Status 1, for nothing is wrong with the options."""
    monkeypatch.chdir(tmp_path)
    Path("here.py").touch()
    monkeypatch.setitem(sys.modules, "memplan.planner.models.byname", None)
    status, out, err = call(capsys, "plan", spec)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert told in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_reads_well(capsys, monkeypatch, golden, command):
    """By -h as by --help."""
    if tuple(map(int, metadata.version("typer").split(".")[:2])) < (0, 29):
        pytest.skip("the golden text is as typer 0.29 and later write it")
    monkeypatch.setenv("COLUMNS", "80")
    words = [command] if command else []
    status, out, err = call(capsys, *words, "-h")
    assert (status, err) == (0, "")
    assert out == call(capsys, *words, "--help")[1]
    assert golden == out


def test_the_version_is_the_packages(capsys):
    """On standard output."""
    import memplan

    assert call(capsys, "--version") == (0, f"memplan {memplan.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("memplan pl", {"plan"}),
        ("memplan plan --machine h1", {"h100-80gb", "h100-8x80gb"}),
        ("memplan plan --allow recompute,", {"recompute,reorder", "recompute,offload"}),
        ("memplan plan hf:gpt2", {"gpt2"}),
        ("memplan plan --optimizer ad", {"adam", "adamw"}),
        ("memplan map --solver c", {"cbc", "cplex"}),
    ],
)
def test_the_shell_completes(words, wanted):
    """Without importing torch."""
    code = "from memplan.planner.cli import app\ntry:\n    app.main([])\nfinally:\n    import sys\n"
    code += "    assert not {'torch', 'pulp'} & {*sys.modules}"
    asked = {"_MEMPLAN_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    done = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stderr == ""
    assert all(word in done.stdout for word in wanted), done.stdout

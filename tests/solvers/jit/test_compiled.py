"""Compiled solvers: where their code is kept, and that it is there before a clock runs."""

import os
import subprocess
import sys
from pathlib import Path

import memplan
import pytest
import torch
from memplan.solvers import warm
from memplan.solvers.jit import compiled
from memplan.solvers.remat import anneal, replay
from memplan.solvers.storage import canonical, greedy
from torch import nn

SMALL = """
from memplan.solvers.jit.compiled import compiled
import numba
before = numba.config.CACHE_DIR
from memplan.solvers.remat import replay
assert numba.config.CACHE_DIR == before
assert replay.limit_of(3) > 0
"""


def run(cache: Path | str, **settings: str) -> None:
    """Compile one function in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"MEMPLAN_CACHE": str(cache), **settings}
    subprocess.run([sys.executable, "-c", SMALL], env=environment, check=True, timeout=120)


def test_code_is_kept_in_the_users_cache(tmp_path):
    """And not beside the sources, where it would outlive an uninstall; numba's own setting is as it was."""
    run(tmp_path)
    assert list((tmp_path / "numba").rglob("replay.limit_of*.nbc"))
    assert not list(Path(compiled.__file__).parent.rglob("*.nb[ic]"))


def test_numbas_own_setting_is_respected(tmp_path):
    """Where the user has named a folder, code lies there."""
    run(tmp_path / "ours", NUMBA_CACHE_DIR=str(tmp_path / "theirs"))
    assert list((tmp_path / "theirs").rglob("replay.limit_of*.nbc"))
    assert not (tmp_path / "ours").exists()


def test_without_a_place_to_write_it_works(tmp_path):
    """A file is where the folder would be, as good as a home that cannot be written to."""
    (tmp_path / "file").write_text("")
    run(tmp_path / "file")
    assert not list(Path(compiled.__file__).parent.rglob("*.nb[ic]"))


def test_another_edition_has_another_folder(monkeypatch, tmp_path):
    """numba would take a function's old code where only what it calls has changed."""
    assert compiled.edition() == compiled.edition()
    (tmp_path / "jit").mkdir()
    (tmp_path / "jit" / "compiled.py").write_text("other")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "jit" / "compiled.py"))
    first = compiled.edition()
    (tmp_path / "more.py").write_text("")
    assert compiled.edition() != first


def test_a_plan_finds_everything_compiled():
    """The smallest problems reach every function that a plan calls, with the types of real ones."""
    warm.compile_planning()
    warm.compile_addresses()
    functions = (
        anneal._anneal, replay.evaluate, replay.expand, replay.replay, greedy._first_fit, greedy._lowest_first,
        canonical._search, canonical._neighbours,
    )  # fmt: skip
    before = [len(function.signatures) for function in functions]
    assert min(before) == 1
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    options = {"loss": torch.sum, "machine": "h100-80gb", "time_limit": 1.0}
    for arena in (False, True):
        least = memplan.plan(model, None, (torch.randn(64, 16),), **options, arena=arena).minimum
        memplan.plan(model, least + 4096, (torch.randn(64, 16),), **options, arena=arena)
    assert [len(function.signatures) for function in functions] == before


def test_compiling_is_told_and_takes_nothing_from_the_time_limit(monkeypatch: pytest.MonkeyPatch):
    """Nor is it solving time: the plan says it apart."""
    told = []

    def slow(progress):
        progress(warm.STAGE, 0.0)
        return 1000.0

    monkeypatch.setattr("memplan.planner.verbs.session.compile_planning", slow)
    plan = memplan.plan(
        nn.Linear(4, 4), None, (torch.randn(2, 4),), loss=torch.sum, machine="h100-80gb", time_limit=5.0,
        progress=lambda stage, done: told.append(stage),
    )  # fmt: skip
    assert warm.STAGE in told
    assert plan.compile_seconds == 1000.0
    assert plan.solve_seconds < 1000.0
    assert "solvers compiled in" in plan.summary()


def test_the_planners_deadline_is_later_by_what_compiling_took(monkeypatch: pytest.MonkeyPatch):
    """Of a limit of 5 seconds nothing is gone though compiling took far longer."""
    from memplan.planner.verbs.session import Session

    session = Session(nn.Linear(4, 4), (torch.randn(2, 4),), loss=torch.sum, machine="h100-80gb", time_limit=500.0)
    monkeypatch.setattr("memplan.planner.verbs.session.compile_planning", lambda progress: 1000.0)
    session.began -= 1000.0
    session.begin()
    assert 0 < session.left() <= 500.0

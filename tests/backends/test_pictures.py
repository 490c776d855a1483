"""Pictures: the right shapes on the axes, quickly; what they look like is for people to see."""

import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from memplan.backends import pictures
from memplan.planner.machine import load_machine
from memplan.planner.plan import Plan, Recipe, Side, unlimited
from memplan.planner.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.referee import referee
from memplan.planner.schedule import Free, Run, Schedule

MIB = 1 << 20


def deep_plan(depth: int, seconds: float = 1e-3, budget: int | None = None) -> Plan:
    """A net without parameters: `depth` activations kept for the way back in one schedule, made twice in the other."""
    kinds = [Kind.INPUT, *[Kind.ACTIVATION] * depth, Kind.TEMPORARY, *[Kind.GRADIENT] * depth]
    forward = [Op(f"f{i}", "aten.f", f"f{i}", Phase.FORWARD, (0,), (i + 1,), seconds=seconds) for i in range(depth)]
    loss = Op("loss", "loss", "loss", Phase.LOSS, (depth,), (depth + 1,), repeatable=False)
    backward = [
        Op(f"b{i}", "aten.b", f"b{i}", Phase.BACKWARD, (i + 1, depth + 1), (depth + 2 + i,), seconds=seconds)
        for i in range(depth)
    ]
    grads = tuple(range(depth + 2, 2 * depth + 2))
    program = Program(
        "deep", tuple(Buffer(f"t{i}", MIB, kind) for i, kind in enumerate(kinds)), (*forward, loss, *backward), grads
    )
    runs = [Run(i, (i + 1,)) for i in range(depth)]
    back = [Run(depth + 1 + i, (depth + 2 + i,)) for i in range(depth)]
    lose = [Run(depth, (depth + 1,))]
    kept = [*runs, *lose, *(step for i in range(depth) for step in (back[i], Free(i + 1))), Free(depth + 1)]
    twice = [step for i in range(depth - 1) for step in (runs[i], Free(i + 1))] + [runs[-1], *lose, Free(depth)]
    twice += [step for i in range(depth) for step in (runs[i], back[i], Free(i + 1))] + [Free(depth + 1)]
    machine = load_machine("rtx4090")
    sides = [
        Side(program, schedule, referee(program, unlimited(machine), schedule))
        for schedule in (Schedule(program.digest, tuple(twice)), Schedule(program.digest, tuple(kept)))
    ]
    return Plan(program, machine, budget, *sides, "feasible", 0.0, 0.0, 4 * MIB, 0.1, 0.2, Recipe("{}", True, False, None))


def test_timeline_has_two_axes_of_one_scale_the_budget_and_a_legend():
    figure = pictures.timeline(deep_plan(5, budget=8 * MIB))

    planned, unplanned = figure.axes
    assert planned.get_ylim() == unplanned.get_ylim()
    assert planned.get_xlim() == unplanned.get_xlim() == (0, pytest.approx(15e-3))
    assert [text.get_text() for text in planned.texts] == ["forward", "backward", "budget 8 MiB"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "temporary",
        "recomputed",
        "activation",
        "gradient",
        "input",
    ]


def test_the_stack_is_as_high_as_the_referees_timeline():
    plan = deep_plan(6)

    figure = pictures.timeline(plan)

    heights = [float(np.max(collection.get_datalim(ax.transData).y1)) for ax in figure.axes for collection in ax.collections]
    drawn = max(heights)
    assert drawn == pytest.approx(plan.unplanned.peak)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_files_can_be_read_and_are_reproducible(tmp_path: Path, ending: str):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        pictures.save(pictures.timeline(deep_plan(4)), path)

    assert first.read_bytes() == second.read_bytes()
    if ending == "png":
        assert matplotlib.image.imread(first).shape[1] == 1500
    else:
        assert first.read_text().startswith("<svg")


def test_ten_thousand_instructions_are_drawn_quickly(tmp_path: Path):
    plan = deep_plan(3000)
    assert len(plan.schedule.instructions) > 10_000

    began = time.perf_counter()
    pictures.save(pictures.timeline(plan), tmp_path / "big.svg")

    assert time.perf_counter() - began < 10
    assert (tmp_path / "big.svg").stat().st_size < 2_000_000


def test_thinning_keeps_the_peak():
    starts, totals = np.arange(10_000.0), np.ones(10_000, np.int64)
    totals[4321] = 7

    kept = pictures.thinned(starts, 10_000.0, totals)

    assert len(kept) <= pictures.COLUMNS
    assert 4321 in kept
    assert list(kept) == sorted(kept)


def test_without_costs_time_is_counted_in_instructions():
    plan = deep_plan(3, seconds=0.0)

    figure = pictures.timeline(plan)

    assert figure.axes[1].get_xlabel() == "instruction"


def test_curve_marks_the_unplanned_step_and_the_floor():
    plans = [deep_plan(5, budget=20 * MIB), deep_plan(5, budget=9 * MIB)]

    ax = pictures.curve(plans).axes[0]

    floor, line, unplanned = ax.get_lines()
    assert list(floor.get_xdata()) == [4 * MIB, 4 * MIB]
    assert list(line.get_xdata()) == [plans[0].peak]
    assert list(unplanned.get_xdata()) == [plans[0].unplanned.peak]

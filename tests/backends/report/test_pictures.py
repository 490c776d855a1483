"""Pictures: the right shapes on the axes, quickly; what they look like is for people to see."""

import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from memplan.backends.report import pictures
from memplan.backends.report.queues import BAR, INTO, OUT, RUNS, SINGLE, boxes, lanes, shares
from memplan.backends.report.replay import RECOMPUTED, copies, held, lives
from memplan.planner.ir.machine import Link, Machine, Tier, load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Run, Schedule, Start, Wait

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


def copying_plan() -> Plan:
    """Three layers, of which the first two activations go to the host and back; 3 ms a copy out, 1 ms a copy back.

    Both directions stall the compute; the last layer is run twice, for nothing, beside a copy.
    """
    plan = deep_plan(3)
    machine = Machine(
        "two tiers",
        "cpu",
        (plan.machine.tiers[0], Tier("host", 4 * MIB, 1e9)),
        plan.machine.units,
        (Link("device", "host", MIB / 2e-3, 1e-3), Link("host", "device", MIB / 1e-3)),
    )
    steps = (
        Run(0, (1,)),  # ends at 1 ms
        Start(1, 0),
        Run(1, (2,)),  # 2
        Start(2, 0),
        Run(2, (3,)),  # 3
        Wait(1, 0),  # 4
        Free(1),
        Run(3, (4,)),  # the loss takes no time
        Run(6, (7,)),  # 5
        Free(3),
        Wait(2, 0),  # 7
        Free(2),
        Start(2, 1),
        Start(1, 1),
        Run(2, ()),  # 8
        Wait(2, 1),
        Free(2, 1),
        Run(5, (6,)),  # 9
        Free(2),
        Wait(1, 1),
        Free(1, 1),
        Run(4, (5,)),  # 10
        Free(1),
        Free(4),
    )
    schedule = Schedule(plan.program.digest, steps)
    return replace(plan, machine=machine, planned=Side(plan.program, schedule, referee(plan.program, machine, schedule)))


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


def test_copies_follow_one_another_on_their_link():
    """A copy begins when it is queued or when the link is free; the last one of each link ends when its wait does."""
    plan = copying_plan()

    found = copies(plan.program, plan.machine, plan.planned)

    assert [(copy.link, copy.buffer) for copy in found] == [(0, 1), (0, 2), (1, 2), (1, 1)]
    assert [copy.begin for copy in found] == pytest.approx([1e-3, 4e-3, 7e-3, 8e-3])
    assert [copy.end for copy in found] == pytest.approx([4e-3, 7e-3, 8e-3, 9e-3])
    assert plan.time == pytest.approx(10e-3)


def test_bytes_in_each_tier_are_the_referees():
    """A copy's target counts from its start to its freeing; the parameters and inputs are in the first tier only."""
    plan = copying_plan()
    report = plan.planned.report

    host = held(plan.program, plan.machine, plan.schedule, 1)

    assert list(host // MIB) == [0, 1, 1, *[2] * 14, *[1] * 4, 0, 0, 0]
    assert (max(host), plan.peak) == (report.peak[1], report.peak[0])
    assert tuple(held(plan.program, plan.machine, plan.schedule, 0)) == report.timeline
    assert [(life.buffer, life.lower, life.upper) for life in lives(plan.program, plan.machine, plan.schedule, 1)] == [
        (2, 3, 17),
        (1, 1, 21),
    ]


def test_each_queue_has_a_lane_and_each_tier_a_panel(tmp_path: Path):
    """On the time axis of the memory above; what the compute waits for is in the title."""
    plan = copying_plan()

    figure = pictures.timeline(plan)

    memory, _, queues, host = figure.axes
    assert [label.get_text() for label in queues.get_yticklabels()] == ["compute", "device to host", "host to device"]
    assert queues.get_title(loc="left") == "planned: 3 ms spent waiting for copies"
    assert host.get_title(loc="left") == "planned, in host: 2 MiB"
    assert host.get_xlabel() == "predicted time"
    assert queues.get_xlim() == host.get_xlim() == memory.get_xlim()
    for ending in ("svg", "png"):
        pictures.save(pictures.timeline(plan), tmp_path / f"copies.{ending}")
    text = (tmp_path / "copies.svg").read_text()
    for word in ("compute", "device to host", "host to device", "planned, in host: 2 MiB"):
        assert f">{word}<" in text
    assert matplotlib.image.imread(tmp_path / "copies.png").shape[1] == 1500


def test_lanes_have_the_runs_and_the_copies():
    """Repetitions lie over the runs; what takes no time is left out; between the runs the compute waits."""
    plan = copying_plan()

    found = lanes(plan.program, plan.machine, plan.planned)

    assert {name: [kind for kind, _ in lane] for name, lane in found.items()} == {
        "compute": [RUNS, RECOMPUTED],
        "device to host": [OUT],
        "host to device": [INTO],
    }
    (_, runs), (_, again) = found["compute"]
    assert runs[:, 0] == pytest.approx([0, 1e-3, 2e-3, 4e-3, 7e-3, 8e-3, 9e-3])
    assert again == pytest.approx(np.array([[7e-3, 8e-3]]))
    [(_, out)] = found["device to host"]
    assert out == pytest.approx(np.array([[1e-3, 4e-3], [4e-3, 7e-3]]))


def test_a_plan_without_copies_has_no_lanes():
    """Though its machine has links and a second tier."""
    plan = deep_plan(5)
    assert plan.machine.links

    assert lanes(plan.program, plan.machine, plan.planned) == {}
    figure = pictures.timeline(plan)
    assert len(figure.axes) == 2
    assert list(figure.get_size_inches()) == [10.0, 6.2]


def test_thousands_of_bars_are_drawn_by_their_share_of_each_column():
    """A bar of 0.75 in each unit of time; their area stays what it is, and so does an empty lane."""
    begins = np.arange(10_000.0)
    bars = np.stack([begins, begins + 0.75], axis=-1)

    [(_, corners), (_, none)] = boxes([(OUT, bars), (INTO, bars[:0])], 1, 10_000.0)

    assert len(corners) == SINGLE
    assert none == []
    assert sum(np.ptp(box[:, 0]) * np.ptp(box[:, 1]) for box in corners) == pytest.approx(7500 * BAR)
    assert {float(box[:, 1].min()) for box in corners} == {-1 - BAR / 2}
    assert list(shares(bars, np.array([0.0, 0.5, 1.0, 2.0, 4.0]))) == pytest.approx([1, 0.5, 0.75, 0.75])


def test_curve_marks_the_unplanned_step_and_the_floor():
    plans = [deep_plan(5, budget=20 * MIB), deep_plan(5, budget=9 * MIB)]

    ax = pictures.curve(plans).axes[0]

    floor, line, unplanned = ax.get_lines()
    assert list(floor.get_xdata()) == [4 * MIB, 4 * MIB]
    assert list(line.get_xdata()) == [plans[0].peak]
    assert list(unplanned.get_xdata()) == [plans[0].unplanned.peak]

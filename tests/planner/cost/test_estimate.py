"""Estimates of what was not measured, or only beside other work; and the choices that rest on them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.cost.estimate import OPTIMIZER_CALL, Estimate, Sample, Work, quantile, roofline, work_of
from memplan.planner.cost.keys import measurable
from memplan.planner.cost.table import Figures, Table, apply_costs
from memplan.planner.ir.machine import Machine, Tier, Unit
from memplan.planner.ir.program import Op, Phase, Program
from memplan.planner.ir.schedule import Run
from memplan.planner.pipeline.planner import Planner
from torch import nn

MACHINE = Machine(
    "toy", "cpu", (Tier("device", 1 << 40, 1e10),), (Unit("core", "device", {"default": 1e11}, launch=1e-6),)
)  # fmt: skip
MM = Work("aten.mm.default", "float32", 1e9, 0)
ADD = Work("aten.add.Tensor", "float32", 1e6, 10**8)


def op(work: Work) -> Op:
    """An op that does some work."""
    key = f'{{"op": "{work.target}", "args": [{{"t": "{work.dtype}", "s": [1], "st": [1]}}], "kwargs": {{}}}}'
    return Op("op", work.target, key, Phase.FORWARD, (), (), flops=work.flops, traffic=work.traffic)


def test_work_is_read_from_the_op() -> None:
    assert work_of(op(MM)) == MM
    assert work_of(Op("op", "loss", "loss", Phase.FORWARD, (), (), flops=2.0)) == Work("loss", "default", 2.0, 0)
    update = Op("op", "optimizer.adam", "update", Phase.FORWARD, (), ())
    assert roofline(update, MACHINE) == pytest.approx(1e-6 + OPTIMIZER_CALL)


def test_each_kind_is_corrected_by_its_own_median_and_others_by_that_of_all() -> None:
    samples = [Sample(MM, 2e-2, True)] * 4 + [Sample(MM, 9.0, True)] + [Sample(ADD, 3e-2, True)] * 4
    estimate = Estimate(samples, MACHINE)
    assert estimate.ops == 9
    assert estimate.seconds(op(MM)) == pytest.approx(2e-2)
    assert estimate.seconds(op(ADD)) == pytest.approx(3e-2)
    other = op(MM._replace(dtype="bfloat16"))
    assert roofline(other, MACHINE) * 2 <= estimate.seconds(other) <= roofline(other, MACHINE) * 3


def test_too_few_say_nothing() -> None:
    estimate = Estimate([Sample(MM, 2e-2, True)] * 7, MACHINE)
    assert estimate.ops == 0
    assert estimate.seconds(op(MM)) == roofline(op(MM), MACHINE)


def test_quiet_ops_count_alone_where_there_are_enough() -> None:
    """Where there are not, the lower of all do: what was disturbed only took longer."""
    loud = [Sample(MM, 0.1 * factor, False) for factor in (1, 2, 3, 4, 50, 60, 70, 80)]
    assert Estimate([Sample(MM, 2e-2, True)] * 8 + loud, MACHINE).seconds(op(MM)) == pytest.approx(2e-2)
    assert Estimate([Sample(MM, 2e-2, True)] * 2 + loud, MACHINE).seconds(op(MM)) == pytest.approx(0.1)


def test_quantiles_go_by_weight() -> None:
    assert quantile([(1.0, 1.0), (2.0, 1.0), (9.0, 1.0)], 0.5) == 2.0
    assert quantile([(1.0, 1.0), (2.0, 1.0), (9.0, 8.0)], 0.5) == 9.0
    assert quantile([(1.0, 1.0), (2.0, 1.0), (9.0, 2.0)], 0.25) == 1.0


class Block(nn.Module):
    """Attention and two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.rest = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.rest(x)


@pytest.fixture(scope="module")
def program() -> Program:
    """A step of a small transformer."""
    model = nn.Sequential(*(Block(64) for _ in range(3)), nn.Linear(64, 256))
    return capture(model, (torch.randn(4, 128, 64),), {}, train=True, loss=lambda out: out.square().mean()).program


@pytest.fixture(scope="module")
def true(program: Program) -> dict[str, float]:
    """What each op takes: its kind's share of its roofline, and a little of its own."""
    draw, kinds, seconds = random.Random(0), {}, {}
    for each in program.ops:
        if measurable(each.key) and each.key not in seconds:
            share = kinds.setdefault(each.target, draw.choice([1.1, 1.5, 2.0, 4.0]))
            seconds[each.key] = roofline(each, MACHINE) * share * draw.lognormvariate(0, 0.25)
    return seconds


def filled(folder: Path, program: Program, true: dict[str, float], factor: Callable[[], float]) -> Table:
    """A table in which some ops were timed beside other work, so many times too long."""
    table, work = Table("a device", folder), {each.key: work_of(each) for each in program.ops}
    for key, seconds in true.items():
        longer = factor()
        table.update({key: Figures(seconds * longer, 0, longer > 1, None, work[key])})
    return table


def chosen(program: Program, budget: int) -> tuple[list[int], float]:
    """What a plan runs, and how long it thinks that takes."""
    side = Planner(program, MACHINE, effort=2000).solve(budget).found
    return [step.op for step in side.schedule.instructions if isinstance(step, Run)], side.time


@pytest.mark.parametrize(("part", "low", "high"), [(0.1, 20, 500), (0.33, 5, 500), (0.5, 1.5, 3)])
def test_no_choice_hangs_on_times_of_a_busy_hour(program, true, part, low, high, tmp_path):
    """A plan made with a spoilt table is nearly as fast as one made with a clean one, and nearly says so."""
    draw = random.Random(7)
    clean = apply_costs(program, MACHINE, filled(tmp_path / "clean", program, true, lambda: 1.0))
    spoilt = filled(tmp_path / "spoilt", program, true, lambda: draw.uniform(low, high) if draw.random() < part else 1.0)
    planner = Planner(clean, MACHINE, effort=2000)
    budget = planner.floor.peak + (planner.kept.peak - planner.floor.peak) // 4
    best, _ = chosen(clean, budget)
    runs, predicted = chosen(apply_costs(program, MACHINE, spoilt), budget)

    def seconds(ops: list[int]) -> float:
        return sum(clean.ops[each].seconds for each in ops)

    assert len(best) > len(program.ops)
    assert seconds(runs) <= 1.03 * seconds(best)
    assert predicted == pytest.approx(seconds(runs), rel=0.25)

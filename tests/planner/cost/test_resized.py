"""What an op costs at sizes at which it was not measured."""

from pathlib import Path

import pytest
from memplan.planner.cost.resized import Resized, between
from memplan.planner.cost.table import Figures, Table, apply_costs, coverage
from memplan.planner.ir.machine import named_machine
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program

MACHINE = named_machine("h100-80gb")


def program(size: int) -> Program:
    """One op that reads and writes so many gigabytes."""
    key = f'{{"op":"aten.exp.default","args":[{{"t":"float32","s":[{size}],"st":[1]}}],"kwargs":{{}}}}'
    op = Op("exp", "aten.exp.default", key, Phase.FORWARD, (0,), (1,), flops=size * 1e9, traffic=size * 1_000_000_000)
    buffers = (Buffer("x", size * 1_000_000_000, Kind.INPUT), Buffer("y", size * 1_000_000_000, Kind.OUTPUT))
    return Program("exp", buffers, (op,), (1,), "cuda")


def table(tmp_path: Path, **figures: Figures) -> Table:
    """A table with figures by size, as `at_4`."""
    made = Table("somewhere", tmp_path)
    made.update({program(int(name[3:])).ops[0].key: found for name, found in figures.items()})
    return made


def test_times_are_scaled_by_the_roofline(tmp_path: Path):
    """They are estimates: nothing of them was measured."""
    known = table(tmp_path, at_4=Figures(1e-3, 100))
    costs = Resized(apply_costs(program(4), MACHINE, known), MACHINE, known)
    found = costs.apply(program(8))

    assert found.ops[0].seconds == pytest.approx(2e-3)
    assert found.ops[0].workspace == 200
    assert coverage(found, known).measured == 0
    assert coverage(costs.apply(program(4)), known).measured == 1


def test_scratch_space_does_not_shrink(tmp_path: Path):
    """Who knows what of it is a block's."""
    known = table(tmp_path, at_4=Figures(1e-3, 100))
    costs = Resized(apply_costs(program(4), MACHINE, known), MACHINE, known)

    assert costs.apply(program(2)).ops[0].workspace == 100


def test_what_was_measured_counts_as_it_was(tmp_path: Path):
    """At other sizes too."""
    known = table(tmp_path, at_4=Figures(1e-3, 100), at_8=Figures(5e-3, 70))
    costs = Resized(apply_costs(program(4), MACHINE, known), MACHINE, known)
    found = costs.apply(program(8)).ops[0]

    assert (found.seconds, found.workspace) == (5e-3, 70)


def test_between_two_sizes_the_share_of_the_roofline_is_interpolated(tmp_path: Path):
    """One op that gets worse with its size."""
    known = table(tmp_path, at_4=Figures(1e-3, 100), at_16=Figures(8e-3, 800))
    costs = Resized(apply_costs(program(4), MACHINE, known), MACHINE, known)
    costs.add(apply_costs(program(16), MACHINE, known))

    assert costs.apply(program(8)).ops[0].seconds == pytest.approx(2e-3 * 1.5)
    assert costs.apply(program(64)).ops[0].seconds == pytest.approx(32e-3)
    assert costs.apply(program(8)).ops[0].workspace == 200


def test_nothing_measured_is_as_without_a_table():
    """Rooflines, and workspaces as the kernels' sources suggest."""
    costs = Resized(apply_costs(program(4), MACHINE), MACHINE, None)

    assert costs.apply(program(8)) == apply_costs(program(8), MACHINE)


@pytest.mark.parametrize(("at", "value"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (9, 5)])
def test_outside_of_the_points_the_nearest_counts(at: float, value: float):
    """On the line between two of them inside."""
    assert between([(1, 1), (3, 3), (5, 5)], at) == value

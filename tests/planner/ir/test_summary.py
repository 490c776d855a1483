"""What is said of a plan."""

import msgspec
import pytest
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Run, Schedule
from memplan.planner.ir.units import show_bytes, show_change, show_count, show_seconds, show_share


def made(budget: int | None, gap: float, again: bool = True, infer: bool = False) -> Plan:
    """A weight, an activation made twice, its gradient; or the forward pass alone."""
    kinds = [("w", Kind.PARAMETER), ("a", Kind.ACTIVATION), ("l", Kind.TEMPORARY), ("w.grad", Kind.GRADIENT)]
    ops = (
        Op("fwd", "aten.mm.default", "fwd", Phase.FORWARD, (0,), (1,), seconds=1e-3, where="net"),
        Op("loss", "loss", "loss", Phase.LOSS, (1,), (2,), repeatable=False),
        Op("bwd", "aten.mm.default", "bwd", Phase.BACKWARD, (0, 1, 2), (3,), seconds=2e-3),
    )
    if infer:
        program = Program("net", tuple(Buffer(name, 1 << 20, kind) for name, kind in kinds[:2]), ops[:1], (1,))
        plain = twice = Schedule(program.digest, (Run(0, (1,)),))
    else:
        program = Program("net", tuple(Buffer(name, 1 << 20, kind) for name, kind in kinds), ops, (3,))
        plain = Schedule(program.digest, (Run(0, (1,)), Run(1, (2,)), Run(2, (3,)), Free(1), Free(2)))
        steps = (Run(0, (1,)), Run(1, (2,)), Free(1), Run(0, (1,)), Run(2, (3,)), Free(1), Free(2))
        twice = Schedule(program.digest, steps)
    machine = load_machine("h100-80gb")
    schedules = (twice if again else plain, plain)
    sides = [Side(program, schedule, referee(program, unlimited(machine), schedule)) for schedule in schedules]
    status = "feasible" if gap else "optimal"
    return Plan(program, machine, budget, *sides, status, gap, 3e-3, 4 << 20, 0.1, 0.2, Recipe("{}", not infer, False, None))


PLANS = {
    "tight": made(5 << 20, 0.25),
    "almost": made(5 << 20, 0.0001),
    "free": made(None, 0.0, again=False),
    "inference": made(None, 0.0, infer=True),
}


def test_summaries_read_well(golden):
    """Nothing is `none`, `0 moved` or `-0.0%`; what is one is singular."""
    mapped = made(1 << 20, 0.1, infer=True)
    mapped = Plan(**{**vars(mapped), "recipe": msgspec.structs.replace(mapped.recipe, mapped=True)})
    plans = PLANS | {"mapped": mapped}
    assert golden == "\n\n".join(f"{name}\n{plan}\n{plan!r}" for name, plan in plans.items()) + "\n"


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_repr_is_one_line(plan):
    """In a notebook or a debugger, a plan says what it is; so do its sides. It once was megabytes of instructions."""
    for text in (repr(plan), repr(plan.planned)):
        assert len(text) < 160
        assert "\n" not in text
    assert str(plan) == plan.summary()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1234.5, "1234 s"),
        (0.9996, "1 s"),
        (0.99949, "999 ms"),
        (1.5e-7, "150 ns"),
        (2e-6, "2 µs"),
        (-0.5, "-500 ms"),
    ],
)
def test_seconds_have_no_exponent(seconds, text):
    """Nor a thousand of a unit."""
    assert show_seconds(seconds) == text


def test_figures_in_words():
    """What is almost nothing is not nothing."""
    assert [show_share(share) for share in (0.0, 1e-5, 0.0004, 0.0005, 0.25)] == [
        "0%",
        *["less than 0.1%"] * 2,
        "0.1%",
        "25.0%",
    ]
    assert [show_change(figure, 100.0) for figure in (50, 99.99, 100, 109, 250)] == [
        "50.0% less", "the same", "the same", "9.0% more", "2.5 times as much",
    ]  # fmt: skip
    assert [show_count(count, "op") for count in (0, 1, 2)] == ["0 ops", "1 op", "2 ops"]
    assert show_bytes(1.5 * 2**30) == "1.5 GiB"

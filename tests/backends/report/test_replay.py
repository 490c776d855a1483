"""What lives when, against the referee's own timeline."""

import random

import pytest
from memplan.backends.report.replay import RECOMPUTED, WORKSPACE, largest, layers, lives, phases
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Run, Schedule

KIB = 1024


def chain(depth: int) -> Program:
    """A deep net's step: `depth` layers, each with a weight, an activation and a dropped temporary; then back."""
    buffers: list[Buffer] = []
    ops: list[Op] = []

    def buffer(name: str, size: int, kind: Kind) -> int:
        buffers.append(Buffer(name, size * KIB, kind))
        return len(buffers) - 1

    def op(name: str, phase: Phase, reads: list[int], writes: list[int], **facts) -> None:
        defaults = {"seconds": 1e-3, "where": f"layers.{name[1:]}"}
        ops.append(Op(name, f"aten.{name[0]}.default", name, phase, tuple(reads), tuple(writes), **(defaults | facts)))

    weights = [buffer(f"layers.{i}.weight", 64, Kind.PARAMETER) for i in range(depth)]
    acts = [buffer("x", 32, Kind.INPUT)]
    for i in range(depth):
        acts.append(buffer(f"a{i}", 256, Kind.ACTIVATION))
        op(
            f"f{i}",
            Phase.FORWARD,
            [acts[i], weights[i]],
            [acts[-1], buffer(f"t{i}", 64, Kind.TEMPORARY)],
            workspace=8 * KIB,
        )
    tangent = buffer("tangent", 256, Kind.TEMPORARY)
    op("loss", Phase.LOSS, [acts[-1]], [tangent], repeatable=False, seconds=0.0)
    grads = []
    for i in reversed(range(depth)):
        grads.append(buffer(f"layers.{i}.weight.grad", 64, Kind.GRADIENT))
        before, tangent = tangent, buffer(f"d{i}", 256, Kind.TEMPORARY)
        op(
            f"b{i}",
            Phase.BACKWARD,
            [before, acts[i], weights[i]],
            [tangent, grads[-1]],
            reuse=((tangent, before),),
            seconds=2e-3,
        )
    program = Program("chain", tuple(buffers), tuple(ops), tuple(grads))
    program.verify()
    return program


def scheduled(program: Program, stride: int = 1) -> Schedule:
    """The base order, in which only every `stride`-th activation survives the forward pass; the rest is made again."""
    depth = program.boundary
    saved = {op for op in range(depth) if (op + 1) % stride == 0}
    acts = [program.ops[op].writes[0] for op in range(depth)]
    steps: list = []
    for op in range(depth):
        steps.append(Run(op, (acts[op],)))
        if op and op - 1 not in saved:
            steps.append(Free(acts[op - 1]))
    steps += [Run(depth, program.ops[depth].writes), Free(acts[-1])]
    held = {acts[op] for op in saved} - {acts[-1]}
    for at in range(depth + 1, len(program.ops)):
        op = program.ops[at]
        needed = op.reads[1]
        if needed in acts and needed not in held:
            first = acts.index(needed)
            while first and acts[first - 1] not in held:
                first -= 1
            steps += [Run(again, (acts[again],)) for again in range(first, acts.index(needed) + 1)]
            held |= set(acts[first : acts.index(needed) + 1])
        steps.append(Run(at, op.writes, op.reuse))
        if needed in acts:
            steps.append(Free(needed))
            held.discard(needed)
    steps.append(Free(program.ops[-1].writes[0]))
    return Schedule(program.digest, tuple(steps))


def tiny_plan(depth: int = 6, stride: int = 3, budget: int | None = None) -> Plan:
    """A plan of the chain that the referee accepts."""
    program, machine = chain(depth), load_machine("h100-80gb")
    sides = [
        Side(program, schedule, referee(program, unlimited(machine), schedule))
        for schedule in (scheduled(program, stride), scheduled(program))
    ]
    return Plan(
        program,
        machine,
        budget,
        *sides,
        "feasible",
        0.02,
        0.98 * sides[0].time,
        sides[0].peak,
        0.1,
        0.2,
        Recipe("{}", True, False, None),
    )


@pytest.mark.parametrize("stride", [1, 2, 3, 6])
def test_lives_add_up_to_the_referees_timeline(stride: int):
    plan = tiny_plan(stride=stride)

    held = layers(plan.program, plan.machine, plan.schedule)

    assert tuple(sum(held.values())) == plan.planned.report.timeline


def test_copies_count_where_they_land():
    program, machine = chain(2), load_machine("h100-80gb")
    from memplan.planner.ir.schedule import Start, Wait

    plain = scheduled(program).instructions
    act = program.ops[0].writes[0]
    away = (Start(act, 0), Wait(act, 0), Free(act))
    back = (Start(act, 1), Wait(act, 1), Free(act, 1))
    loss = next(at for at, step in enumerate(plain) if isinstance(step, Run) and step.op == program.boundary)
    schedule = Schedule(program.digest, (*plain[:loss], *away, *plain[loss : loss + 2], *back, *plain[loss + 2 :]))
    report = referee(program, machine, schedule)

    held = layers(program, machine, schedule)

    assert tuple(sum(held.values())) == report.timeline


def test_layers_tell_recomputed_tensors_and_workspaces_apart():
    plan = tiny_plan(depth=6, stride=3)

    held = layers(plan.program, plan.machine, plan.schedule)
    plain = layers(plan.program, plan.machine, plan.unplanned.schedule)

    assert held[RECOMPUTED].max() == 2 * 256 * KIB + 64 * KIB  # two of three activations, and one dropped temporary
    assert held[WORKSPACE].max() == 8 * KIB
    assert RECOMPUTED not in plain
    assert Kind.STATE not in held


def test_phases_are_told_by_first_runs():
    plan = tiny_plan()

    reached = phases(plan.program, plan.schedule)

    assert [phase for phase, _ in reached] == [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD]


def test_largest_are_live_and_sorted():
    plan = tiny_plan()
    at = plan.planned.report.timeline.index(plan.peak)

    found = largest(plan.program, plan.machine, plan.schedule, at, 5)

    assert len(found) == 5
    assert all(life.lower <= at < life.upper for life in found)
    assert [life.bytes for life in found] == sorted((life.bytes for life in found), reverse=True)


def test_every_life_is_a_range_within_the_step():
    plan = tiny_plan(depth=random.Random(0).randint(3, 9))

    for life in lives(plan.program, plan.machine, plan.schedule):
        assert 0 <= life.lower < life.upper <= len(plan.schedule.instructions)

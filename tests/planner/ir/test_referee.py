"""The referee: one broken rule at a time, hand-counted peaks and times, and its agreement with the solvers' simulator."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.passes.liveness import Liveness
from memplan.passes.problem import flatten
from memplan.planner.ir.errors import InvalidSchedule
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import RULES, check_places, referee
from memplan.planner.ir.schedule import Free, Placement, Run, Schedule, Start, Wait
from memplan.solvers.remat.problem import BEGIN, EAGER, HOLD, SINCE, events_of, profile, score
from strategies import ROOMY, make_program, planned_orders

W, A, B, M, T, GB, GW = range(7)  # the buffers of `step`
F1, F2, STAT, LOSS, B2, B1, UPDATE = range(7)  # its ops
TWO = Machine(
    "two tiers",
    "cpu",
    (Tier("device", 1000, 1e9, alignment=10), Tier("host", 250, 1e9)),
    (Unit("core", "device", {"default": 1e9}), Unit("near", "host", {"default": 1e9})),
    (Link("device", "host", 100.0, 0.5), Link("host", "device", 50.0)),
)


def step() -> Program:
    """A two-layer step that shows every property an op can have; sizes in bytes, times in seconds."""
    buffers = (
        Buffer("w", 10, Kind.PARAMETER),
        Buffer("a", 100, Kind.ACTIVATION),
        Buffer("b", 100, Kind.ACTIVATION),
        Buffer("m", 20, Kind.CONSTANT),  # resident: a running mean
        Buffer("tangent", 100, Kind.TEMPORARY),
        Buffer("gb", 100, Kind.TEMPORARY),
        Buffer("gw", 10, Kind.GRADIENT),
    )
    forward, backward = Phase.FORWARD, Phase.BACKWARD
    ops = (
        Op("f1", "f1", "f1", forward, (W,), (A,), seconds=1.0, workspace=7),
        Op("f2", "f2", "f2", forward, (A, M), (B,), reuse=((B, A),), seconds=2.0),
        Op("stat", "stat", "stat", forward, (A,), (), mutates=(M,), repeatable=False, seconds=0.25),
        Op("loss", "loss", "loss", Phase.LOSS, (B,), (T,), repeatable=False, seconds=0.5),
        Op("b2", "b2", "b2", backward, (T, B), (GB,), reuse=((GB, T),), seconds=4.0),
        Op("b1", "b1", "b1", backward, (GB, A), (GW,), seconds=8.0),
        Op("update", "update", "update", Phase.UPDATE, (GW,), (), mutates=(W,), repeatable=False, seconds=16.0),
    )
    program = Program("step", buffers, ops, (GW,))
    program.verify()
    return program


PLAIN = (
    Run(F1, (A,)),  # 30 + 100 + 7
    Run(F2, (B,)),  # 30 + 200
    Run(STAT, ()),
    Run(LOSS, (T,)),  # 30 + 300
    Run(B2, (GB,), ((GB, T),)),  # 30 + 300: in place
    Free(B),
    Run(B1, (GW,)),  # 30 + 200 + 10
    Free(A),
    Free(GB),
    Run(UPDATE, ()),
)


def judge(instructions: tuple, budget: int | None = None, machine: Machine = TWO, places: tuple = (), program=None, homes=()):
    """The referee's report on instructions for `step`."""
    program = program or step()
    return referee(program, machine, Schedule(program.digest, tuple(instructions), places, homes=homes), budget)


def test_the_plain_schedule_is_measured_as_by_hand():
    """Peak, time, timeline and starts of a schedule of ten instructions."""
    report = judge(PLAIN)

    assert report.peak == (330, 0)
    assert report.time == 31.75
    assert report.timeline == (137, 230, 230, 330, 330, 330, 240, 240, 140, 40)
    assert report.starts == (0.0, 1.0, 3.0, 3.25, 3.75, 7.75, 7.75, 15.75, 15.75, 15.75)
    assert (report.repeated, report.recompute, report.moved) == (0, 0.0, (0, 0))


def test_a_repetition_is_counted_and_lowers_the_peak():
    """Dropping `a` after the forward pass and making it again costs one second and saves its bytes at the loss and at b2."""
    again = (*PLAIN[:3], Free(A), *PLAIN[3:6], Run(F1, (A,)), *PLAIN[6:])
    report = judge(again)

    assert report.peak == (240, 0)  # at b1; the loss takes 230
    assert report.time == 32.75
    assert (report.repeated, report.recompute) == (1, 1.0)


def test_what_is_not_kept_is_dropped_when_the_op_ends():
    """An unneeded repetition takes its bytes while it runs and none after."""
    report = judge((*PLAIN[:4], Free(A), Run(F1, ()), Run(F1, (A,)), *PLAIN[4:]))

    assert report.timeline[4:7] == (330, 337, 337)
    assert report.repeated == 2


def test_the_budget_may_be_met_exactly():
    """A schedule whose peak is the budget is accepted; one byte less is not."""
    assert judge(PLAIN, 330).peak[0] == 330
    with pytest.raises(InvalidSchedule, match="330 bytes in device, 329 allowed") as caught:
        judge(PLAIN, 329)
    assert (caught.value.rule, caught.value.instruction) == ("capacity", 3)


OUT = (Start(A, 0), Wait(A, 0), Free(A))  # device -> host
BACK = (Start(A, 1), Wait(A, 1), Free(A, 1))
OFFLOAD = (*PLAIN[:3], *OUT, *PLAIN[3:6], *BACK, *PLAIN[6:])


def test_copies_take_time_on_their_link_and_bytes_at_both_ends():
    """Out and back: 0.5 + 1 s at 100 B/s, then 2 s at 50 B/s, both waited for at once."""
    report = judge(OFFLOAD)

    assert report.time == 31.75 + 1.5 + 2.0
    assert report.peak == (240, 100)
    assert report.moved == (100, 100)


@pytest.mark.parametrize(("out", "back", "ends"), [(1.0, 1.0, 5.45), (0.8, 0.7, 5.95), (0.5, 0.5, 6.45), (0.1, 0.3, 6.45)])
def test_copies_both_ways_at_once_are_slower(out: float, back: float, ends: float):
    """One goes out until 5.25; one that alone takes 1.2 s comes back from 4.25 on, for a second beside it at a lower rate."""
    links = tuple(msgspec.structs.replace(link, duplex=share) for link, share in zip(TWO.links, (out, back), strict=True))
    machine = msgspec.structs.replace(TWO, links=links)

    assert machine.opposite == (1, 0)
    assert machine.arrival(1, 60, 4.25, [5.25, 0.0]) == pytest.approx(ends)
    assert machine.arrival(1, 60, 6.0, [5.25, 0.0]) == pytest.approx(7.2)


def test_a_short_copy_ends_beside_the_other():
    """At half its rate: 0.2 s take 0.4."""
    links = tuple(msgspec.structs.replace(link, duplex=0.75) for link in TWO.links)

    assert msgspec.structs.replace(TWO, links=links).arrival(1, 10, 4.25, [5.25, 0.0]) == pytest.approx(4.65)


def test_a_copy_runs_beside_the_compute_and_links_are_queues():
    """Two copies on one link follow each other; a wait after they have arrived costs nothing."""
    steps = (
        *PLAIN[:3],
        Start(A, 0),  # from 3.25 to 4.75
        Start(W, 0),  # from 4.75 to 5.35
        Run(LOSS, (T,)),  # until 3.75
        Wait(W, 0),  # 5.35
        Wait(A, 0),
        Free(W, 1),
        Free(A, 1),
        *PLAIN[4:],
    )
    report = judge(steps)

    assert report.starts[7] == pytest.approx(5.35)
    assert report.time == pytest.approx(31.75 + 5.35 - 3.75)
    assert report.peak[1] == 110


def test_a_unit_reads_its_own_tier():
    """The unit near the host runs what lies in the host's memory, and its result stays there."""
    steps = (Run(F1, (A,)), Start(A, 0), Start(M, 0), Wait(A, 0), Wait(M, 0), Run(F2, (B,), unit=1))
    back = (Start(B, 1), Wait(B, 1), Free(B, 1), Free(A, 1), Free(M, 1))
    report = judge((*steps, *back, *PLAIN[2:]))

    assert report.peak == (330, 220)
    with pytest.raises(InvalidSchedule, match="'read'"):
        judge((Run(F1, (A,)), Run(F2, (B,), unit=1)))


def swapped(steps: tuple, at: int, other: int) -> tuple:
    """The steps with two exchanged."""
    row = list(steps)
    row[at], row[other] = row[other], row[at]
    return tuple(row)


BROKEN = {
    "unknown op": ("range", (Run(99, ()),)),
    "negative op": ("range", (Run(-1, ()),)),
    "unknown unit": ("range", (Run(F1, (A,), unit=2),)),
    "free of an unknown buffer": ("range", (Free(99),)),
    "free in an unknown tier": ("range", (Free(A, 2),)),
    "copy over an unknown link": ("range", (Start(A, 2),)),
    "read before it is made": ("read", PLAIN[1:]),
    "read after it is freed": ("read", (*PLAIN[:1], Free(A), *PLAIN[1:])),
    "read before its copy has arrived": ("read", (*OFFLOAD[:10], OFFLOAD[12], OFFLOAD[10], OFFLOAD[11], *OFFLOAD[13:])),
    "read of what was overwritten": ("read", (Run(F1, (A,)), Run(F2, (B,), ((B, A),)), Run(STAT, ()))),
    "changes what is being copied out": ("read", (*PLAIN[:2], Start(M, 0), Run(STAT, ()))),
    "changes what lies in another tier": ("read", (*PLAIN[:2], Start(A, 0), Wait(A, 0), Run(STAT, (), unit=1))),
    "changes what has not arrived": ("read", (*PLAIN[:2], Start(A, 0), Start(M, 0), Wait(A, 0), Run(STAT, (), unit=1))),
    "made while it is live": ("fresh", (Run(F1, (A,)), Run(F1, (A,)))),
    "copied to where it is": ("fresh", (Run(F1, (A,)), Start(A, 0), Wait(A, 0), Start(A, 0))),
    "copied there twice at once": ("fresh", (Run(F1, (A,)), Start(A, 0), Start(A, 0))),
    "keeps what it does not write": ("written", (Run(F1, (B,)),)),
    "keeps a buffer twice": ("written", (Run(F1, (A, A)),)),
    "repeats what happens once": ("once", (*PLAIN[:3], Run(STAT, ()))),
    "reads what has been changed": ("stale", (PLAIN[0], PLAIN[2], PLAIN[1])),
    "makes again from what has been changed": ("stale", (*PLAIN[:3], Run(F2, ()))),
    "takes over what it may not": ("reuse", (Run(F1, (A,), ((A, W),)),)),
    "takes over what is gone": ("reuse", (*PLAIN[:4], Run(B2, (GB,), ((GB, T), (GB, T))))),
    "overwrites what is being copied out": ("reuse", (Run(F1, (A,)), Start(A, 0), Run(F2, (B,), ((B, A),)))),
    "writes in place and drops it": ("reuse", (*PLAIN[:4], Run(B2, (), ((GB, T),)))),
    "frees what is not live": ("free", (Free(A),)),
    "frees what the caller owns": ("free", (Free(W),)),
    "frees twice": ("free", (*PLAIN[:6], Free(B))),
    "frees the source of a copy in flight": ("free", (Run(F1, (A,)), Start(A, 0), Free(A))),
    "frees the target of a copy in flight": ("free", (Run(F1, (A,)), Start(A, 0), Free(A, 1))),
    "loss before the forward pass is done": ("order", (*PLAIN[:2], PLAIN[3])),
    "copies what is not there": ("copy", (Start(A, 0),)),
    "copies on what has not arrived": ("copy", (Run(F1, (A,)), Start(A, 0), Start(A, 1))),
    "waits for nothing": ("copy", (Run(F1, (A,)), Wait(A, 0))),
    "waits twice": ("copy", (Run(F1, (A,)), Start(A, 0), Wait(A, 0), Wait(A, 0))),
    "never waits": ("copy", (*PLAIN, Start(W, 0))),
    "leaves an op out": ("complete", PLAIN[:9]),
    "frees an output": ("free", (*PLAIN, Free(GW))),
    "leaves a buffer behind": ("leak", (*PLAIN[:5], *PLAIN[6:])),
    "leaves a copy behind": ("leak", (*PLAIN, Start(W, 0), Wait(W, 0))),
    "fills the host while in flight": (
        "capacity",
        (
            Run(F1, (A,)),
            Run(F2, (B,)),
            Run(STAT, ()),
            Start(A, 0),
            Start(B, 0),
            Start(M, 0),
            Start(W, 0),
            Run(LOSS, (T,)),
            Start(T, 0),
        ),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named(case):
    """Each of these schedules breaks one rule, and the verdict names it and the instruction."""
    rule, steps = BROKEN[case]

    with pytest.raises(InvalidSchedule) as caught:
        judge(steps)

    assert caught.value.rule == rule
    assert caught.value.rule in RULES
    whole = rule in ("complete", "outputs", "leak") or case == "never waits"
    assert (caught.value.instruction is None) == whole


def test_a_schedule_of_another_program_is_refused():
    """Rule `bound`: the digest must be this program's."""
    with pytest.raises(InvalidSchedule, match="'bound'"):
        referee(step(), TWO, Schedule("0" * 64, PLAIN))


PLACES = {
    "unaligned": (Placement(A, 0, 5, 0, 3),),
    "outside": (Placement(A, 0, 910, 0, 3),),
    "negative": (Placement(A, 0, -10, 0, 3),),
    "shared": (Placement(A, 0, 0, 0, 3), Placement(B, 0, 90, 2, 4)),
}


@pytest.mark.parametrize("case", PLACES)
def test_addresses_that_cannot_be_are_refused(case):
    """Rule `place`: aligned, inside the tier, and shared by nothing that lives at the same time."""
    with pytest.raises(InvalidSchedule, match="'place'"):
        judge(PLAIN, places=PLACES[case])


def test_addresses_may_be_shared_by_buffers_that_live_one_after_the_other():
    """Lives are half-open: one may end where the next begins; tiers have addresses of their own."""
    places = (Placement(A, 0, 0, 0, 3), Placement(B, 0, 50, 3, 4), Placement(T, 1, 0, 0, 9))
    check_places(TWO, Schedule("", PLAIN, places), [buffer.bytes for buffer in step().buffers])
    with pytest.raises(InvalidSchedule, match="'placed'"):
        judge(PLAIN, places=places)  # for others have no address
    with pytest.raises(InvalidSchedule, match="'range'"):
        judge(PLAIN, places=(Placement(A, 7, 0, 0, 3),))


def careless() -> Program:
    """`step` with an update that reads nothing of the step."""
    program = step()
    update = msgspec.structs.replace(program.ops[UPDATE], reads=())
    return msgspec.structs.replace(program, ops=(*program.ops[:UPDATE], update))


def test_the_update_waits_for_every_gradient():
    """Rule `order`: though the update reads nothing, it may not run before the backward pass is done."""
    with pytest.raises(InvalidSchedule, match="'order'") as caught:
        judge((*PLAIN[:4], PLAIN[9]), program=careless())
    assert caught.value.instruction == 4


def test_an_output_that_is_not_kept_is_missed():
    """Rule `outputs`: the op that makes a gradient ran, but did not keep it."""
    with pytest.raises(InvalidSchedule, match="'outputs'"):
        judge((*PLAIN[:6], Run(B1, ()), *PLAIN[7:]), program=careless())


def test_every_rule_is_broken_by_some_test():
    """No rule of the table is dead."""
    assert set(RULES) == {rule for rule, _ in BROKEN.values()} | {
        "bound", "place", "placed", "outputs", "lent", "random", "home"
    }  # fmt: skip


FETCH, RETURN = (Start(W, 1), Wait(W, 1)), (Start(W, 0), Wait(W, 0))
AWAY = (*FETCH, PLAIN[0], Free(W), *PLAIN[1:-1], *FETCH, PLAIN[-1], *RETURN, Free(W))  # the parameter's home is the host


def test_a_home_elsewhere_is_measured_as_by_hand():
    """The parameter takes bytes on the device only around its reader and its update; its new contents go home."""
    report = judge(AWAY, homes=((W, 1),))

    assert report.peak == (320, 10)  # at the loss: without the parameter
    assert report.time == 31.75 + 2 * 10 / 50 + 0.5 + 10 / 100
    assert report.moved == (10, 20)
    assert report.timeline[-1] == 40


@pytest.mark.parametrize(
    ("rule", "instructions", "homes"),
    [
        ("read", AWAY[2:], ((W, 1),)),  # never fetched
        ("home", (*AWAY[:-5], AWAY[-4], *AWAY[-3:]), ((W, 1),)),  # updated while it is fetched
        ("home", (*AWAY[:-6], *AWAY[-4:]), ((W, 1),)),  # updated where it is not
        ("home", (*AWAY[:-3], Free(W)), ((W, 1),)),  # the update is thrown away
        ("home", AWAY[:-3], ((W, 1),)),  # the update stays on the device
        ("fresh", (*AWAY[:-3], Start(W, 1)), ((W, 1),)),  # the old contents come over the new
        ("leak", AWAY[:-1], ((W, 1),)),  # it stays on the device as well
        ("copy", AWAY[:-2], ((W, 1),)),  # the way home is not waited for
        ("home", (*AWAY[:2], Free(W, 1), *AWAY[2:]), ((W, 1),)),  # the home is given up
        ("fresh", (*AWAY[:2], *RETURN, *AWAY[2:]), ((W, 1),)),  # sent home though nothing has changed
        ("home", AWAY, ((W, 1), (W, 1))),
        ("range", AWAY, ((W, 2),)),
        ("range", AWAY, ((A, 1),)),
        ("range", AWAY, ((W, 0),)),
    ],
)  # fmt: skip
def test_homes_are_kept(rule, instructions, homes):
    """Rule `home`, and others where a resident buffer is at home elsewhere."""
    with pytest.raises(InvalidSchedule) as caught:
        judge(instructions, homes=homes)
    assert caught.value.rule == rule


def test_a_home_must_hold_what_is_at_home_there():
    """A parameter larger than the host."""
    small = msgspec.structs.replace(TWO, tiers=(TWO.tiers[0], msgspec.structs.replace(TWO.tiers[1], capacity=9)))
    with pytest.raises(InvalidSchedule, match="resident buffers alone take 10 of 9"):
        judge(AWAY, machine=small, homes=((W, 1),))


def test_resident_buffers_alone_can_be_too_much():
    """A budget below the parameters is refused before the first instruction."""
    with pytest.raises(InvalidSchedule, match="resident buffers alone take 30 of 29"):
        judge(PLAIN, 29)


def one_output_of_two() -> Program:
    """An op whose first result is the model's output and whose second the backward pass reads."""
    buffers = tuple(Buffer(name, 100, Kind.ACTIVATION) for name in ("x", "out", "rest", "tangent", "grad"))
    ops = (
        Op("norm", "n", "n", Phase.FORWARD, (0,), (1, 2), seconds=1.0),
        Op("loss", "l", "l", Phase.LOSS, (1,), (3,), repeatable=False, seconds=1.0),
        Op("back", "b", "b", Phase.BACKWARD, (2, 3), (4,), seconds=1.0),
    )
    return Program("norm", buffers, ops, (1, 4))


def test_an_output_that_the_caller_holds_counts_until_the_end():
    """Making an op's second result again does not make its first, which is an output, go away in between."""
    program = one_output_of_two()
    schedule = Liveness()(program, [0, 1, 0, 2])
    report = referee(program, ROOMY, schedule)

    assert report.peak[0] == 500  # x, out, tangent, and the two results made again
    assert report.timeline[schedule.instructions.index(Run(1, (3,))) + 1] >= 300


def test_random_ops_draw_in_base_order():
    """Two draws from one stream may not change places: their numbers would."""
    buffers = tuple(Buffer(name, 8, Kind.ACTIVATION) for name in ("x", "a", "b", "tangent"))
    ops = (
        Op("drop", "d", "d", Phase.FORWARD, (0,), (1,), random=True),
        Op("drop_1", "d", "d1", Phase.FORWARD, (0,), (2,), random=True),
        Op("loss", "l", "l", Phase.LOSS, (1, 2), (3,), repeatable=False),
    )
    program = Program("dropout", buffers, ops, (3,))
    referee(program, ROOMY, Liveness()(program, [0, 1, 2]))
    referee(program, ROOMY, Liveness()(program, [0, 1, 0, 2]))

    with pytest.raises(InvalidSchedule, match="'random'"):
        referee(program, ROOMY, Liveness()(program, [1, 0, 2]))


@settings(max_examples=150)
@given(planned_orders())
def test_liveness_of_any_valid_order_is_accepted(case):
    """Whatever order ops run in, with repetitions, the pass finds lives that break no rule; in place never costs bytes."""
    program, order = case
    plain = referee(program, ROOMY, Liveness(in_place=False)(program, order))
    report = referee(program, ROOMY, Liveness()(program, order))

    assert report.peak[0] <= plain.peak[0]
    assert report.time == plain.time
    assert report.repeated == len(order) - len(program.ops)


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(2, 12), st.booleans(), st.floats(0, 1))
def test_simulator_and_referee_agree(seed, forward, repeated, share):
    """Time and peak of a random solution are the same to the last bit in the solvers' arrays and in the referee's books."""
    rng = random.Random(seed)
    program = make_program(rng, forward, repeat=2 if repeated else 1)
    flat = flatten(program)
    problem = flat.problem
    solution = problem.keep_all()
    for gap in range(solution.shape[1]):
        for row in (SINCE, BEGIN, HOLD):
            if rng.random() < share:
                solution[row, gap] = rng.randint(-1, len(program.ops))
        if rng.random() < share:
            solution[EAGER, gap] = rng.randint(0, 3)
    found = score(problem, solution, 10**9)
    order = events_of(problem, solution).order
    runs, _, memory = profile(problem, solution)
    assert runs.tolist() == order.tolist()
    if not np.isfinite(found.time):
        assert len(order) == 0
        return
    report = referee(program, ROOMY, Liveness()(program, flat.ops[order].tolist()))

    assert found.time == report.time
    assert found.peak == report.peak[0]
    assert max(memory) == max(report.timeline) == report.peak[0]


def test_a_schedule_survives_json():
    """Encoding and decoding give the same schedule."""
    schedule = Schedule(step().digest, OFFLOAD, (Placement(A, 0, 0, 0, 3),))

    assert msgspec.json.decode(msgspec.json.encode(schedule), type=Schedule) == schedule

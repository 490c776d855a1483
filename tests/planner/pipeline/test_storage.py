"""Planned addresses: the pass places every life, and the referee accepts exactly what works in real bytes."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.passes.liveness import Liveness
from memplan.passes.outside import LeaveOutside
from memplan.passes.place import Life, Place, find_lives, requests_of
from memplan.planner.ir.errors import InvalidSchedule, MemplanError, TraceError
from memplan.planner.ir.machine import Machine, Tier, Unit
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Run, Schedule
from memplan.planner.verbs.alloc import find_places
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.programs.names import NAMES, why_not
from memplan.solvers.storage.allocate import solve
from memplan.solvers.storage.problem import peak_of
from strategies import make_order, make_program

ALIGNED = Machine("aligned", "cpu", (Tier("device", 1 << 40, 1e9, alignment=16),), (Unit("core", "device", {"default": 1e9}),))
SOLVERS = [name for name in NAMES if not why_not(name)]
QUICK = settings(deadline=None, max_examples=60)


class WrongBytesError(Exception):
    """A run read bytes that are not what was written there."""


def made(seed: int) -> tuple[Program, Schedule]:
    """A random step with recomputation and writing in place, which lends some of its outputs."""
    rng = random.Random(seed)
    program = make_program(rng, rng.randint(2, 9))
    schedule = Liveness()(program, make_order(rng, program, True, rng.randint(0, 6)))
    lent = tuple(buffer for buffer in program.outputs if rng.random() < 0.5)
    return program, msgspec.structs.replace(schedule, lent=lent)


def replay(program: Program, schedule: Schedule) -> None:
    """Run the step in one array of bytes; each life writes its own number and has to find it when it is read."""
    at = {(place.buffer, place.lower): place.offset for place in schedule.placements}
    arena = np.full(max((place.offset + program.buffers[place.buffer].bytes for place in schedule.placements), default=0), -1)
    given_away, live = {*program.outputs, *schedule.outside} - set(schedule.lent), {}

    def bytes_of(buffer: int, offset: int) -> np.ndarray:
        return arena[offset : offset + program.buffers[buffer].bytes]

    for now, step in enumerate(schedule.instructions):
        if isinstance(step, Run):
            op = program.ops[step.op]
            for buffer in op.writes:  # before the reads are checked: outputs must not lie on inputs, unless in place
                if buffer not in given_away and buffer not in {new for new, _ in step.reuse}:
                    bytes_of(buffer, at[buffer, now])[:] = now * 1000 + buffer
            for buffer in op.reads:
                if buffer in live and (bytes_of(buffer, live[buffer][0]) != live[buffer][1]).any():
                    raise WrongBytesError(f"{op.name} reads {buffer}")
            for new, old in step.reuse:
                if old in schedule.outside and new in schedule.outside:
                    continue
                offset, _ = live.pop(old)
                if new not in given_away:
                    if at[new, now] != offset:
                        raise WrongBytesError(f"{op.name} cannot write {new} in place")
                    bytes_of(new, offset)[:] = now * 1000 + new
            for buffer in step.keep:
                if buffer not in given_away:
                    live[buffer] = at[buffer, now], now * 1000 + buffer
        elif isinstance(step, Free):
            live.pop(step.buffer, None)
    for buffer in schedule.lent:
        if (bytes_of(buffer, live[buffer][0]) != live[buffer][1]).any():
            raise WrongBytesError(f"output {buffer} has been written over")


@QUICK
@given(st.integers(0, 10**9))
def test_placed_schedules_are_accepted_and_work(seed):
    """Every life has an aligned address, the arena is no smaller than the live bytes, and real bytes agree."""
    program, schedule = made(seed)
    placed, arenas = Place(seconds=0.5)(program, ALIGNED, schedule)
    report = referee(program, ALIGNED, placed)
    bare = referee(program, ALIGNED, msgspec.structs.replace(schedule, lent=()))
    assert report.time == bare.time
    assert report.peak[0] >= bare.peak[0]  # the arena is there the whole step long
    assert report.peak[0] >= program.resident_bytes + sum(arena.bytes for arena in arenas)
    assert len(placed.placements) == len(find_lives(program, ALIGNED, schedule))
    assert all(place.offset % 16 == 0 for place in placed.placements)
    assert all(arena.bytes >= arena.packing.bound for arena in arenas)
    replay(program, placed)


@QUICK
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_what_the_referee_accepts_works_in_real_bytes(seed, change):
    """Addresses moved, lives stretched, placements dropped or doubled: rejected, or the bytes are right all the same."""
    program, schedule = made(seed)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, schedule)
    rng = random.Random(change)
    places = list(placed.placements)
    if not places:
        return
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(places))
        place = places[index]
        kind = rng.choice(["move", "move", "swap", "stretch", "drop", "double"])
        if kind == "move":
            places[index] = msgspec.structs.replace(place, offset=rng.choice(places).offset + rng.choice([0, 0, 16, 8, -16]))
        elif kind == "swap":
            other = rng.randrange(len(places))
            offsets = places[other].offset, place.offset
            places[index] = msgspec.structs.replace(places[index], offset=offsets[0])
            places[other] = msgspec.structs.replace(places[other], offset=offsets[1])
        elif kind == "stretch":
            places[index] = msgspec.structs.replace(place, upper=place.upper + rng.choice([-1, 1]))
        elif kind == "drop" and len(places) > 1:
            places.pop(index)
        else:
            places.append(place)
    mutant = msgspec.structs.replace(placed, placements=tuple(places))
    try:
        referee(program, ALIGNED, mutant)
    except InvalidSchedule:
        return
    replay(program, mutant)


def made_passing(seed: int) -> tuple[Program, Schedule, frozenset[int]]:
    """A step some of whose results pass through memory of their own, counted as workspace."""
    rng = random.Random(seed)
    program, schedule = made(seed)
    given_away = set(program.outputs)
    passing = frozenset(buffer for op in program.ops if rng.random() < 0.6 for buffer in op.writes if buffer not in given_away)
    return with_passing(program, passing), schedule, passing


def with_passing(program: Program, passing: frozenset[int]) -> Program:
    """The bytes of what passes, counted as workspace of the ops that make it."""
    ops = [msgspec.structs.replace(op, workspace=op.workspace + sum(program.buffers[b].bytes for b in passing & set(op.writes)))
           for op in program.ops]  # fmt: skip
    return msgspec.structs.replace(program, ops=tuple(ops))


def peak_beside(program: Program, schedule: Schedule) -> int:
    """The most bytes that lie neither in the arena nor in resident buffers."""
    arena = max((place.offset + program.buffers[place.buffer].bytes for place in schedule.placements), default=0)
    return referee(program, ALIGNED, schedule).peak[0] - arena - program.resident_bytes


@QUICK
@given(st.integers(0, 10**9))
def test_what_is_left_outside_takes_no_more_than_passed_there(seed):
    """The referee accepts it, real bytes agree, and no more lies beside the arena than when all was copied."""
    program, schedule, passing = made_passing(seed)
    left = LeaveOutside(passing)(program, ALIGNED, schedule)
    copied, _ = Place(seconds=0.5)(program, ALIGNED, schedule)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, left)
    plain = msgspec.structs.replace(program, ops=made(seed)[0].ops)
    lighter = with_passing(plain, passing - set(left.outside))
    if placed.placements and copied.placements:
        assert peak_beside(lighter, placed) <= peak_beside(program, copied)
        replay(lighter, placed)


@QUICK
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_what_is_lent_must_have_an_address(seed, change):
    """A buffer named as lent though it has no address, or not named though it has one, is refused."""
    program, schedule = made(seed)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, schedule)
    lent = set(placed.lent) ^ {random.Random(change).randrange(len(program.buffers) + 1)}
    with pytest.raises(InvalidSchedule) as refusal:
        referee(program, ALIGNED, msgspec.structs.replace(placed, lent=tuple(lent)))
    assert refusal.value.rule in ("lent", "placed", "place", "capacity")


@QUICK
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_what_lies_outside_must_have_no_address(seed, change):
    """A buffer named as outside though it has an address, or not named though it has none, is refused or harmless."""
    program, schedule, passing = made_passing(seed)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, LeaveOutside(passing)(program, ALIGNED, schedule))
    rng, outside = random.Random(change), set(placed.outside)
    outside ^= {rng.randrange(len(program.buffers))}
    mutant = msgspec.structs.replace(placed, outside=tuple(outside))
    try:
        referee(program, ALIGNED, mutant)
    except InvalidSchedule:
        return
    if mutant.placements:
        replay(program, mutant)


def test_a_short_life_is_left_outside():
    """Of two results that pass, the one that is freed first stays where it is made; the longer one would add to the peak."""
    chain = [
        Op("a", "a", "a", Phase.FORWARD, (0,), (1,), workspace=100),
        Op("b", "b", "b", Phase.FORWARD, (1,), (2,), workspace=100),
        Op("c", "c", "c", Phase.FORWARD, (2,), (3,)),
        Op("d", "d", "d", Phase.FORWARD, (1, 3), (4,)),
    ]
    kinds = [Kind.INPUT, *[Kind.TEMPORARY] * 3, Kind.OUTPUT]
    program = Program("chain", tuple(Buffer(f"v{at}", 100, kind) for at, kind in enumerate(kinds)), tuple(chain), (4,))
    left = LeaveOutside(frozenset({1, 2}))(program, ALIGNED, Liveness()(program, range(4)))
    assert left.outside == (2,)


FAULTS = {
    "unaligned": (lambda place: {"offset": place.offset + 1}, {"place"}),
    "outside": (lambda place: {"offset": 1 << 41}, {"place"}),
    "too long": (lambda place: {"upper": place.upper + 1}, {"place", "placed"}),
    "empty": (lambda place: {"upper": place.lower}, {"range"}),
    "too late": (lambda place: {"lower": place.lower + 1, "upper": place.upper + 1}, {"place", "placed"}),
    "no such tier": (lambda place: {"tier": 7}, {"range"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "align", "said"),
    [
        (["a,0,3,4,", f"b,0,3,{2**62 - 8},"], 8, "'b'"),
        (["a,0,3,4,", f"b,0,3,4,{2**63 - 4}"], 1, "'b'"),
        ([f"{name},0,3,1," for name in range(20)], 2**59, "'0'"),
        (["a,0,3,1,"], 2**70, "'a'"),
    ],
)
def test_sums_of_bytes_that_would_overflow_are_refused(tmp_path, rows, align, said):
    """In one line that names a buffer: sizes padded to the alignment, above the highest pin."""
    file = tmp_path / "large.csv"
    file.write_text("\n".join(["id,lower,upper,size,pin", *rows]))
    with pytest.raises(TraceError, match=said):
        find_places(file, None, align, "auto", 1.0, 0, lambda stage, share: None)


@pytest.mark.parametrize("method", ["cp-sat", "mip"])
def test_no_time_is_no_proof(tmp_path, method):
    """What was not found in 0 s is told as that, not as impossible, and asked for the smallest peak there is no capacity."""
    file = tmp_path / "pair.csv"
    file.write_text("id,lower,upper,size,reuse\na,0,3,7,\nb,2,5,7,a\n")
    places = find_places(file, None, 1, method, 0.0, 0, lambda stage, share: None)
    assert places.pools[0].packing.status is Status.UNKNOWN
    assert "no packing was found in 0 s" in places.reason


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_addresses_by_any_solver_have_the_same_proven_peak(tmp_path_factory, solver, seed):
    """`memplan alloc --solver`: the integer program, in every pool, with nothing on anything else."""
    rng = random.Random(seed)
    file = tmp_path_factory.mktemp("places") / "few.csv"
    rows = [(rng.randint(0, 9), rng.randint(1, 5), rng.randint(1, 99), rng.choice("pq")) for _ in range(rng.randint(1, 8))]
    lines = [f"{at},{lower},{lower + wide},{size},{pool}" for at, (lower, wide, size, pool) in enumerate(rows)]
    file.write_text("\n".join(["id,lower,upper,size,pool", *lines]))
    wanted = find_places(file, None, 1, "auto", 10.0, 0, lambda stage, share: None)
    found = find_places(file, None, 1, "auto", 10.0, 0, lambda stage, share: None, solver)
    assert wanted.facts()["status"] == found.facts()["status"] == "optimal"
    assert found.peak == found.bound == wanted.peak
    assert {pool.packing.method for pool in found.pools} == {"mip" if solver == "highs" else f"mip ({solver})"}


def test_a_solver_solves_no_other_method(tmp_path):
    """Before the file is read."""
    with pytest.raises(MemplanError, match="give method mip"):
        find_places(tmp_path / "none.csv", None, 1, "cp-sat", 1.0, 0, lambda stage, share: None, "highs")
    with pytest.raises(MemplanError, match="is not known"):
        find_places(tmp_path / "none.csv", None, 1, "mip", 1.0, 0, lambda stage, share: None, "glpk")


def test_an_empty_buffer_of_a_schedule_costs_nothing():
    """A value without bytes, live beside others that the search has to place: the arena is the least there is."""
    lives = [Life(0, 0, 0, 4, 0), Life(1, 0, 0, 3, 1), Life(2, 0, 1, 4, 2), Life(3, 0, 2, 4, 3)]
    storage, _ = requests_of(lives, np.array([0, 5, 3, 5], np.int64), 4)
    packed, bare = solve(storage, Limit()), solve(storage.take(np.array([1, 2, 3])), Limit())
    assert packed.status is bare.status is Status.OPTIMAL
    assert packed.bound == peak_of(storage, packed.best) == bare.bound


def test_what_is_said_to_lie_outside_must_exist():
    """A number that no buffer has is refused."""
    program, schedule = made(5)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, schedule)
    with pytest.raises(InvalidSchedule, match="does not exist"):
        referee(program, ALIGNED, msgspec.structs.replace(placed, outside=(len(program.buffers),)))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_rule(fault):
    """A placement that is wrong in one way is refused for it."""
    program, schedule = made(5)
    placed, _ = Place(seconds=0.5)(program, ALIGNED, schedule)
    first = placed.placements[0]
    change, rules = FAULTS[fault]
    mutant = msgspec.structs.replace(first, **change(first))
    with pytest.raises(InvalidSchedule) as refusal:
        referee(program, ALIGNED, msgspec.structs.replace(placed, placements=(mutant, *placed.placements[1:])))
    assert refusal.value.rule in rules

"""The referee against reality: mutants of valid schedules, replayed with values in storages that are really overwritten.

The interpreter below knows nothing of the referee's books. Storages hold numbers; an op mixes those it reads into those it
writes; what is freed or dropped is poisoned, what is written in place is overwritten, random ops draw from one stream
on their first run and repeat their draw later, and an op that may not be repeated leaves a trace each time.
"""

import copy
import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.passes.liveness import Liveness
from memplan.passes.transfers import Transfers
from memplan.planner.ir.errors import InvalidSchedule
from memplan.planner.ir.machine import Link, Machine, Tier, Unit
from memplan.planner.ir.program import Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Instruction, Run, Schedule, Start, Wait
from memplan.planner.pipeline.planner import Planner
from strategies import ROOMY, events_of_program, make_order, make_program, scramble, some_homes

POISON = "poison"
TIERS = Machine(
    "tiers",
    "cpu",
    (Tier("device", 1 << 40, 1e9), Tier("host", 1 << 40, 1e9)),
    (Unit("core", "device", {"default": 1e9}),),
    (Link("device", "host", 1e4, 1e-3), Link("host", "device", 1e4, 1e-3)),
)


class WrongError(Exception):
    """The replay touched what is not there, or ended otherwise than the step as written."""


class Storage:
    """Bytes somewhere: a number that stands for their contents, or poison."""

    def __init__(self, size: int, value: object):
        self.size, self.value = size, value


class Replay:
    """Carries out instructions and watches."""

    def __init__(self, program: Program, machine: Machine, homes: tuple[tuple[int, int], ...] = ()):
        self.program = program
        self.home = dict(homes)
        self.tier_of = {tier.name: index for index, tier in enumerate(machine.tiers)}
        self.machine = machine
        self.memory: list[dict[int, Storage]] = [{} for _ in machine.tiers]
        for buffer, op in enumerate(program.producer):
            if op < 0:
                self.memory[self.home.get(buffer, 0)][buffer] = Storage(program.buffers[buffer].bytes, ("resident", buffer))
        self.peak = [sum(place.size for place in tier.values()) for tier in self.memory]
        self.draws: dict[int, int] = {}
        self.effects: Counter[int] = Counter()
        self.copies: dict[tuple[int, int], tuple[Storage, Storage, object]] = {}
        self.held: dict[int, Storage] = {}  # what the caller was given when the loss ran

    def carry_out(self, step: Instruction) -> None:
        """One instruction."""
        if isinstance(step, Run):
            self.run(step)
        elif isinstance(step, Free):
            if self.program.producer[step.buffer] < 0 and step.tier == self.home.get(step.buffer, 0):
                raise WrongError("the caller's tensor is gone")
            self.take(step.tier, step.buffer).value = POISON
            del self.memory[step.tier][step.buffer]
        elif isinstance(step, Start):
            link = self.machine.links[step.link]
            source, target = self.tier_of[link.source], self.tier_of[link.target]
            old = self.take(source, step.buffer)
            if (step.buffer, step.link) in self.copies:
                raise WrongError("two copies at once")
            if step.buffer in self.memory[target] and self.home.get(step.buffer) != target:
                raise WrongError("two copies of one buffer in a tier")
            new = self.memory[target].setdefault(step.buffer, Storage(old.size, POISON))
            new.value = POISON
            self.copies[step.buffer, step.link] = (old, new, old.value)
            self.measure()
        else:
            if (step.buffer, step.link) not in self.copies:
                raise WrongError("waits for a copy that nobody started")
            old, new, value = self.copies.pop((step.buffer, step.link))
            if old.value != value or new.value != POISON:
                raise WrongError("an end of the copy changed while it was under way")
            new.value = value

    def take(self, tier: int, buffer: int) -> Storage:
        """A storage that is there and whole."""
        found = self.memory[tier].get(buffer)
        if found is None or found.value == POISON:
            raise WrongError(f"buffer {buffer} is not there")
        return found

    def run(self, step: Run) -> None:
        """One op."""
        op = self.program.ops[step.op]
        tier = self.tier_of[self.machine.units[step.unit].tier]
        here = self.memory[tier]
        values = tuple(self.take(tier, buffer).value for buffer in op.reads)
        if op.phase is Phase.LOSS:
            self.held = {buffer: self.take(0, buffer) for buffer in self.program.outputs if buffer in here}
            self.given = {buffer: place.value for buffer, place in self.held.items()}
        if op.random and step.op not in self.draws:
            self.draws[step.op] = len(self.draws)
        if not op.repeatable:
            self.effects[step.op] += 1
        result = hash((step.op, values, self.draws.get(step.op), tuple(here[b].value for b in op.mutates)))
        made = {buffer: (result, buffer) for buffer in op.writes}
        over = {}
        for new, old in step.reuse:
            if (new, old) not in op.reuse or new in over:
                raise WrongError("cannot write in place")
            over[new] = self.take(tier, old)
            if self.program.producer[old] < 0:
                raise WrongError("overwrites the caller's tensor")
            if here.pop(old, None) is None or over[new].size != self.program.buffers[new].bytes:
                raise WrongError("the storage does not fit")
        fresh = {new: Storage(self.program.buffers[new].bytes, POISON) for new in op.writes if new not in over}
        self.measure(sum(place.size for place in [*fresh.values(), *over.values()]) + op.workspace, tier)
        for buffer in op.writes:
            place = over.get(buffer) or fresh[buffer]
            place.value = made[buffer]
            if buffer in step.keep:
                if buffer in here:
                    raise WrongError("two tensors of one buffer")
                here[buffer] = place
            else:
                place.value = POISON
        if set(step.keep) - set(op.writes) or len(set(step.keep)) < len(step.keep):
            raise WrongError("keeps what it does not make")
        for buffer in op.mutates:
            here[buffer].value = ("changed", result)

    def measure(self, extra: int = 0, tier: int = 0) -> None:
        """Count the bytes there are now; what the caller holds is there whether or not the step still has it."""
        for index, places in enumerate(self.memory):
            storages = {id(place): place.size for place in places.values()}
            if index == 0:
                storages |= {id(place): place.size for place in self.held.values()}
            self.peak[index] = max(self.peak[index], sum(storages.values()) + (extra if index == tier else 0))

    def result(self) -> tuple:
        """What a user sees when the step is over: outputs, what was changed for good, and what happened how often."""
        if self.copies:
            raise WrongError("a copy is still under way")
        extra = [set(tier) - (set(self.program.outputs) if index == 0 else set()) for index, tier in enumerate(self.memory)]
        resident = {buffer for buffer, op in enumerate(self.program.producer) if op < 0}
        extra = [found - {b for b in resident if self.home.get(b, 0) == tier} for tier, found in enumerate(extra)]
        if any(extra):
            raise WrongError("bytes are left behind")
        for buffer, place in self.held.items():
            if place.value != self.given[buffer]:
                raise WrongError("the caller's output was overwritten")
        seen = {buffer: self.take(self.home.get(buffer, 0), buffer).value for buffer in (*resident, *self.program.outputs)}
        return seen, self.effects


def replay(
    program: Program, machine: Machine, steps: tuple[Instruction, ...], homes: tuple[tuple[int, int], ...] = ()
) -> tuple[tuple, list[int]]:
    """Result and peaks of carrying out instructions."""
    world = Replay(program, machine, homes)
    for step in steps:
        world.carry_out(step)
    return world.result(), world.peak


def expected(program: Program, machine: Machine = ROOMY) -> tuple:
    """The result of the step as written."""
    return replay(program, machine, Liveness(in_place=False)(program, range(len(program.ops))).instructions)[0]


def with_offload(rng: random.Random, program: Program, steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The same schedule with one buffer out on the host for a while, if one is idle for long enough."""
    lives: dict[int, int] = {}
    row = list(steps)
    idle = []
    for at, step in enumerate(row):
        if isinstance(step, Free):
            since = lives.pop(step.buffer, at)
            if at - since > 1:
                idle.append((step.buffer, since, at))
        elif isinstance(step, Run):
            used = {*program.ops[step.op].reads, *step.keep}
            for buffer in used & set(lives):
                if at - lives[buffer] > 1 and program.producer[buffer] >= 0 and buffer not in program.outputs:
                    idle.append((buffer, lives[buffer], at))
            lives.update(dict.fromkeys(used, at))
            for _, old in step.reuse:
                lives.pop(old, None)
    if not idle:
        return steps
    buffer, low, high = rng.choice(idle)
    back = [Start(buffer, 1), Wait(buffer, 1), Free(buffer, 1)]
    out = [Start(buffer, 0), Wait(buffer, 0), Free(buffer)]
    return (*row[: low + 1], *out, *row[low + 1 : high], *back, *row[high:])


def mutate(rng: random.Random, program: Program, steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """Delete, swap, duplicate or shift an instruction, or change a number in one."""
    row = list(copy.copy(steps))
    at = rng.randrange(len(row))
    kind = rng.choice(["delete", "swap", "next", "duplicate", "shift", "keep", "reuse", "number"])
    step = row[at]
    if kind == "delete":
        del row[at]
    elif kind == "swap":
        other = rng.randrange(len(row))
        row[at], row[other] = row[other], row[at]
    elif kind == "next":
        other = min(at + 1, len(row) - 1)
        row[at], row[other] = row[other], row[at]
    elif kind == "duplicate":
        row.insert(rng.randrange(len(row) + 1), step)
    elif kind == "shift":
        del row[at]
        low, high = max(0, at - 6), min(len(row), at + 6)
        row.insert(rng.randint(low, high), step)
    elif kind == "keep" and isinstance(step, Run):
        writes = program.ops[step.op].writes
        kept = tuple(buffer for buffer in writes if rng.random() < 0.5)
        row[at] = msgspec.structs.replace(step, keep=kept)
    elif kind == "reuse" and isinstance(step, Run):
        pairs = tuple(pair for pair in program.ops[step.op].reuse if rng.random() < 0.7)
        row[at] = msgspec.structs.replace(step, reuse=() if step.reuse == pairs else pairs)
    elif isinstance(step, Run):
        row[at] = msgspec.structs.replace(step, op=rng.randrange(len(program.ops)))
    elif isinstance(step, Free):
        row[at] = Free(rng.randrange(len(program.buffers)), step.tier)
    else:
        row[at] = msgspec.structs.replace(step, buffer=rng.randrange(len(program.buffers)))
    return tuple(row)


def check(
    program: Program,
    machine: Machine,
    steps: tuple[Instruction, ...],
    wanted: tuple,
    homes: tuple[tuple[int, int], ...] = (),
) -> bool:
    """Whether the referee accepts the instructions; if it does, the replay must be right and fit what it reports."""
    try:
        report = referee(program, machine, Schedule(program.digest, steps, homes=homes))
    except InvalidSchedule:
        return False
    result, peak = replay(program, machine, steps, homes)

    assert result == wanted
    assert peak[0] <= report.peak[0]
    assert list(peak[1:]) == list(report.peak[1:])
    return True


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(2, 9))
def test_valid_schedules_replay_to_the_same_values(seed, forward):
    """Any order with repetitions, in place or not, gives the outputs of the step as written, in the bytes reported."""
    rng = random.Random(seed)
    program = make_program(rng, forward)
    wanted = expected(program)
    for in_place in (False, True):
        order = make_order(rng, program, rng.random() < 0.5, rng.randint(0, 6))
        steps = Liveness(in_place)(program, order).instructions

        assert check(program, ROOMY, steps, wanted)
        assert replay(program, ROOMY, steps)[1][0] == referee(program, ROOMY, Schedule(program.digest, steps)).peak[0]


def mutants(seed: int, forward: int, offload: bool) -> Counter:
    """Mutate one random schedule many times, up to three times over; count verdicts."""
    rng = random.Random(seed)
    program = make_program(rng, forward)
    machine = TIERS if offload else ROOMY
    wanted = expected(program, machine)
    order = make_order(rng, program, rng.random() < 0.5, rng.randint(0, 6))
    steps = Liveness(rng.random() < 0.7)(program, order).instructions
    if offload:
        steps = with_offload(rng, program, steps)
        assert check(program, machine, steps, wanted)
    verdicts: Counter = Counter()
    for _ in range(12):
        mutant = steps
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutant = mutate(rng, program, mutant)
        if mutant != steps:
            verdicts[check(program, machine, mutant, wanted)] += 1
    return verdicts


@pytest.mark.parametrize("offload", [False, True], ids=["one tier", "two tiers"])
def test_the_referee_accepts_no_mutant_that_computes_something_else(offload):
    """Of thousands of mutants most are refused, some are harmless, and every accepted one gives the right values."""
    verdicts: Counter = Counter()
    for seed in range(400):
        verdicts += mutants(seed, 2 + seed % 8, offload)

    assert verdicts[False] > 0.5 * verdicts.total()
    assert verdicts[True] > 20


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(2, 9), st.booleans())
def test_mutants_that_hypothesis_finds(seed, forward, offload):
    """The same, with hypothesis choosing the schedule."""
    mutants(seed, forward, offload)


def test_every_single_change_to_a_planned_model():
    """Each instruction of a small model's tight schedule deleted, doubled, moved and changed: all refused or harmless."""
    import memplan
    import torch

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Dropout(0.1)) * 3, torch.nn.Linear(64, 64))
    make = lambda budget: memplan.plan(  # noqa: E731
        model, budget, (torch.randn(256, 64),), loss=lambda out: out.sum(), machine="h100-80gb", time_limit=20
    )
    plan = make(make(None).minimum)
    program, steps = plan.program, plan.schedule.instructions
    assert plan.planned.report.repeated > 0
    wanted = expected(program)
    verdicts: Counter = Counter()
    for at, step in enumerate(steps):
        rest = (*steps[:at], *steps[at + 1 :])
        changed = [rest, (*steps[:at], step, step, *steps[at + 1 :])]
        changed += [(*rest[:to], step, *rest[to:]) for to in range(len(steps)) if to != at]
        if isinstance(step, Run):
            changed += [(*steps[:at], msgspec.structs.replace(step, keep=()), *steps[at + 1 :])] if step.keep else []
            changed += [
                (*steps[:at], msgspec.structs.replace(step, reuse=reuse), *steps[at + 1 :])
                for reuse in ((), *((pair,) for pair in program.ops[step.op].reuse))
                if reuse != step.reuse
            ]
        for mutant in changed:
            if mutant != steps:
                verdicts[check(program, plan.machine, mutant, wanted)] += 1

    assert verdicts[False] > 0.5 * verdicts.total()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9), st.floats(0.2, 1), st.floats(0, 1.1), st.booleans())
def test_planned_moves_replay_to_the_same_values(seed, forward, share, tight, away):
    """Copies that run beside the ops, waited for late or early, and what the referee accepts of their mutants.

    With `away` the step updates its parameters, and some of them and of their state have their home on the host.
    """
    rng = random.Random(seed)
    program = make_program(rng, forward, updates=away)
    planner = Planner(program, TIERS, offload=True, homes=some_homes(rng, program) if away else ())
    events, tier = events_of_program(planner, scramble(rng, planner, share))
    if not events:
        return
    program, wanted = planner.program, expected(planner.program, TIERS)
    away = [buffer for buffer in planner.homes if tier[buffer]]
    schedule = Transfers(int(tight * planner.kept.peak))(program, TIERS, events, tier, away)
    steps, homes = schedule.instructions, schedule.homes
    assert check(program, TIERS, steps, wanted, homes)
    for _ in range(8):
        mutant = steps
        for _ in range(rng.choice([1, 1, 2])):
            mutant = mutate(rng, program, mutant)
        check(program, TIERS, mutant, wanted, homes)

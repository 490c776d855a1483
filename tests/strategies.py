"""Random programs that look like a training step, and orders of their ops, for hypothesis and for plain seeds."""

import random

import numpy as np
from hypothesis import strategies as st
from memplan.planner.ir.machine import Machine, Tier, Unit
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.pipeline.planner import Planner
from memplan.solvers.remat.problem import BEGIN, EAGER, HOLD, MOVE, SINCE, events_of

ROOMY = Machine("roomy", "cpu", (Tier("device", 1 << 50, 1e9),), (Unit("core", "device", {"default": 1e9}),))


class Maker:
    """Appends buffers and ops to a program under construction."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []

    def buffer(self, size: int, kind: Kind, name: str = "") -> int:
        """A new buffer."""
        self.buffers.append(Buffer(name or f"b{len(self.buffers)}", size, kind))
        return len(self.buffers) - 1

    def op(self, name: str, phase: Phase, reads: list[int], writes: list[int], **rest: object) -> int:
        """A new op."""
        facts = {"key": name, "target": name, **rest}
        self.ops.append(Op(name=name, phase=phase, reads=tuple(sorted(set(reads))), writes=tuple(writes), **facts))
        return len(self.ops) - 1


def make_program(
    rng: random.Random,
    forward: int,
    *,
    branching: float = 0.4,
    reuse: bool = True,
    plain: bool = False,
    repeat: int = 1,
    updates: bool = False,
) -> Program:
    """A step as autograd makes it: forward ops, the loss, and one or two backward ops for each forward op, in reverse.

    A backward op reads the gradient that comes in, some of what its forward op read and wrote, and a parameter; it
    writes gradients of the forward op's inputs, summed by an op of their own where a value has several readers.

    Args:
        rng: decides everything.
        forward: forward ops in one block.
        branching: the chance that an op reads a value other than the one before it.
        reuse: let some ops write in place.
        plain: no workspaces, no second outputs, no ops that run once.
        repeat: how often the block of forward ops is repeated, with the same keys, sizes and times.
        updates: update each parameter, which then has state, in the backward pass instead of returning its gradient.
    """
    make = Maker()
    renewed: list[tuple[int, int]] = []  # parameter, its gradient
    data = make.buffer(rng.randint(1, 8) * 8, Kind.INPUT, "input")
    forwards: list[tuple[int, list[int], list[int], int | None]] = []  # op, values read, values written, parameter
    last = data
    blueprint = [
        (rng.randint(1, 12) * 8, rng.randint(1, 20), rng.random(), rng.random(), rng.random(), rng.random(), rng.random())
        for _ in range(forward)
    ]
    for copy in range(repeat):
        block = [last]
        for place, (size, cost, branch, second, special, work, over) in enumerate(blueprint):
            reads = [last]
            if branch < branching and len(block) > 1:
                reads.append(block[int(branch / branching * (len(block) - 1))])
            parameter = make.buffer(16, Kind.PARAMETER) if second < 0.4 else None
            if parameter is not None:
                reads.append(parameter)
            if over < 0.35 and reuse:
                size = make.buffers[last].bytes
            writes = [make.buffer(size, Kind.ACTIVATION)]
            if special < 0.2 and not plain:
                writes.append(make.buffer(8, Kind.ACTIVATION))
            pairs = ((writes[0], last),) if over < 0.35 and reuse and last != data else ()
            op = make.op(
                f"f{place}" if repeat > 1 else f"f{len(forwards)}",
                Phase.FORWARD,
                reads,
                writes,
                reuse=pairs,
                seconds=cost * 1e-3,
                workspace=8 * int(work * 8) if work > 0.6 and not plain else 0,
                repeatable=plain or not 0.9 < special,
                random=0.2 < special < 0.3 and not plain,
            )
            values = [buffer for buffer in set(reads) if buffer not in (data, parameter)]
            forwards.append((op, sorted(values), writes, parameter))
            last = writes[0]
            block.append(last)
        del copy
    tangent = make.buffer(make.buffers[last].bytes, Kind.TEMPORARY, "tangent")
    make.op("loss", Phase.LOSS, [last], [tangent], repeatable=False, seconds=1e-3)
    gradient: dict[int, int] = {last: tangent}
    outputs = [last] if rng.random() < 0.3 and len(forwards[-1][2]) == 1 else []
    for op, values, writes, parameter in reversed(forwards):
        incoming = gradient.get(writes[0])
        if incoming is None:
            continue
        saved = [buffer for buffer in [*values, *writes] if rng.random() < 0.6]
        cost = make.ops[op].seconds * rng.choice([0.5, 1.0, 2.0])
        given = [make.buffer(make.buffers[value].bytes, Kind.TEMPORARY) for value in values]
        weights = []
        if parameter is not None:
            weights = [make.buffer(16, Kind.GRADIENT)]
            outputs += [] if updates else weights
            renewed.append((parameter, weights[0]))
            saved.append(parameter)
        together = rng.random() < 0.5 or not (given and weights) or plain
        size = make.buffers[incoming].bytes
        pairs = tuple((new, incoming) for new in given[:1] if reuse and rng.random() < 0.5 and make.buffers[new].bytes == size)
        work = 0 if plain else 8 * rng.choice([0, 0, 1, 4])
        common = {"seconds": cost, "workspace": work}
        name = f"b{op}"
        if together and (given or weights):
            make.op(name, Phase.BACKWARD, [incoming, *saved], [*given, *weights], reuse=pairs, **common)
        elif given or weights:
            make.op(f"{name}w", Phase.BACKWARD, [incoming, *saved], weights, **common)
            make.op(name, Phase.BACKWARD, [incoming, *saved], given, reuse=pairs, **common)
        for value, new in zip(values, given, strict=True):
            if value in gradient:
                total = make.buffer(make.buffers[value].bytes, Kind.TEMPORARY)
                old = gradient[value]
                pairs = ((total, old),) if reuse else ()
                make.op(f"{name}s{value}", Phase.BACKWARD, [old, new], [total], reuse=pairs, seconds=1e-3)
                gradient[value] = total
            else:
                gradient[value] = new
    for parameter, weight in renewed if updates else ():
        state = make.buffer(8, Kind.STATE)
        make.op(f"u{parameter}", Phase.BACKWARD, [parameter, weight, state], [], mutates=(parameter, state), repeatable=False,
                seconds=1e-3, workspace=8)  # fmt: skip
    program = Program("random", tuple(make.buffers), tuple(make.ops), tuple(sorted(set(outputs))))
    program.verify()
    return program


@st.composite
def programs(draw: st.DrawFn, most: int = 10, **options: object) -> Program:
    """A program of up to `most` forward ops."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    return make_program(rng, draw(st.integers(2, most)), **options)  # type: ignore[arg-type]


@st.composite
def orders(draw: st.DrawFn, program: Program) -> list[int]:
    """A valid order of a program's ops with repetition: base order mixed up where it may be, with runs repeated."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    return make_order(rng, program, shuffle=draw(st.booleans()), repeats=draw(st.integers(0, 6)))


def make_order(rng: random.Random, program: Program, shuffle: bool, repeats: int) -> list[int]:
    """A valid order: every op at least once after its inputs, the loss after the forward pass, plus random repetitions.

    First runs of random ops stay in base order, for they share one stream of random numbers.
    """
    order = list(range(len(program.ops)))
    if shuffle:
        order, done = [], set()
        known = {buffer for buffer, op in enumerate(program.producer) if op < 0}
        while len(order) < len(program.ops):
            ready = [index for index, op in enumerate(program.ops) if index not in done and set(op.reads) <= known]
            ready = [index for index in ready if index < program.boundary or len(done) >= program.boundary]
            ready = [
                i for i in ready if not program.ops[i].random or all(j in done or not program.ops[j].random for j in range(i))
            ]
            index = rng.choice(ready)
            order.append(index)
            done.add(index)
            known |= set(program.ops[index].writes)
    for _ in range(repeats):
        at = rng.randrange(len(order))
        again = [op for op in order[: at + 1] if program.ops[op].repeatable]
        if again:
            order.insert(at + 1, rng.choice(again))
    return order


@st.composite
def planned_orders(draw: st.DrawFn, most: int = 10, **options: object) -> tuple[Program, list[int]]:
    """A program and a valid order of it."""
    program = draw(programs(most, **options))
    return program, draw(orders(program))


def some_homes(rng: random.Random, program: Program) -> tuple[int, ...]:
    """Some of the parameters and states, at home elsewhere."""
    resident = [buffer for buffer, value in enumerate(program.buffers) if value.kind in (Kind.PARAMETER, Kind.STATE)]
    return tuple(buffer for buffer in resident if rng.random() < 0.7)


def scramble(rng: random.Random, planner: Planner, share: float) -> np.ndarray:
    """A random solution: retention intervals, and values of the forward pass moved where the backward pass reads them."""
    problem = planner.flat.problem
    solution = problem.keep_all(away=rng.random())
    for gap in range(solution.shape[1]):
        for row in (SINCE, BEGIN, HOLD):
            if rng.random() < share / 2:
                solution[row, gap] = rng.randint(-1, len(problem.seconds))
        if rng.random() < share / 2:
            solution[EAGER, gap] = rng.randint(0, 3)
    slots = planner.master.slots
    for slot in np.flatnonzero(slots.movable):
        if slots.movable[slot] == 3:
            if rng.random() < share:
                solution[SINCE, slots.gap[slot]] = rng.randint(int(slots.before[slot]) + 1, int(slots.at[slot]))
                solution[MOVE, slots.gap[slot]] = problem.home[slots.buffer[slot]]
            elif rng.random() < share:
                solution[SINCE, slots.gap[slot]], solution[MOVE, slots.gap[slot]] = -1, 0
        elif rng.random() < share and slots.last[slot]:
            solution[MOVE, slots.gap[slot]] = rng.randint(1, len(problem.tiers))
        elif rng.random() < share:
            solution[SINCE, slots.gap[slot]] = rng.randint(max(int(slots.before[slot]) + 1, problem.boundary), slots.at[slot])
            solution[MOVE, slots.gap[slot]] = rng.randint(1, len(problem.tiers))
    return solution


def events_of_program(planner: Planner, solution: np.ndarray) -> tuple[list[int], dict[int, int]]:
    """The events of a solution by the program's numbers, and the tier of each of its buffers: none where it is impossible."""
    events, ops, buffers = events_of(planner.flat.problem, solution), planner.flat.ops, planner.flat.buffers
    order = [int(ops[event]) if event >= 0 else -1 - int(buffers[-1 - event]) for event in events.order]
    return order, dict(zip(buffers.tolist(), events.tier.tolist(), strict=True))

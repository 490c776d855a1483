"""What only the backward pass needs: which of it waits, and that an order with it is an order."""

import random

import pytest
from memplan.passes.defer import Defer, movable
from memplan.passes.liveness import Liveness
from memplan.passes.promptly import Promptly
from memplan.passes.reorder import Reorder
from memplan.planner.ir.program import Kind, Phase, Program
from memplan.planner.ir.referee import referee
from strategies import ROOMY, Maker, make_program


def step(kept: int, given: int) -> Program:
    """x -> y -> loss; a side op makes `given` bytes for the backward pass out of x, which is read there if `kept`."""
    make = Maker()
    data, x, y, side = (make.buffer(size, Kind.TEMPORARY) for size in (8, 64, 8, given))
    make.op("x", Phase.FORWARD, [data], [x])
    make.op("side", Phase.FORWARD, [x], [side])
    make.op("y", Phase.FORWARD, [x], [y])
    tangent, gradient = make.buffer(8, Kind.TEMPORARY), make.buffer(8, Kind.GRADIENT)
    make.op("loss", Phase.LOSS, [y], [tangent], repeatable=False)
    make.op("b", Phase.BACKWARD, [tangent, side, *([x] if kept else [])], [gradient])
    return Program("step", tuple(make.buffers), tuple(make.ops), (gradient,))


@pytest.mark.parametrize(
    ("kept", "given", "waits"), [(True, 8, True), (False, 8, False), (False, 64, False), (False, 72, True)]
)
def test_a_group_waits_where_fewer_bytes_are_kept_then(kept, given, waits):
    """A mask of what is kept anyway waits; a small result of something large does not; eager's order wins a tie."""
    program = step(kept, given)
    order = Defer()(program)

    assert (order.index(1) > order.index(program.boundary)) == waits
    schedule = Liveness()(program, order)
    assert referee(program, ROOMY, schedule).repeated == 0


@pytest.mark.parametrize("seed", range(20))
def test_orders_are_complete_and_the_referee_takes_them(seed):
    """Of random steps, rearranged or not, with updates or without; what draws, and what the loss needs, stays early."""
    rng = random.Random(seed)
    program = make_program(rng, rng.randint(3, 10), updates=bool(seed % 2))
    deferred = Defer()(program)
    for order in (deferred, Reorder()(program, deferred), Promptly()(program, Reorder()(program, deferred))):
        assert sorted(order) == list(range(len(program.ops)))
    referee(program, ROOMY, Liveness()(program, Promptly()(program, Reorder()(program, deferred))))
    fixed = [index for index, op in enumerate(program.ops[: program.boundary]) if op.random or not op.repeatable]
    assert not set(fixed) & movable(program)


def test_rearranging_knows_nothing_else_of_an_order():
    """Rearranging a program's own order is what rearranging the program is."""
    program = make_program(random.Random(3), 8)

    assert Reorder()(program, range(len(program.ops))) == Reorder()(program)

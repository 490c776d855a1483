"""Updates moved forward: what the new order keeps, and that no update could run sooner."""

import random

from hypothesis import given
from hypothesis import strategies as st
from memplan.passes.promptly import Promptly, is_update
from strategies import make_order, programs


def waits(program, index, at):
    """When the last op runs that an update has to follow: what makes its gradient, and who reads what it changes."""
    op = program.ops[index]
    made = [at[program.producer[buffer]] for buffer in op.reads if program.producer[buffer] >= 0]
    read = [at[i] for i, other in enumerate(program.ops)
            if not is_update(program, i) and set(other.reads) & set(op.mutates)]  # fmt: skip
    return max([*made, *read])


@given(programs(8, updates=True), st.integers(0, 2**32))
def test_each_update_runs_right_behind_the_last_op_that_it_follows(program, seed):
    order = make_order(random.Random(seed), program, shuffle=True, repeats=0)
    moved = Promptly()(program, order)
    at = {index: place for place, index in enumerate(moved)}
    assert sorted(moved) == sorted(order)
    assert [i for i in moved if not is_update(program, i)] == [i for i in order if not is_update(program, i)]
    for index in range(len(program.ops)):
        if is_update(program, index):
            last = waits(program, index, at)
            assert last < at[index]
            assert all(is_update(program, moved[place]) for place in range(last + 1, at[index]))
    assert Promptly()(program, moved) == moved


@given(programs(8), st.integers(0, 2**32))
def test_a_step_without_updates_keeps_its_order(program, seed):
    order = make_order(random.Random(seed), program, shuffle=True, repeats=0)
    assert Promptly()(program, order) == order

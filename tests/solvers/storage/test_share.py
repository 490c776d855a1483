"""Writing in place: the choice of what shares bytes is exact where it is small, and always a packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.solvers.face.answer import Answer, Limit, Status
from memplan.solvers.storage.allocate import pins_clash, solve
from memplan.solvers.storage.problem import FREE, Packing, Storage, peak_of
from memplan.solvers.storage.share import FEW, pack_sharing
from packings import make, meet

EASY = settings(deadline=None, max_examples=80)


@st.composite
def sharing(draw, most=5) -> tuple[Storage, np.ndarray]:
    """Small problems in which some buffers may be written over others, with gaps and alignment."""
    count, alignment = draw(st.integers(1, most)), draw(st.sampled_from([1, 1, 2]))
    spans, size, pins, over = [], [], [], []
    for i in range(count):
        low = draw(st.integers(0, 7))
        high = draw(st.integers(low + 1, 9))
        gap = sorted(draw(st.sets(st.integers(low + 1, high - 1), max_size=2))) if high > low + 2 else []
        spans.append([(low, gap[0]), (gap[1], high)] if len(gap) == 2 else [(low, high)])
        size.append(draw(st.integers(1, 4)))
        pins.append(draw(st.sampled_from([FREE, FREE, FREE, 0, 2])))
        able = [j for j in range(i) if j not in over and spans[j][0][0] < low <= spans[j][-1][1] <= spans[i][0][1]]
        over.append(draw(st.sampled_from([-1, *able])))
        if over[i] >= 0:
            size[i] = size[over[i]]
    return make(size, spans, pins, alignment), np.array(over, np.int64)


def may_lie(storage: Storage, over: np.ndarray, i: int, j: int, at_i: int, at_j: int) -> bool:
    """Whether two buffers may have these offsets."""
    apart = at_i + storage.size[i] <= at_j or at_j + storage.size[j] <= at_i
    return apart or not meet(storage, i, j) or (at_i == at_j and (over[i] == j or over[j] == i))


def smallest(storage: Storage, over: np.ndarray) -> int | None:
    """The smallest peak by trying every offset."""
    top, best = int(storage.padded.sum()) + max(int(storage.pin.max()), 0), None

    def go(offset: list[int], peak: int) -> None:
        nonlocal best
        i = len(offset)
        if best is not None and peak >= best:
            return
        if i == len(storage):
            best = peak
            return
        for at in range(0, top + 1, storage.alignment) if storage.pin[i] == FREE else [int(storage.pin[i])]:
            if all(may_lie(storage, over, i, j, at, offset[j]) for j in range(i)):
                go([*offset, at], max(peak, at + int(storage.size[i])))

    go([], 0)
    return best


@EASY
@given(sharing())
def test_few_pairs_are_solved_exactly(drawn):
    """The smallest peak of all offsets, and it is proven; one byte less is infeasible."""
    storage, over = drawn
    expected = smallest(storage, over)
    found = pack_sharing(storage, over, solve, Limit(seconds=20))
    if expected is None:
        assert found.status is Status.INFEASIBLE
        return
    assert (found.status, peak_of(storage, found.best)) == (Status.OPTIMAL, expected)
    for i in range(len(storage)):
        for j in range(i):
            assert may_lie(storage, over, i, j, found.best[i], found.best[j])
    assert pack_sharing(storage, over, solve, Limit(expected, 20)).status is Status.OPTIMAL
    assert pack_sharing(storage, over, solve, Limit(expected - 1, 20)).status is Status.INFEASIBLE


def shy(storage: Storage, limit: Limit) -> Packing:
    """A solver that finds nothing in time wherever it would have to look; only what its bound says is beyond it."""
    clash = pins_clash(storage) is not None or (limit.bytes is not None and storage.bound > limit.bytes)
    return Answer(Status.INFEASIBLE if clash else Status.UNKNOWN, storage.bound, None, "shy")


@EASY
@given(sharing(), st.booleans(), st.sampled_from([0.0, 20.0]))
def test_nothing_found_is_no_proof(drawn, fits, seconds):
    """A solver that ran out of time leaves it open, unless no choice can do; and the bound stays one."""
    storage, over = drawn
    expected = smallest(storage, over)
    found = pack_sharing(storage, over, shy, Limit(expected if fits else None, seconds))
    assert found.best is None
    if expected is not None:
        assert found.status is Status.UNKNOWN
        assert found.bound <= expected


def test_more_pairs_than_are_tried_prove_nothing():
    """Every choice that was tried is impossible, and there are others."""
    many = FEW + 1
    storage = make([1] * 2 * many, [[(0, 3)]] * many + [[(2, 5)]] * many, [FREE, *range(1, many), *range(many, 2 * many)])
    over = np.array([-1] * many + list(range(many)))

    def refuse(storage: Storage, limit: Limit) -> Packing:
        return Answer(Status.INFEASIBLE, storage.bound, None, "refuses")

    assert pack_sharing(storage, over, refuse, Limit(seconds=5)).status is Status.UNKNOWN


@pytest.mark.parametrize("pairs", [1, FEW, FEW + 1, 12])
def test_a_chain_of_any_length_needs_the_room_of_one(pairs):
    """Each is written over the one before, as activation functions in place are."""
    spans = [[(2 * i, 2 * i + 3)] for i in range(pairs + 1)]
    over = np.arange(-1, pairs)
    found = pack_sharing(make([7] * (pairs + 1), spans), over, solve, Limit(seconds=5))
    assert (found.status, found.best.tolist()) == (Status.OPTIMAL, [0] * (pairs + 1))


def test_apart_where_together_is_worse():
    """As one buffer, of both lives, the two would have to lie on what lies below either."""
    storage = make([2, 2, 3, 3], [[(0, 5)], [(4, 9)], [(0, 4)], [(5, 9)]], [FREE, FREE, 0, 2])
    over = np.array([-1, 0, -1, -1])
    assert smallest(storage, over) == peak_of(storage, pack_sharing(storage, over, solve, Limit(seconds=5)).best) == 5

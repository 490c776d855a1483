"""Repetition: equal blocks are found as equal, packed once, and the whole is a packing that the repair only lowers."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.solvers.face.answer import Limit
from memplan.solvers.storage.allocate import solve
from memplan.solvers.storage.instances import cut_rectangle, tower
from memplan.solvers.storage.levels import pack_levels
from memplan.solvers.storage.problem import Storage, make_storage, peak_of
from memplan.solvers.storage.repeat import find_repeats
from packings import faults, make, storages

EASY = settings(deadline=None, max_examples=60)


@st.composite
def towers(draw) -> tuple[Storage, int, int]:
    """Blocks in a row under kept buffers, in any order: the problem, how many blocks, and the buffers of one."""
    block = draw(storages(most=6, pins=False, gaps=False))
    times = draw(st.integers(2, 6))
    kept = draw(st.lists(st.integers(1, 9), max_size=2))
    whole = tower(block, times, kept)
    return whole.take(np.array(draw(st.permutations(range(len(whole)))), np.int64)), times, len(block)


def check_repeats(storage: Storage) -> int:
    """Members of a column are alike, blocks share no time and no buffer; returns how many are members."""
    first, last, _ = storage.sections
    seen: set[int] = set()
    for repeat in find_repeats(storage):
        members, cuts = repeat
        assert len(members) == len(cuts) - 1 >= 2
        assert not seen & set(members.ravel().tolist())
        seen |= set(members.ravel().tolist())
        spans = storage.start[:-1][members]
        assert (storage.size[members] == storage.size[members[0]]).all()
        assert (first[spans] - cuts[:-1, None] == first[spans[0]] - cuts[0]).all()
        assert (last[spans] - cuts[:-1, None] == last[spans[0]] - cuts[0]).all()
        assert (first[spans] >= cuts[:-1, None]).all()
        assert (last[spans] <= cuts[1:, None]).all()
    return len(seen)


@EASY
@given(towers())
def test_two_levels_make_a_packing(drawn):
    """With blocks or without, before the repair and after it, which never raises the peak."""
    storage, _, _ = drawn
    check_repeats(storage)
    rigid = pack_levels(storage, solve, 0.2, repair=False)
    repaired = pack_levels(storage, solve, 0.2)
    assert (rigid is None) == (repaired is None)
    if rigid is not None and repaired is not None:
        assert not faults(storage, rigid.offset)
        assert not faults(storage, repaired.offset)
        assert storage.bound <= peak_of(storage, repaired.offset) <= repaired.rigid == peak_of(storage, rigid.offset)


@EASY
@given(storages(most=7))
def test_any_problem_may_be_asked(storage):
    """Pins and gaps stay outside of blocks; where nothing repeats there is no answer."""
    check_repeats(storage)
    levels = pack_levels(storage, solve, 0.2)
    assert levels is None or not faults(storage, levels.offset)


def test_blocks_are_found_among_what_lives_across_them():
    """All eight blocks of sixty buffers, the ones at the edges too, and no kept buffer."""
    block = cut_rectangle(60, 3, fray=0.2)[0]
    assert check_repeats(tower(block, 8, [500, 70])) == 8 * len(block)


def test_two_kinds_of_blocks_are_two_repetitions():
    """A forward pass and a backward pass of other layers."""
    one, two = cut_rectangle(40, 1)[0], cut_rectangle(30, 2)[0]
    left, right = tower(one, 5, []), tower(two, 4, [])
    shift = int(left.upper.max()) + 2
    both = make_storage(
        np.concatenate([left.lower, right.lower + shift]), np.concatenate([left.upper, right.upper + shift]),
        np.concatenate([left.size, right.size]),
    )  # fmt: skip
    assert sorted(repeat.members.shape[0] for repeat in find_repeats(both)) == [4, 5]
    assert check_repeats(both) == 5 * len(one) + 4 * len(two)


def test_the_repair_wins_back_what_a_block_does_not_use():
    """What lives from the end of a block into the next cannot share with rectangles, but with what is really there."""
    blocks = tower(make([8, 7, 1], [[(3, 5)], [(0, 8)], [(1, 2)]]), 6, [])
    each = 8 * np.arange(5)
    columns = (blocks.lower, each + 6), (blocks.upper, each + 10), (blocks.size, np.full(5, 6))
    storage = make_storage(*(np.concatenate(pair) for pair in columns))
    levels = pack_levels(storage, solve, 1.0)
    assert levels is not None
    assert (levels.rigid, levels.blocks[1]) == (21, 1)
    assert peak_of(storage, levels.offset) == storage.bound == 15


def test_many_hard_blocks_are_packed_as_well_as_one():
    """What is too large to search as a whole is no harder than its block."""
    block = cut_rectangle(60, 3, fray=0.2)[0]
    whole = tower(block, 50, [500, 70])
    once = solve(block, Limit(seconds=5))
    levels = pack_levels(whole, solve, 10.0)
    assert levels is not None
    assert levels.blocks == (50, 1)
    kept = whole.bound - block.bound
    assert peak_of(whole, levels.offset) <= peak_of(block, once.best) + kept + 570

"""Joining what nearly fits: a packing of what remains is one of all, and no section is loaded beyond the limit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.storage.allocate import solve
from memplan.solvers.storage.instances import cut_rectangle
from memplan.solvers.storage.merge import WAYS, Merger, Weights
from memplan.solvers.storage.problem import peak_of
from packings import faults, make, storages

EASY = settings(deadline=None, max_examples=60)


@EASY
@given(storages(most=9, pins=False, gaps=False), st.sampled_from(WAYS), st.sampled_from([1.0, 1.3]))
def test_what_is_joined_comes_apart_as_a_packing(storage, weights, room):
    """At each limit of waste; the load stays within what it was told, and each problem is smaller than the last."""
    most = int(storage.load.max() * room)
    many = len(storage)
    for part in Merger(storage, most, weights).run():
        assert len(part.storage) < many
        many = len(part.storage)
        assert part.storage.load.max() <= most
        found = solve(part.storage, Limit(seconds=0.2))
        assert not faults(storage, part.whole(found.best))


def test_the_least_waste_goes_first():
    """Of three with nearly one lifetime, the two that are closest are joined; the limit keeps out the third."""
    storage = make([5, 5, 5, 9], [[(0, 100)], [(1, 100)], [(20, 100)], [(0, 5)]])
    first, *_ = Merger(storage, 19, WAYS[1]).run()
    assert first.root[0] == first.root[1] != first.root[2]
    assert len(first.storage) == 3
    *_, last = Merger(storage, 24, WAYS[1]).run()
    assert len(last.storage) < 3


def test_a_load_is_never_raised_beyond_the_limit():
    """Two that would fill the gap between them are left alone where the gap is full."""
    storage = make([4, 4, 6], [[(0, 5)], [(6, 9)], [(4, 7)]])
    *_, part = Merger(storage, 10, Weights(1.0, 1.0, 1.0)).run()
    assert part.root[0] == part.root[1]
    assert all(part.root[0] != part.root[1] for part in Merger(storage, 9, Weights(1.0, 1.0, 1.0)).run())


def test_buffers_of_no_bytes_are_joined_too():
    """A schedule may hold empty tensors."""
    storage = make([0, 0, 3], [[(0, 5)], [(1, 5)], [(0, 4)]])
    for part in Merger(storage, 3, WAYS[0]).run():
        assert not faults(storage, part.whole(solve(part.storage, Limit()).best))


@pytest.mark.parametrize("fray", [0.02, 0.1])
def test_frayed_rectangles_are_put_together_again(fray):
    """Lifetimes cut short by some share: nothing fits exactly, and yet the optimum is found."""
    storage, _ = cut_rectangle(300, 5, fray=fray)
    found = solve(storage, Limit(seconds=20))
    assert (found.status, peak_of(storage, found.best)) == (Status.OPTIMAL, 2**40)
    assert not faults(storage, found.best)

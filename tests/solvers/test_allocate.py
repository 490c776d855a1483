"""Addresses: every answer is a packing, the search is exact, and what is joined comes apart again."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.planner.referee import first_clash
from memplan.solvers.allocate import pack, pins_clash
from memplan.solvers.canonical import ALL, DOMINANCE, LIFT, NONE, SECTIONS, SOLVED, SPLIT, TWINS, Search, make_instance
from memplan.solvers.coalesce import coalesce
from memplan.solvers.formulations import pack_mip, pack_sat
from memplan.solvers.greedy import ORDERS, first_fit, lowest_first
from memplan.solvers.instances import cut_rectangle
from memplan.solvers.storage import Status, peak_of
from packings import faults, make, smallest_peak, storages

EASY = settings(deadline=None, max_examples=60)


def least(storage, use):
    """The smallest capacity at which the search, pruned as told, finds a packing."""
    search = Search(storage, use=use)
    capacity = storage.bound
    while True:
        got, offset = search.fit(capacity, time.monotonic() + 60)
        if got == SOLVED:
            assert not faults(storage, offset)
            assert peak_of(storage, offset) <= capacity
            return peak_of(storage, offset)
        assert got == NONE
        capacity += 1


@EASY
@given(storages(most=6), st.sampled_from([ALL, 0, *(ALL - one for one in (DOMINANCE, SECTIONS, LIFT, TWINS, SPLIT))]))
def test_search_is_exact_whatever_prunes(storage, use):
    """The search finds the smallest peak that trying every order finds, with any technique switched off."""
    expected = smallest_peak(storage)
    if expected is not None:
        assert least(storage, use) == expected


@EASY
@given(storages())
def test_pack_is_exact_and_checked(storage):
    """The answer is optimal and a packing; one byte less is infeasible."""
    expected = smallest_peak(storage)
    answer = pack(storage, seconds=20)
    if expected is None:
        assert answer.status is Status.INFEASIBLE
        assert pins_clash(storage) is not None
        return
    assert answer.status is Status.OPTIMAL
    assert not faults(storage, answer.offset)
    assert peak_of(storage, answer.offset) == answer.bound == expected
    assert pack(storage, expected, seconds=20).status is Status.OPTIMAL
    assert pack(storage, expected - 1, seconds=20).status is Status.INFEASIBLE


@pytest.mark.parametrize("solver", [pack_sat, pack_mip])
@settings(deadline=None, max_examples=25)
@given(storage=storages(most=6))
def test_the_other_formulations_agree(solver, storage):
    """CP-SAT and the integer program find the same optimum, and nothing below it."""
    expected = smallest_peak(storage)
    answer = solver(storage, None, 20.0)
    if expected is None:
        assert answer.status is Status.INFEASIBLE
        return
    assert answer.status is Status.OPTIMAL
    assert not faults(storage, answer.offset)
    assert peak_of(storage, answer.offset) == expected
    assert solver(storage, expected, 20.0).status is Status.OPTIMAL
    assert solver(storage, expected - 1, 20.0).status is Status.INFEASIBLE


@EASY
@given(storages(most=20))
def test_greedy_answers_are_packings(storage):
    """Whatever the order, the gaps, the alignment."""
    instance = make_instance(storage)
    if pins_clash(storage) is None:
        for order in ORDERS:
            for best in (False, True):
                assert not faults(storage, first_fit(storage, instance, order, best))


@EASY
@given(storages(most=20, pins=False))
def test_lowest_first_and_coalescing_give_packings(storage):
    """Lowest first, as it is and after joining; joining changes no load."""
    assert not faults(storage, lowest_first(storage))
    small, root, base = coalesce(storage)
    if storage.alignment == 1:
        assert small.bound == storage.bound
    assert not faults(storage, lowest_first(small)[root] + base)


@EASY
@given(st.integers(1, 300), st.integers(0, 1000), st.sampled_from([0.0, 0.3]))
def test_cut_rectangles_have_the_optimum_they_claim(count, seed, fray):
    """The cuts are a packing of the height, which is the lower bound too; without fraying, joining undoes them."""
    storage, offset = cut_rectangle(count, seed, fray=fray)
    assert peak_of(storage, offset) == storage.bound == 2**40
    places = zip(storage.lower.tolist(), storage.upper.tolist(), offset.tolist(), storage.size.tolist(), range(len(storage)),
                 strict=True)  # fmt: skip
    assert first_clash(places) is None
    if not fray:
        assert peak_of(storage, pack(storage, seconds=5).offset) == 2**40


@EASY
@given(storages(most=8), st.data())
def test_the_checker_agrees_with_all_pairs(storage, data):
    """The sweep finds a clash exactly where some pair clashes."""
    offset = [data.draw(st.integers(0, 20)) for _ in range(len(storage))]
    owner = np.repeat(np.arange(len(storage)), np.diff(storage.start))
    places = [(int(low), int(high), offset[i], int(storage.size[i]), int(i))
              for low, high, i in zip(storage.lower, storage.upper, owner, strict=True)]  # fmt: skip
    overlaps = [fault for fault in faults(storage, np.array(offset)) if "overlap" in fault]
    assert (first_clash(places) is not None) == bool(overlaps)


def test_a_gap_is_room_for_others():
    """A buffer lies inside another's gap at the same address."""
    storage = make([4, 4], [[(0, 2), (6, 9)], [(2, 6)]])
    assert pack(storage).bound == 4
    assert peak_of(storage, pack(storage).offset) == 4


def test_twins_and_seeds_do_not_change_the_answer():
    """Many equal buffers are one choice; the same seed gives the same nodes."""
    storage = make([3] * 12 + [5], [[(0, 4)]] * 12 + [[(2, 6)]])
    counts = set()
    for _ in range(2):
        search = Search(storage, seed=3)
        assert search.fit(storage.bound - 1, time.monotonic() + 20)[0] == NONE
        counts.add((search.restarts, search.nodes))
    assert len(counts) == 1
    assert next(iter(counts))[1] < 100


def test_nothing_to_place():
    """No buffers: a peak of zero."""
    assert pack(make([], [])).status is Status.OPTIMAL


def test_too_many_buffers_are_not_searched(monkeypatch):
    """Beyond what the search takes, the answer is greedy and says so."""
    monkeypatch.setattr("memplan.solvers.allocate.MANY", 10)
    storage, _ = cut_rectangle(60, 5, fray=0.3)
    answer = pack(storage, seconds=1, merge=False)
    assert answer.status is Status.FEASIBLE
    assert not faults(storage, answer.offset)


@pytest.mark.parametrize("capacity", [None, 2**40])
def test_frayed_rectangles_of_sixty_are_solved(capacity):
    """A problem that needs the search."""
    storage, _ = cut_rectangle(60, 5, fray=0.1)
    answer = pack(storage, capacity, seconds=30)
    assert answer.status is Status.OPTIMAL
    assert not faults(storage, answer.offset)

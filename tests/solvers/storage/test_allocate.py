"""Addresses: every answer is a packing, the search is exact, and what is joined comes apart again."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.planner.ir.referee import first_clash
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.storage import cpsat, mip
from memplan.solvers.storage.allocate import pins_clash, solve
from memplan.solvers.storage.canonical import (
    ALL,
    DOMINANCE,
    LIFT,
    NONE,
    SECTIONS,
    SLICE,
    SOLVED,
    SPLIT,
    STOPPED,
    TWINS,
    PlacementSearch,
    make_instance,
)
from memplan.solvers.storage.coalesce import coalesce
from memplan.solvers.storage.greedy import ORDERS, first_fit, lowest_first
from memplan.solvers.storage.instances import cut_rectangle
from memplan.solvers.storage.methods import METHODS, method
from memplan.solvers.storage.problem import LIMIT, make_storage, peak_of
from packings import faults, make, smallest_peak, solid, storages

EASY = settings(deadline=None, max_examples=60)


@EASY
@given(storages(most=6), st.sampled_from([ALL, 0, *(ALL - one for one in (DOMINANCE, SECTIONS, LIFT, TWINS, SPLIT))]))
def test_search_is_exact_whatever_prunes(storage, use):
    """The search fits the smallest peak that trying every order finds, and no byte less, with any technique switched off."""
    storage = solid(storage)
    expected = smallest_peak(storage)
    if expected is None or not len(storage):
        return
    search = PlacementSearch(storage, use=use)
    got, offset = search.fit(expected, time.monotonic() + 60)
    assert got == SOLVED
    assert not faults(storage, offset)
    assert peak_of(storage, offset) == expected
    assert search.fit(expected - 1, time.monotonic() + 60)[0] == NONE


@EASY
@given(storages())
def test_pack_is_exact_and_checked(storage):
    """The answer is optimal and a packing; one byte less is infeasible."""
    expected = smallest_peak(storage)
    answer = solve(storage, Limit(seconds=20))
    if expected is None:
        assert answer.status is Status.INFEASIBLE
        assert pins_clash(storage) is not None
        return
    assert answer.status is Status.OPTIMAL
    assert not faults(storage, answer.best)
    assert peak_of(storage, answer.best) == answer.bound == expected
    assert solve(storage, Limit(expected, 20)).status is Status.OPTIMAL
    assert not expected or solve(storage, Limit(expected - 1, 20)).status is Status.INFEASIBLE


@pytest.mark.parametrize("solver", [method(name) for name in METHODS if name != "auto"])
@settings(deadline=None, max_examples=40)
@given(storage=storages(most=6))
def test_the_other_formulations_agree(solver, storage):
    """CP-SAT and the integer program find the same optimum, and nothing below it.

    The integer program calculates in floating point: of terabytes it need not prove the last byte, and must not claim to.
    """
    expected = smallest_peak(storage)
    answer = solver(storage, Limit(seconds=20.0))
    if expected is None:
        assert answer.status is Status.INFEASIBLE
        return
    assert not faults(storage, answer.best)
    assert answer.bound <= expected == pytest.approx(peak_of(storage, answer.best), rel=1e-9)
    assert (answer.status is Status.OPTIMAL) == (answer.bound == peak_of(storage, answer.best))
    if solver is cpsat.solve or expected < 1000:
        assert answer.status is Status.OPTIMAL
        assert peak_of(storage, answer.best) == expected
        assert solver(storage, Limit(expected, 20.0)).status is Status.OPTIMAL
        assert not expected or solver(storage, Limit(expected - 1, 20.0)).status is Status.INFEASIBLE


@pytest.mark.parametrize("seed", range(6))
def test_the_integer_program_knows_large_rectangles(seed):
    """Ten buffers of 2^30 bytes and more: the optimum, or a bound that is none too high; never two that overlap."""
    storage, _ = cut_rectangle(10, seed, height=2**30)
    answer = mip.solve(storage, Limit(seconds=5.0))
    assert answer.best is None or not faults(storage, answer.best)
    assert answer.bound <= 2**30
    assert answer.status is not Status.OPTIMAL or peak_of(storage, answer.best) == 2**30


def test_the_integer_program_stops_while_it_is_written_down(monkeypatch):
    """The clock is read for each buffer: where the pairs alone take too long, nothing is solved."""
    looks = count_looks(monkeypatch, "memplan.solvers.storage.mip")
    storage, _ = cut_rectangle(60, 5, fray=0.3)
    assert mip.solve(storage, Limit(seconds=10.0)).status is Status.UNKNOWN
    assert looks() == 12


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
    assert small.bound == storage.bound if storage.alignment == 1 else small.bound >= storage.bound
    offset = lowest_first(small)
    assert not faults(storage, offset[root] + base)
    assert peak_of(small, offset) == peak_of(storage, offset[root] + base)


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
        assert peak_of(storage, solve(storage, Limit(seconds=5)).best) == 2**40


@EASY
@given(storages(most=8, empty=False), st.data())
def test_the_checker_agrees_with_all_pairs(storage, data):
    """The sweep finds a clash exactly where some pair clashes."""
    offset = [data.draw(st.integers(0, 20)) for _ in range(len(storage))]
    owner = np.repeat(np.arange(len(storage)), np.diff(storage.start))
    places = [(int(low), int(high), offset[i], int(storage.size[i]), int(i))
              for low, high, i in zip(storage.lower, storage.upper, owner, strict=True)]  # fmt: skip
    overlaps = [fault for fault in faults(storage, np.array(offset)) if "overlap" in fault]
    assert (first_clash(places) is not None) == bool(overlaps)


def count_looks(monkeypatch, module: str):
    """Give a module a clock that is a second later at each look; returns what tells how often it was looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    return lambda: next(ticks)


@pytest.mark.parametrize("many", [150, 400])
def test_the_search_looks_at_the_clock_often_enough(monkeypatch, many):
    """Between two looks it visits no more nodes than a slice has, however many it may try before it starts anew."""
    looks = count_looks(monkeypatch, "memplan.solvers.storage.canonical")
    storage, _ = cut_rectangle(many, 5, fray=0.3)
    search = PlacementSearch(storage)
    assert search.fit(storage.bound, 6.0)[0] == STOPPED
    used = looks()
    assert used <= 9
    assert 0 < search.nodes <= used * (SLICE // many)


@pytest.mark.parametrize("nodes", [1, 7, 100])
def test_looking_at_the_clock_changes_nothing(monkeypatch, nodes):
    """A search that pauses after so many nodes goes on as if it had not."""
    storage, _ = cut_rectangle(40, 5, fray=0.3)
    found = []
    for slice_ in (10**9, nodes * len(storage)):
        monkeypatch.setattr("memplan.solvers.storage.canonical.SLICE", slice_)
        search = PlacementSearch(storage)
        rank, _ = next(search.ranks())
        got, offset = search.once(rank, storage.bound, 3000, time.monotonic() + 60)
        found.append((got, search.nodes, search.state.blame.tolist(), offset.tolist() if got == SOLVED else []))
    assert found[0] == found[1]


def test_empty_buffers_are_in_nobodys_way():
    """With one that is live all the time the optimum is that without; all empty, the peak is 0; the search refuses them."""
    storage = make([5, 0, 5, 3], [[(1, 4)], [(0, 5)], [(4, 5), (6, 8)], [(2, 5)]], alignment=4)
    for solver in map(method, METHODS):
        answer = solver(storage, Limit(seconds=5.0))
        assert (answer.status, answer.bound, peak_of(storage, answer.best)) == (Status.OPTIMAL, 9, 9)
        assert solver(storage, Limit(9, 5.0)).status is Status.OPTIMAL
        empty = solver(make([0, 0], [[(0, 2)], [(1, 3)]], [-1, 7]), Limit(seconds=5.0))
        assert (empty.status, empty.bound, empty.best.tolist()) == (Status.OPTIMAL, 0, [0, 7])
    with pytest.raises(ValueError, match="empty"):
        PlacementSearch(storage)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ({"size": [1, -1]}, "buffer 1 has a negative size"),
        ({"spans": [[(0, 1)], []]}, "buffer 1 is never live"),
        ({"spans": [[(3, 3)], [(0, 9)]]}, "buffer 0 has an empty span"),
        ({"spans": [[(0, 1)], [(4, 5), (1, 2)]]}, "buffer 1 has spans"),
        ({"spans": [[(0, 1)], [(0, 2), (2, 3)]]}, "buffer 1 has spans"),
        ({"pin": [-1, -2]}, "buffer 1 is pinned below 0"),
        ({"pin": [-1, 6], "alignment": 4}, "buffer 1 is pinned to no multiple"),
        ({"size": [LIMIT, 1]}, "2\\^62"),
        ({"size": [LIMIT - 2, 2]}, "2\\^62"),
        ({"pin": [2**63 - 4, -1]}, "2\\^62"),
        ({"alignment": 2**61}, "2\\^62"),
    ],
)
def test_what_is_no_problem_is_refused(problem, said):
    """In one line, with the buffer's number; a buffer without a life would crash what is compiled."""
    with pytest.raises(ValueError, match=said):
        make(**{"size": [1, 1], "spans": [[(0, 2)], [(1, 3)]], **problem})


def test_just_below_the_limit():
    """Nothing overflows in a problem of 2^62 - 1 bytes."""
    storage = make_storage([0, 1, 2], [9, 9, 9], [2**61, 2**60, 2**60 - 1])
    for solver in (solve, mip.solve):
        answer = solver(storage, Limit(seconds=5.0))
        assert peak_of(storage, answer.best) == LIMIT - 1
        assert not faults(storage, answer.best)
    assert solve(storage, Limit(LIMIT - 2, 1.0)).status is Status.INFEASIBLE


@pytest.mark.parametrize("size", [[4, 1], [1, 4]])
def test_of_two_joined_the_larger_counts(size):
    """Padded to 4 bytes one takes the other's place; what they come to is the 4 of the larger, whichever is first."""
    small, _, _ = coalesce(make(size, [[(0, 3)], [(3, 5)]], alignment=4))
    assert small.size.tolist() == [4]


def test_a_gap_is_room_for_others():
    """A buffer lies inside another's gap at the same address."""
    storage = make([4, 4], [[(0, 2), (6, 9)], [(2, 6)]])
    assert solve(storage, Limit()).bound == 4
    assert peak_of(storage, solve(storage, Limit()).best) == 4


def test_twins_and_seeds_do_not_change_the_answer():
    """Many equal buffers are one choice; the same seed gives the same nodes."""
    storage = make([3] * 12 + [5], [[(0, 4)]] * 12 + [[(2, 6)]])
    counts = set()
    for _ in range(2):
        search = PlacementSearch(storage, seed=3)
        assert search.fit(storage.bound - 1, time.monotonic() + 20)[0] == NONE
        counts.add((search.restarts, search.nodes))
    assert len(counts) == 1
    assert next(iter(counts))[1] < 100


def test_nothing_to_place():
    """No buffers: a peak of zero."""
    assert solve(make([], []), Limit()).status is Status.OPTIMAL


def test_too_many_buffers_are_not_searched(monkeypatch):
    """Beyond what the search takes, the answer is greedy and says so."""
    monkeypatch.setattr("memplan.solvers.storage.allocate.MANY", 10)
    storage, _ = cut_rectangle(60, 5, fray=0.3)
    answer = solve(storage, Limit(seconds=1), merge=False)
    assert answer.status is Status.FEASIBLE
    assert not faults(storage, answer.best)


@pytest.mark.parametrize("capacity", [None, 2**40])
def test_frayed_rectangles_of_sixty_are_solved(capacity):
    """A problem that needs the search."""
    storage, _ = cut_rectangle(60, 5, fray=0.1)
    answer = solve(storage, Limit(capacity, 30))
    assert answer.status is Status.OPTIMAL
    assert not faults(storage, answer.best)

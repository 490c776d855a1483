"""Scratchpads: the fast method against brute force and against COSMA's own program, over all orders."""

import heapq
import itertools
import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mappings import fewest_bytes, make_problem, orders, problems, replayed
from memplan.planner.ir.referee import first_clash
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.programs.cpsat import make_solver
from memplan.solvers.programs.linear import Outcome
from memplan.solvers.programs.names import NAMES, why_not
from memplan.solvers.scratchpad import cosma, walls
from memplan.solvers.scratchpad.again import solve_again
from memplan.solvers.scratchpad.ordered import solve_ordered
from memplan.solvers.scratchpad.orders import beam
from memplan.solvers.scratchpad.overlap import least_time
from memplan.solvers.scratchpad.peakorder import PeakWalk, find_order
from memplan.solvers.scratchpad.placed import solve_placed
from memplan.solvers.scratchpad.problem import (
    Mapped,
    Residency,
    cost_of,
    fault,
    verdict,
    with_capacity,
)
from memplan.solvers.scratchpad.replacement import ARENAS, POLICIES, baseline, stays
from memplan.solvers.scratchpad.spm import (
    best_of,
    join,
    peaks,
    smallest_peak_order,
    solve,
    solve_part,
)
from memplan.solvers.scratchpad.waists import cut
from memplan.solvers.scratchpad.walls import WallModel, arrange
from memplan.solvers.storage.problem import peak_of
from ortools.sat.python import cp_model


@settings(max_examples=60, deadline=None)
@given(problems(14))
def test_the_fast_method_is_as_good_as_brute_force(problem):
    """The fewest bytes over all orders, proven, and its own count of them is what a replay counts."""
    answer = solve(problem, Limit(seconds=20.0))
    found = answer.found
    assert found.bytes == answer.bound == fewest_bytes(problem)
    assert found.bytes == cost_of(problem, found.dropped) == replayed(problem, list(found.order), found.dropped)


@settings(max_examples=60, deadline=None)
@given(problems(11))
def test_walls_end_at_the_optimum(problem):
    """From any mapping of any order and with nothing known, with proof."""
    answer = walls.solve(problem, Limit(seconds=20.0))
    found = answer.found
    assert found.bytes == answer.bound == fewest_bytes(problem)
    assert found.bytes == replayed(problem, list(found.order), found.dropped)


@settings(max_examples=60, deadline=None)
@given(problems(7), st.data())
def test_fewer_walls_bound_from_below(problem, data):
    """Whichever ops are walls, the program asks for no more than the best mapping moves, and more walls ask for no less."""
    chosen_walls = data.draw(st.lists(st.integers(0, len(problem.reads) - 1), min_size=1, unique=True))
    wanted = fewest_bytes(problem)
    costs = []
    for chosen in (chosen_walls[:-1], chosen_walls):
        if chosen:
            model, solver = WallModel(problem, chosen, 0, 10**6), make_solver(20.0, 0)  # no bound that would hide a worse one
            assert solver.solve(model.model) == cp_model.OPTIMAL
            costs.append(solver.objective_value)
            order = arrange(problem, chosen, model.times(solver))
            step = {op: number for number, op in enumerate(order)}
            assert sorted(order) == list(range(len(order)))
            assert all(step[other] < step[op] for op, others in enumerate(problem.before) for other in others)
            times = model.times(solver)
            assert [times[op] for op in order] == sorted(times)
    assert costs == sorted(costs)
    assert costs[-1] <= wanted


@settings(max_examples=25, deadline=None)
@given(problems(5))
def test_cosmas_program_has_the_same_optimum(problem):
    """With addresses, through both solvers."""
    found = solve(problem, Limit(seconds=20.0)).found
    for solver in (None, "highs"):
        answer = cosma.solve(problem, Limit(seconds=60.0, solver=solver))
        assert answer.status is Status.OPTIMAL
        assert found.bytes == answer.found.bytes == answer.bound
        assert not fault(problem, answer.found)


@settings(max_examples=20, deadline=None)
@given(problems(14))
def test_larger_graphs_have_cosmas_optimum_too(problem):
    """Through CP-SAT; and brute force agrees."""
    answer = solve(problem, Limit(seconds=60.0))
    assert answer.found.bytes == answer.bound == fewest_bytes(problem)
    wanted = cosma.solve(problem, Limit(seconds=120.0))
    assert wanted.status is not Status.OPTIMAL or wanted.found.bytes == answer.bound


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 7))
def test_no_order_has_a_smaller_peak(seed, ops):
    """The order found has the smallest peak of all, by trying them."""
    problem = make_problem(random.Random(seed), ops)
    order, peak, proven = find_order(problem)
    walk = PeakWalk(problem)
    assert proven
    assert peak == walk.peak_of(order) == min(walk.peak_of(list(each)) for each in orders(problem))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_at_the_smallest_peak_nothing_moves(seed, ops):
    """And one byte less is more than nothing, unless an op alone wants as much."""
    problem = make_problem(random.Random(seed), ops)
    low, high = peaks(problem)
    assert solve(with_capacity(problem, high), Limit()).found.bytes == 0
    assert PeakWalk(problem).peak_of(smallest_peak_order(problem)) == high
    assert solve(with_capacity(problem, low - 1), Limit()).status is Status.INFEASIBLE
    if low < high:
        assert solve(with_capacity(problem, high - 1), Limit(seconds=20.0)).found.bytes > 0


@settings(max_examples=40, deadline=None)
@given(problems(14))
def test_parts_are_as_good_as_the_whole(problem):
    """Waists cost nothing: parts solved apart give the optimum of all in one."""
    parts = cut(problem)
    assert [op for part in parts for op in part.ops[part.leads :]] == list(range(len(problem.reads)))
    limit = Limit(seconds=20.0)
    apart = join([(part, solve_part(part.problem, limit)) for part in parts])
    whole = solve_part(problem, limit)
    assert apart.found.bytes == apart.bound == whole.found.bytes == whole.bound
    assert replayed(problem, list(apart.found.order), apart.found.dropped) == apart.bound


def search_again(problem: Residency, order: list[int]) -> int:
    """The fewest bytes in an order, by brute force, if any op may run again before any step."""
    size, made = problem.size, problem.producer
    start = (0, frozenset[int](), frozenset[int](), frozenset[int]())  # step, resident, stored, loaded or made before
    heap, count, seen = [(0, 0, start)], itertools.count(1), set()
    while heap:
        cost, _, state = heapq.heappop(heap)
        if state in seen:
            continue
        seen.add(state)
        step, resident, stored, known = state
        if step == len(order):
            return cost

        def add(more, *state, so_far=cost):
            heapq.heappush(heap, (so_far + more, next(count), state))

        for buffer in resident:  # leaves, for nothing or with a store
            add(0, step, resident - {buffer}, stored, known)
            if problem.fresh[buffer] and buffer not in stored:
                add(size[buffer], step, resident, stored | {buffer}, known)
        for buffer in known - resident:  # comes back
            if buffer in stored or not problem.fresh[buffer]:
                add(size[buffer], step, resident | {buffer}, stored, known)
        for op in (*order[:step], order[step]):
            held = resident | {*problem.writes[op]}
            first = {b for b in problem.reads[op] if made[b] < 0 and b not in known}
            if {*problem.reads[op]} <= resident | first and sum(size[b] for b in held | first) <= problem.capacity:
                add(0, step + (op == order[step]), held | first, stored, known | held | first)
    raise AssertionError("nothing fits")


@settings(max_examples=40, deadline=None)
@given(problems(5))
def test_ops_run_again_spare_bytes(problem):
    """No fewer than brute force finds, and no more than without."""
    start = solve_ordered(problem, list(range(len(problem.reads))), Limit())
    answer = solve_again(problem, Limit(), start, range(len(problem.reads)))
    found, least = answer.found, search_again(problem, list(start.found.order))
    assert answer.bound <= least <= found.bytes <= start.found.bytes
    assert found.bytes == cost_of(problem, found.dropped)
    assert bool(found.again) == (found.bytes < start.found.bytes)
    assert solve_again(problem, Limit(), start, ()) == start


def test_a_bound_without_repetition_is_none_with_it():
    """An op with two results is left alone, so nothing is run again; but it might be, and then less would move."""
    chain = Residency((4, 8, 9, 9, 8, 1), ((0,), (1, 5), (2,), (3, 1)), ((1, 5), (2,), (3,), (4,)), 25)
    start = solve(chain, Limit())
    assert start.bound == start.found.bytes > search_again(chain, list(start.found.order))
    assert solve_again(chain, Limit(), start, range(4)) == verdict(start.found, 0, start.method)


def lying(problem: Residency, found: Mapped, places: dict[tuple[int, int], int]) -> list[tuple[int, int, int, int, int]]:
    """Each stay in the scratchpad as (lower, upper, offset, size, buffer), in steps."""
    rows: list[list[int]] = []
    current: dict[int, int] = {}
    for step, op in enumerate(found.order):
        for buffer in (*problem.reads[op], *problem.writes[op]):
            if (buffer, step) in places:
                current[buffer] = len(rows)
                rows.append([step, step + 1, places[buffer, step], problem.size[buffer], buffer])
            rows[current[buffer]][1] = step + 1
    return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]


@settings(max_examples=40, deadline=None)
@given(problems(8), st.sampled_from([1, 4]))
def test_residency_with_addresses(problem, alignment):
    """Nothing overlaps or ends beyond the capacity, bytes are those counted, and no fewer than without addresses."""
    start = solve(problem, Limit())
    answer = solve_placed(problem, Limit(seconds=20.0), start, alignment)
    if answer.best is None:  # only where alignment asks for more than there is
        assert any(size % alignment for size in problem.size)
        return
    mapped, places = answer.best.mapped, answer.best.addresses
    rows = lying(problem, mapped, places)
    assert first_clash(rows) is None
    assert all(offset % alignment == 0 and offset + size <= problem.capacity for _, _, offset, size, _ in rows)
    assert (
        start.bound <= mapped.bytes == cost_of(problem, mapped.dropped) == replayed(problem, list(mapped.order), mapped.dropped)
    )


def test_the_topmost_needs_no_padding():
    """5 bytes at 4 end at 9, the capacity, though padded to 8 they would not."""
    problem = Residency((5, 3), ((0,),), ((1,),), 9)
    start = solve_ordered(problem, [0], Limit())
    assert solve_placed(problem, Limit(seconds=5.0), start, 4).found.addresses == {(0, 0): 4, (1, 0): 0}


class Clock:
    """A clock that somebody moves, and that may tick by itself."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def monotonic(self) -> float:
        """The time."""
        self.now += self.tick
        return self.now


def test_orders_share_the_time(monkeypatch):
    """Three residencies that each take all they are given take no longer than they may together."""
    clock = Clock()
    problem = make_problem(random.Random(1), 6)

    def slow(problem, order, limit):
        clock.now += limit.seconds
        return verdict(Mapped(tuple(order), frozenset(), 1), 0)

    monkeypatch.setattr("memplan.solvers.scratchpad.spm.time", clock)
    monkeypatch.setattr("memplan.solvers.scratchpad.spm.solve_ordered", slow)
    best_of(problem, [list(range(6))] * 3, 6.0, Limit())
    assert clock.now == 6.0


def test_searches_for_an_order_keep_their_time(monkeypatch):
    """Few looks at the clock after it is up; an order all the same; and a better one when there is time."""
    problem = with_capacity(make_problem(random.Random(5), 40), 30)
    everything = list(range(len(problem.reads)))
    for module, narrow in (("peakorder", lambda until: find_order(problem, until=until)[0]),
                           ("orders", lambda until: beam(problem, 60, until))):  # fmt: skip
        clock = Clock(1.0)
        monkeypatch.setattr(f"memplan.solvers.scratchpad.{module}.time", clock)
        assert sorted(narrow(3.0)) == everything
        assert clock.now <= 3 + 2 * len(everything)
        assert sorted(narrow(1e9)) == everything
    assert not find_order(make_problem(random.Random(6), 40), until=3.0)[2]
    assert find_order(make_problem(random.Random(6), 40), until=1e9)[2]


@settings(max_examples=60, deadline=None)
@given(problems(10), st.sampled_from(sorted(POLICIES)), st.sampled_from(sorted(ARENAS)))
def test_rules_are_never_better_than_the_optimum_of_their_order(problem, policy, arena):
    """Whatever is thrown out, and whatever places it."""
    order = list(range(len(problem.reads)))
    best = solve_ordered(problem, order, Limit())
    moved = baseline(problem, order, policy, arena)
    assert best.found.bytes == best.bound
    assert moved is None or moved >= best.bound


@settings(max_examples=25, deadline=None)
@given(problems(10), st.sampled_from([1, 4096, 2**30 + 1]))
def test_linear_programs_choose_as_cp_sat_does(problem, grain):
    """In an order, through every solver that is installed: the same bytes, proven, and what is dropped makes room; of gigabytes
    too."""
    order = list(range(len(problem.reads)))
    problem = replace(problem, size=tuple(size * grain for size in problem.size), capacity=problem.capacity * grain)
    wanted = solve_ordered(problem, order, Limit()).found
    for solver in (name for name in NAMES if not why_not(name)):
        answer = solve_ordered(problem, order, Limit(seconds=20.0, solver=solver))
        assert (answer.found.bytes, answer.bound) == (wanted.bytes, wanted.bytes)
        assert replayed(problem, order, answer.found.dropped) == wanted.bytes


def test_a_residency_that_a_solver_rounds_is_made_to_fit(monkeypatch):
    """Values that are a hair off, as floating point has it, free a byte too few: one more gap goes, and the bound stays."""
    chain = Residency((4, 8, 9, 9, 8), ((0,), (1,), (2,), (3, 1)), ((1,), (2,), (3,), (4,)), 25)
    short = Outcome(Status.OPTIMAL, np.zeros(2), 2.0)
    monkeypatch.setattr("memplan.solvers.programs.linear.solve", lambda *_, **__: short)
    answer = solve_ordered(chain, range(4), Limit(solver="highs"))
    assert (answer.found.dropped, answer.found.bytes, answer.bound) == ({(1, 3)}, 16, 16)


def test_a_chain_with_a_skip():
    """Worked by hand: the skipped value waits outside, stored once and loaded once."""
    problem = Residency((4, 8, 8, 8), ((0,), (1,), (2, 1)), ((1,), (2,), (3,)), 24)
    assert peaks(problem) == (24, 24)
    chain = Residency((4, 8, 9, 9, 8), ((0,), (1,), (2,), (3, 1)), ((1,), (2,), (3,), (4,)), 25)
    assert peaks(chain) == (25, 26)
    answer = solve(chain, Limit())
    found = answer.found
    assert (found.bytes, answer.bound, found.dropped) == (16, 16, {(1, 3)})
    assert peak_of(stays(chain, found), stays(chain, found).lower * 0) <= 25
    # run again, right before the last op, the first needs the input, 4, which has room beside the others until then
    again = solve_again(chain, Limit(), answer, range(4)).found
    assert (again.bytes, again.dropped, again.again) == (0, frozenset(), {(1, 3)})
    assert solve_again(chain, Limit(), answer, (1, 2, 3)) == verdict(found, 0, answer.method)
    # 4 to load the input and 1 to run; the skipped value leaves, 8 after that, before the third op has room; it runs until
    # 14; beside it there is no room for the load, 8 more; and the last op, 1
    assert least_time(chain, found, [1.0] * 4, chain.size, chain.size) == 23.0
    roomy = with_capacity(chain, 26)
    assert least_time(roomy, Mapped(found.order, frozenset(), 0), [1.0] * 4, chain.size, chain.size) == 8.0

"""Order and residency by best-first search over what has run, what is resident and what has been stored.

A value leaves only when room is needed, for an eviction may always wait until then; what leaves pays at once for its
store and for the load that must follow, and what must be out when some op to come runs counts as if it had left. The cheapest
state is looked at first, and when the search is cut short the cheapest one left is a bound over all orders. Among
equals the one with most ops done comes first: where nothing presses, the search walks straight through. A state is
passed over if another with the same ops done could throw out what it lacks and not have paid more.

An op that needs no room and leaves none less, whose dying operands have no copy outside and are no smaller than its
result, runs at once: whatever an order that waits would throw out of its operands, its result is cheaper to throw out.
"""

import heapq
import itertools
import math
import time

from . import ordered
from .peakorder import unroll
from .problem import Answer, Limit, Mapped, Residency, verdict
from .waists import descendants

STATES = 1_000_000  # looked at, at most: half a kilobyte each, and some more that wait
WIDE = 14  # values that might leave for one op: with more, their sets are too many to look at
# least cost of any end, ops done (negative), cost, and as bits: done, resident, stored, ready; ops as a linked list
State = tuple[int, int, int, int, int, int, int, tuple]


def solve(problem: Residency, limit: Limit) -> Answer[Mapped, int]:
    """Best first over all orders, from the best of the base order on."""
    until = time.monotonic() + limit.seconds
    start = ordered.solve(problem, limit)
    if start.best is None:
        return start
    return BestFirst(problem, start.best, solver=limit.solver).run(until - time.monotonic(), limit.seed)


class StateSpace:
    """States as bits, and the moves between them."""

    def __init__(self, problem: Residency):
        self.problem, self.size = problem, problem.size
        self.count = len(problem.reads)
        self.before = [mask(ops) for ops in problem.before]
        self.readers = [mask(ops) for ops in problem.readers]
        self.needs = [mask({*reads, *writes}) for reads, writes in zip(problem.reads, problem.writes, strict=True)]
        self.reads = [mask(reads) for reads in problem.reads]
        self.writes = [mask(writes) for writes in problem.writes]
        self.fresh = mask(buffer for buffer, fresh in enumerate(problem.fresh) if fresh)
        self.after: list[list[int]] = [[] for _ in range(self.count)]
        for op, others in enumerate(problem.before):
            for other in others:
                self.after[other].append(op)
        later = descendants(problem.before)
        self.forced = [  # by which ops each buffer is forced out, if it is there before them
            mask(
                op
                for op in range(self.count)
                if problem.need[op] + size > problem.capacity and not self.needs[op] >> buffer & 1
                and self.readers[buffer] & later[op]
            )
            for buffer, size in enumerate(self.size)
        ]  # fmt: skip
        self.known: dict[int, int] = {}

    def bytes_of(self, buffers: int) -> int:
        """Of a set."""
        total = self.known.get(buffers)
        if total is None:
            total = self.known[buffers] = sum(self.size[buffer] for buffer in bits(buffers))
        return total

    def alive(self, buffers: int, done: int) -> int:
        """Those of a set that somebody still reads."""
        rest, kept = buffers, 0
        while rest:
            low = rest & -rest
            if self.readers[low.bit_length() - 1] & ~done:
                kept |= low
            rest ^= low
        return kept

    def covers(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
        """Whether a state may throw out what another lacks and then has stored no less, for no more."""
        if other[1] & ~one[1]:
            return False
        extra = one[1] & ~other[1]
        if other[2] & ~(one[2] | extra & self.fresh):
            return False
        return one[0] + self.price(extra, one[2]) <= other[0]

    def price(self, gone: int, stored: int) -> int:
        """Bytes that throwing out a set costs: its loads, and the stores of what has not been stored."""
        return self.bytes_of(gone) + self.bytes_of(gone & self.fresh & ~stored)

    def due(self, done: int, resident: int, stored: int) -> int:
        """Bytes that are bound to be moved: what is resident and must be out when some op still to come runs."""
        out = mask(buffer for buffer in bits(resident) if self.forced[buffer] & ~done)
        return self.price(out, stored) if out else 0

    def leaves(self, idle: int, short: int) -> list[int]:
        """The sets of idle buffers that free enough and would not without any one of them."""
        members = sorted(bits(idle), key=lambda buffer: -self.size[buffer])
        found = []
        for many in range(1, len(members) + 1):
            for chosen in itertools.combinations(members, many):
                freed = sum(self.size[buffer] for buffer in chosen)
                if freed >= short > freed - min(self.size[buffer] for buffer in chosen):
                    found.append(mask(chosen))
        return found


def mask(members) -> int:
    """A set of numbers as bits."""
    return sum(1 << member for member in set(members))


def bits(found: int) -> list[int]:
    """The members of a set."""
    members = []
    while found:
        low = found & -found
        members.append(low.bit_length() - 1)
        found ^= low
    return members


class BestFirst:
    """Best first over all orders, as long as it is told to, and on from there.

    Attributes:
        best: the best mapping known; states that cost as much are not looked at.
        bound: no order moves fewer bytes.
        over: whether looking on is of no use.
        solver: of the residency of an order that is found; see `solve_ordered`.
    """

    def __init__(self, problem: Residency, best: Mapped, states: int = STATES, solver: str | None = None):
        self.problem, self.best, self.left, self.solver = problem, best, states, solver
        self.walk, self.bound, self.over = StateSpace(problem), 0, False
        ready = mask(op for op in range(self.walk.count) if not self.walk.before[op])
        self.heap: list[State] = [(0, 0, 0, 0, 0, 0, ready, ())]
        self.seen: dict[int, list[tuple[int, int, int]]] = {}

    def run(self, seconds: float, seed: int = 0) -> Answer[Mapped, int]:
        """The best found, with a bound over all orders.

        Args:
            seconds: to search for, at most.
            seed: of the residency of the order that is found.
        """
        until, full = time.monotonic() + seconds, (1 << self.walk.count) - 1
        while self.heap and not self.over:
            if not self.left or time.monotonic() > until:
                break
            least, _, cost, done, resident, stored, ready, path = heapq.heappop(self.heap)
            self.bound = max(self.bound, min(least, self.best.bytes))
            self.over = least >= self.best.bytes or done == full
            if done == full and least < self.best.bytes:
                left = max(until - time.monotonic(), 1.0)
                limit = Limit(seconds=left, seed=seed, solver=self.solver)
                found = ordered.solve_ordered(self.problem, unroll(path), limit).found
                self.best = found if found.bytes < self.best.bytes else self.best
            if not self.over and not seen_better(self.walk, self.seen, cost, done, resident, stored):
                self.left -= 1
                following = moves(self.walk, cost, done, resident, stored, ready, path)
                self.over = following is None
                for move in following or ():
                    if move[0] < self.best.bytes:
                        heapq.heappush(self.heap, move)
        if not self.heap and not self.over:  # all that is left costs as much as the best
            self.bound = self.best.bytes
        return verdict(self.best, min(self.bound, self.best.bytes), "best first")


def seen_better(
    walk: StateSpace, seen: dict[int, list[tuple[int, int, int]]], cost: int, done: int, resident: int, stored: int
) -> bool:
    """Whether a state with the same ops done is no worse than this one, which is remembered if not."""
    others = seen.setdefault(done, [])
    if any(walk.covers(other, (cost, resident, stored)) for other in others):
        return True
    others.append((cost, resident, stored))
    return False


def beam(problem: Residency, width: int, until: float = math.inf) -> list[int]:
    """An order by the same moves, of which only the cheapest few are kept for each number of ops; one each when time is up."""
    walk = StateSpace(problem)
    levels: list[list[State]] = [[] for _ in range(walk.count + 1)]
    levels[0].append((0, 0, 0, 0, 0, 0, mask(op for op in range(walk.count) if not walk.before[op]), ()))
    for level in levels[:-1]:
        seen: dict[int, list[tuple[int, int, int]]] = {}
        kept = 0
        for _, _, cost, done, resident, stored, ready, path in sorted(
            level, key=lambda each: (each[0], walk.bytes_of(each[4]))
        ):
            if seen_better(walk, seen, cost, done, resident, stored):
                continue
            for move in moves(walk, cost, done, resident, stored, ready, path) or ():
                levels[-move[1]].append(move)
            kept += 1
            if kept == width or time.monotonic() > until:
                break
        level.clear()
    return unroll(min(levels[-1])[-1]) if levels[-1] else list(range(walk.count))


def moves(walk: StateSpace, cost: int, done: int, resident: int, stored: int, ready: int, path: tuple) -> list[State] | None:
    """The states after one more op; one alone, where an op may run at once; None where too many sets might leave."""
    made: list[State] = []

    def state(price: int, now: int, kept: int, still: int, following: int, op: int) -> State:
        due = walk.due(now, kept, still)
        return cost + price + due, -now.bit_count(), cost + price, now, kept, still, following, (op, path)

    used = walk.bytes_of(resident)
    for op in bits(ready):
        needs = walk.needs[op]
        now = done | 1 << op
        more = used + walk.bytes_of(needs & ~resident) - walk.problem.capacity
        following = ready & ~(1 << op) | mask(each for each in walk.after[op] if not walk.before[each] & ~now)
        missing = walk.reads[op] & ~resident
        if more <= 0:
            kept = walk.alive(resident | needs, now)
            one = state(0, now, kept, walk.alive(stored, now), following, op)
            dying = bits(resident & ~kept)
            small = walk.bytes_of(walk.writes[op] & kept)
            if not missing and dying and small <= min(walk.size[buffer] for buffer in dying):
                if not mask(dying) & (stored | ~walk.fresh):
                    return [one]
            made.append(one)
            continue
        if (resident & ~needs).bit_count() > WIDE:
            return None
        for gone in walk.leaves(resident & ~needs, more):
            kept = walk.alive(resident & ~gone | needs, now)
            still = walk.alive(stored | gone & walk.fresh, now)
            made.append(state(walk.price(gone, stored), now, kept, still, following, op))
    return made

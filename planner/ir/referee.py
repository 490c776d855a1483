"""The referee: replays a schedule on a machine and accepts it, or names the first rule it breaks.

It shares no code with what it judges: it knows the nouns and nothing of passes, solvers or backends, keeps its own
books, and does everything in the obvious way.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import NoReturn

import msgspec

from .errors import InvalidSchedule
from .machine import Machine
from .program import Phase, Program
from .schedule import Free, Placement, Run, Schedule, Start

RULES = {
    "bound": "the schedule carries the digest of this program",
    "range": "every op, buffer, unit, tier and link named exists",
    "read": "what an op reads or changes lies, complete, in the tier its unit reads, and what it changes is not being copied",
    "fresh": "a buffer that is live is not made a second time",
    "written": "an op keeps only buffers that it writes",
    "once": "an op that may not be repeated runs once",
    "stale": "nothing reads a resident buffer's old contents after they have been changed",
    "reuse": "bytes are taken over only where the op can, from a buffer the step owns, of the same size",
    "random": "ops that draw random numbers run for the first time in base order, for they share one stream",
    "free": "only a live buffer is freed, never one the caller owns or is given, never one in flight",
    "order": "the loss follows the forward pass, but for what can be repeated and so may wait; the update follows everything",
    "copy": "a copy starts from a live buffer, and is waited for once, where it was started",
    "home": "a resident buffer whose home is another tier lies there before the step and after it, with its last contents, "
    "and is changed only on the device; an output with such a home lies there, and there alone, after the step",
    "complete": "every op runs",
    "outputs": "every output is live at the end",
    "lent": "only an output with an address is lent",
    "leak": "nothing else is live at the end",
    "capacity": "the bytes live in a tier never exceed its capacity",
    "place": "addresses are aligned and inside the tier, and no two buffers share any while both live",
    "placed": "where addresses are planned, each buffer that the step makes and keeps to itself has one, from first to last, "
    "or is named as lying outside of them",
}


class Report(msgspec.Struct, frozen=True):
    """What the replay measured.

    Attributes:
        peak: the largest number of live bytes in each tier.
        time: the makespan in seconds: when the last instruction ends.
        moved: bytes carried by each link.
        timeline: live bytes in the first tier while each instruction runs.
        starts: when each instruction starts, in seconds.
        repeated: how many runs of an op were not its first.
        recompute: seconds spent in them.
    """

    peak: tuple[int, ...]
    time: float
    moved: tuple[int, ...]
    timeline: tuple[int, ...]
    starts: tuple[float, ...]
    repeated: int
    recompute: float


def referee(program: Program, machine: Machine, schedule: Schedule, budget: int | None = None) -> Report:
    """Replay `schedule`.

    Where addresses are planned, a tier's bytes are those up to the highest address, the whole step long, and beside them
    what lies elsewhere: resident buffers, outputs from when they are made, if they are not lent, workspaces, and what the
    schedule says lies outside.

    Args:
        program: what is computed.
        machine: what it runs on; the first tier is the device's memory, where resident buffers are.
        schedule: the claim.
        budget: bytes allowed in the first tier, if fewer than its capacity; resident buffers count.

    Returns:
        The peak of each tier, the makespan, and the timeline behind them.

    Raises:
        InvalidSchedule: the first rule broken, and where.
    """

    def refuse(rule: str, message: str, at: int | None = None) -> NoReturn:
        raise InvalidSchedule(rule, at, message)

    if schedule.program != program.digest:
        refuse("bound", f"it was made for program {schedule.program[:12]}, this one is {program.digest[:12]}")
    size = [buffer.bytes for buffer in program.buffers]
    name = [buffer.name for buffer in program.buffers]
    made_by = program.producer
    resident = {buffer for buffer, op in enumerate(made_by) if op < 0}
    home = homes_of(machine, schedule, resident | set(program.outputs))
    live: list[set[int]] = [set() for _ in machine.tiers]
    for buffer in resident:
        live[home.get(buffer, 0)].add(buffer)
    used, arena = [sum(size[buffer] for buffer in alive) for alive in live], [0] * len(machine.tiers)
    outdated: set[int] = set()  # buffers whose home has their old contents
    check_places(machine, schedule, size)
    for place in schedule.placements:  # planned addresses are taken the whole step long, up to the highest
        arena[place.tier] = max(arena[place.tier], place.offset + size[place.buffer])
    used = [bytes_now + extent for bytes_now, extent in zip(used, arena, strict=True)]
    capacity = [tier.capacity for tier in machine.tiers]
    if budget is not None:
        capacity[0] = min(capacity[0], budget)
    peak = list(used)
    moved = [0] * len(machine.links)
    runs = [0] * len(program.ops)
    changed: set[int] = set()
    given = set(program.outputs) - home.keys() - set(schedule.lent)
    loose = set(schedule.outside)
    for buffer in loose:
        if not 0 <= buffer < len(size):
            refuse("range", f"buffer {buffer}, said to lie outside, does not exist")
    for buffer in schedule.lent:
        if buffer not in program.outputs or buffer in home or buffer in loose or not schedule.placements:
            refuse("lent", f"buffer {buffer} is no output with an address")
    elsewhere = given | loose
    last_draw = -1
    flying: dict[tuple[int, int], float] = {}  # (buffer, link) -> when the copy arrives
    link_free = [0.0] * len(machine.links)
    clock, recompute = 0.0, 0.0
    timeline, starts = [], []

    def counted(buffers: Iterable[int], tier: int) -> int:
        """Bytes of buffers that lie outside the planned addresses: without any, of all."""
        return sum(size[buffer] for buffer in buffers if not schedule.placements or (buffer in elsewhere and tier == 0))

    for tier, bytes_now in enumerate(used):
        if bytes_now > capacity[tier]:
            also = " with the arena" if arena[tier] else ""
            refuse("capacity", f"resident buffers alone take {bytes_now} of {capacity[tier]} bytes{also}")

    for at, step in enumerate(schedule.instructions):
        starts.append(clock)
        during = list(used)
        if isinstance(step, Run):
            if not 0 <= step.op < len(program.ops) or not 0 <= step.unit < len(machine.units):
                refuse("range", f"op {step.op} on unit {step.unit} does not exist", at)
            op = program.ops[step.op]
            tier = machine.tier_index(machine.units[step.unit].tier)
            landing = {buffer for buffer, link in flying if machine.tier_index(machine.links[link].target) == tier}
            for buffer in op.reads:
                if buffer not in live[tier] or buffer in landing:
                    refuse("read", f"{op.name} reads {name[buffer]}, which is not there", at)
                if buffer in changed:
                    refuse("stale", f"{op.name} reads {name[buffer]} after it has been changed", at)
            if runs[step.op] and not op.repeatable:
                refuse("once", f"{op.name} may not be repeated", at)
            if op.random and not runs[step.op] and last_draw > step.op:
                refuse("random", f"{op.name} draws after {program.ops[last_draw].name}", at)
            last_draw = max(last_draw, step.op) if op.random and not runs[step.op] else last_draw
            if op.phase is Phase.LOSS:
                early = zip(program.ops[: program.boundary], runs, strict=False)
                late = [o.name for o, n in early if not n and (o.random or not o.repeatable)]
                if late:
                    refuse("order", f"the loss runs before {late[0]}", at)
            if op.phase is Phase.UPDATE:
                late = [o.name for o, n in zip(program.ops, runs, strict=True) if not n and o.phase is not Phase.UPDATE]
                if late:
                    refuse("order", f"the update runs before {late[0]}", at)
            if len(set(step.keep)) != len(step.keep) or not set(step.keep) <= set(op.writes):
                refuse("written", f"{op.name} cannot keep {[b for b in step.keep if b not in op.writes]}", at)
            for buffer in step.keep:
                if buffer in live[tier]:
                    refuse("fresh", f"{op.name} makes {name[buffer]}, which is live", at)
            taken: set[int] = set()
            for new, old in step.reuse:
                if (new, old) not in op.reuse or old in resident | given or size[new] != size[old]:
                    refuse("reuse", f"{op.name} cannot write {new} in place of {old}", at)
                if new not in step.keep or old not in live[tier] or old in taken or new in live[tier] or old in landing:
                    refuse("reuse", f"{op.name} takes over {name[old]}, which is not free to take", at)
                if any(buffer == old and link_of_copy(machine, link, tier) for buffer, link in flying):
                    refuse("reuse", f"{op.name} overwrites {name[old]} while it is copied out", at)
                taken.add(old)
            over = {new for new, _ in step.reuse if not schedule.placements or new not in given}
            if len({new for new, _ in step.reuse}) != len(step.reuse):
                refuse("reuse", f"{op.name} writes one buffer in place of two", at)
            during[tier] += counted((buffer for buffer in op.writes if buffer not in over), tier) + op.workspace
            live[tier] -= taken
            live[tier] |= set(step.keep)
            used[tier] += counted(step.keep, tier) - counted(taken, tier)
            for buffer in op.mutates:
                away = buffer not in live[tier] or (buffer in home and tier)
                if away or any(buffer == other for other, _ in flying):
                    rule = "home" if buffer in home else "read"
                    refuse(rule, f"{op.name} changes {name[buffer]}, which is not there, or being copied", at)
            outdated |= home.keys() & set(op.mutates)
            changed |= set(op.mutates)
            recompute += op.seconds if runs[step.op] else 0.0
            runs[step.op] += 1
            clock += op.seconds
        elif isinstance(step, Free):
            if not 0 <= step.tier < len(live) or not 0 <= step.buffer < len(size):
                refuse("range", f"buffer {step.buffer} in tier {step.tier} does not exist", at)
            if step.buffer not in live[step.tier]:
                refuse("free", f"{name[step.buffer]} is not live", at)
            if step.tier == 0 and step.buffer in (resident | given) - home.keys():
                refuse("free", f"{name[step.buffer]} is not the step's to free", at)
            if home.get(step.buffer) == step.tier or step.buffer in outdated:
                refuse("home", f"{name[step.buffer]} would be lost", at)
            for buffer, link in flying:
                ends = machine.tier_index(machine.links[link].source), machine.tier_index(machine.links[link].target)
                if buffer == step.buffer and step.tier in ends:
                    refuse("free", f"{name[step.buffer]} is being copied", at)
            live[step.tier].remove(step.buffer)
            used[step.tier] -= counted([step.buffer], step.tier)
        elif isinstance(step, Start):
            if not 0 <= step.link < len(machine.links) or not 0 <= step.buffer < len(size):
                refuse("range", f"buffer {step.buffer} over link {step.link} does not exist", at)
            link = machine.links[step.link]
            source, target = machine.tier_index(link.source), machine.tier_index(link.target)
            arriving = {b for b, other in flying if machine.tier_index(machine.links[other].target) == source}
            if step.buffer not in live[source] or step.buffer in arriving:
                refuse("copy", f"{name[step.buffer]} is not in {link.source}", at)
            returns = step.buffer in outdated and home[step.buffer] == target and source == 0
            if step.buffer in live[target] and not returns:
                refuse("fresh", f"{name[step.buffer]} is in {link.target} already", at)
            if step.buffer in outdated and not returns:
                refuse("home", f"{name[step.buffer]} has been changed, and goes home next", at)
            seconds = size[step.buffer] / link.bandwidth
            begins = max(clock, link_free[step.link]) + link.latency
            ways = [(machine.links[other].bandwidth, -other) for other in range(len(machine.links))
                    if (machine.links[other].source, machine.links[other].target) == (link.target, link.source)]  # fmt: skip
            contended = lost = 0.0
            if ways:  # both directions lose by being busy at once; the copy that comes later bears it
                other = -max(ways)[1]
                lost = min(1.0, (1 - link.duplex) + (1 - machine.links[other].duplex))
                contended = max(0.0, link_free[other] - begins)
                if seconds < (1 - lost) * contended:
                    contended = seconds / (1 - lost)
            link_free[step.link] = begins + seconds + lost * contended
            clock += link.load * seconds
            flying[step.buffer, step.link] = link_free[step.link]
            fresh = {step.buffer} - live[target]
            live[target] |= fresh
            used[target] += counted(fresh, target)
            during[target] += counted(fresh, target)
            moved[step.link] += size[step.buffer]
        else:
            if (step.buffer, step.link) not in flying:
                refuse("copy", f"no copy of buffer {step.buffer} over link {step.link} is under way", at)
            clock = max(clock, flying.pop((step.buffer, step.link)))
            if machine.tier_index(machine.links[step.link].target) == home.get(step.buffer):
                outdated.discard(step.buffer)
        for tier, bytes_now in enumerate(during):
            peak[tier] = max(peak[tier], bytes_now)
            if bytes_now > capacity[tier]:
                refuse("capacity", f"{bytes_now} bytes in {machine.tiers[tier].name}, {capacity[tier]} allowed", at)
        timeline.append(during[0])

    for op, count in zip(program.ops, runs, strict=True):
        if not count:
            refuse("complete", f"{op.name} never runs")
    if flying:
        refuse("copy", f"the copy of {name[next(iter(flying))[0]]} is never waited for")
    lost = {buffer for buffer in program.outputs if buffer not in live[home.get(buffer, 0)]}
    if lost:
        refuse("outputs", f"{name[min(lost)]} is not live at the end")
    if outdated:
        refuse("home", f"the new contents of {name[min(outdated)]} never come home")
    for tier, alive in enumerate(live):
        extra = alive - {buffer for buffer in resident | set(program.outputs) if home.get(buffer, 0) == tier}
        if extra:
            refuse("leak", f"{name[min(extra)]} is still live in {machine.tiers[tier].name} at the end")
    if schedule.placements:
        check_lives(program, machine, schedule)
    return Report(
        peak=tuple(peak),
        time=clock,
        moved=tuple(moved),
        timeline=tuple(timeline),
        starts=tuple(starts),
        repeated=sum(max(0, count - 1) for count in runs),
        recompute=recompute,
    )


def homes_of(machine: Machine, schedule: Schedule, lasting: set[int]) -> dict[int, int]:
    """The tier of each buffer that outlasts the step and does not lie on the device."""
    home = dict(schedule.homes)
    for buffer, tier in schedule.homes:
        if buffer not in lasting or not 0 < tier < len(machine.tiers):
            raise InvalidSchedule("range", None, f"buffer {buffer} cannot be at home in tier {tier}")
    if len(home) < len(schedule.homes):
        raise InvalidSchedule("home", None, "a buffer has two homes")
    return home


def link_of_copy(machine: Machine, link: int, tier: int) -> bool:
    """Whether the link reads from the tier."""
    return machine.tier_index(machine.links[link].source) == tier


def check_lives(program: Program, machine: Machine, schedule: Schedule) -> None:
    """Each life of a buffer that the step makes and keeps to itself has a placement, which spans it exactly.

    A life lasts from the instruction that makes the buffer to the one that frees it; what is written in place begins
    where the old one ends, at the same address; what a run drops at once lives for that run.
    """
    home = dict(schedule.homes)
    given = set(program.outputs) - home.keys() - set(schedule.lent)
    loose = set(schedule.outside)
    name = [buffer.name for buffer in program.buffers]
    waiting: dict[tuple[int, int, int], Placement] = {}
    for place in schedule.placements:
        if waiting.setdefault((place.buffer, place.tier, place.lower), place) is not place:
            raise InvalidSchedule("placed", place.lower, f"buffer {place.buffer} has two addresses")
    lying: dict[tuple[int, int], Placement] = {}

    def begin(buffer: int, tier: int, at: int) -> Placement:
        place = waiting.pop((buffer, tier, at), None)
        if place is None:
            raise InvalidSchedule("placed", at, f"{name[buffer]} has no address in {machine.tiers[tier].name}")
        return place

    def end(place: Placement, at: int) -> None:
        if place.upper != at:
            raise InvalidSchedule(
                "placed", at, f"{name[place.buffer]} has an address until {place.upper}, and lives until {at}"
            )

    for at, step in enumerate(schedule.instructions):
        if isinstance(step, Run):
            tier = machine.tier_index(machine.units[step.unit].tier)
            for new, old in step.reuse:
                if tier == 0 and (old in loose) != (new in loose) and new not in given:
                    raise InvalidSchedule("placed", at, f"{name[new]} is written in place of {name[old]}, which lies elsewhere")
                if tier == 0 and old in loose:
                    continue
                last = lying.pop((old, tier))
                end(last, at + 1 if new in given else at)
                if new not in given:
                    lying[new, tier] = begin(new, tier, at)
                    if lying[new, tier].offset != last.offset:
                        raise InvalidSchedule(
                            "placed", at, f"{name[new]} is written in place of {name[old]}, but lies elsewhere"
                        )
            for buffer in program.ops[step.op].writes:
                if buffer in given or (buffer in loose and tier == 0) or buffer in {new for new, _ in step.reuse}:
                    continue
                place = begin(buffer, tier, at)
                if buffer in step.keep:
                    lying[buffer, tier] = place
                else:
                    end(place, at + 1)
        elif isinstance(step, Start):
            tier = machine.tier_index(machine.links[step.link].target)
            returns = home.get(step.buffer) == tier and program.producer[step.buffer] < 0  # to where it came from
            if not returns and (tier or step.buffer not in given | loose):
                lying[step.buffer, tier] = begin(step.buffer, tier, at)
        elif isinstance(step, Free) and (step.buffer, step.tier) in lying:
            end(lying.pop((step.buffer, step.tier)), at)
    for place in lying.values():
        end(place, len(schedule.instructions))
    if waiting:
        place = next(iter(waiting.values()))
        raise InvalidSchedule(
            "placed", None, f"buffer {place.buffer} has an address from {place.lower} on, but is not made there"
        )


def check_places(machine: Machine, schedule: Schedule, size: list[int]) -> None:
    """Placements are aligned, inside their tier, and disjoint where they overlap in time."""
    of_tier: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for index, place in enumerate(schedule.placements):
        tier = machine.tiers[place.tier] if 0 <= place.tier < len(machine.tiers) else None
        if tier is None or not 0 <= place.buffer < len(size):
            raise InvalidSchedule("range", None, f"placement {index} names a tier or buffer that does not exist")
        if not place.lower < place.upper:
            raise InvalidSchedule("range", None, f"placement {index} ends at {place.upper}, no later than it begins")
        if place.offset < 0 or place.offset % tier.alignment or place.offset + size[place.buffer] > tier.capacity:
            raise InvalidSchedule("place", None, f"placement {index} at {place.offset} is unaligned or outside {tier.name}")
        of_tier.setdefault(place.tier, []).append((place.lower, place.upper, place.offset, size[place.buffer], place.buffer))
    for places in of_tier.values():
        clash = first_clash(places)
        if clash is not None:
            raise InvalidSchedule("place", None, f"buffers {clash[0]} and {clash[1]} share addresses")


def first_clash(places: Iterable[tuple[int, int, int, int, int]]) -> tuple[int, int, int] | None:
    """The first two places live at once that share bytes, and when; None if there are none.

    Time is walked through; the places live at each moment are kept by offset, so that a new one can only touch the two
    beside it.

    Args:
        places: (lower, upper, offset, size, name) of each: half-open in time and in space.
    """
    events = []
    for place in places:
        events.append((place[0], 1, place))
        events.append((place[1], 0, place))  # at one moment, what ends makes room for what begins
    live: list[tuple[int, int, int]] = []  # (offset, end, name), ascending and disjoint
    for when, begins, (_, _, offset, size, name) in sorted(events):
        row = (offset, offset + size, name)
        at = bisect_left(live, row)
        if not begins:
            live.pop(at)
            continue
        for other in live[max(at - 1, 0) : at + 1]:
            if other[0] < row[1] and row[0] < other[1]:
                return other[2], name, when
        live.insert(at, row)
    return None

"""Schedules that searches have found, kept on disk.

The smallest known of a program, so that a budget that was said to work does, in another process too: how small a schedule a
search finds depends on the time that it has, and on costs, which are measured again where other work got in the way; the
schedule itself depends on neither. And the fastest found for a budget, so that a run that is started again does not search
again. What is read is replayed by the referee like any other.
"""

import hashlib
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import msgspec

from ..cost.cache import cache_directory, write_atomically
from ..ir.errors import InvalidSchedule
from ..ir.machine import Machine
from ..ir.plan import Side, unlimited
from ..ir.program import Program
from ..ir.referee import referee
from ..ir.schedule import Schedule

MOST = 256  # files of a kind; the oldest go first
BYTES = 1 << 26  # of a schedule at most
WORSE = 0.01  # of the step that keeps everything: by so much may a schedule be slower with today's costs than when it was found
UNREADABLE = (OSError, msgspec.MsgspecError, zlib.error, InvalidSchedule, ValueError, IndexError)


class Found(msgspec.Struct, frozen=True):
    """The fastest schedule that a search has found for a budget.

    Attributes:
        schedule: itself.
        ratio: of its time to that of the ops run once, with the costs that it was found with.
        limit: seconds that the search had; None where it ended by itself.
    """

    schedule: Schedule
    ratio: float
    limit: float | None


class Asked(msgspec.Struct, frozen=True):
    """What a search was asked for, beside a program, a machine and levers.

    Attributes:
        budget: bytes.
        calls: before one backward pass.
        seed: of the search.
        solver: of integer programs; None for the default.
    """

    budget: int
    calls: int = 1
    seed: int = 0
    solver: str | None = None


def known_floor(
    program: Program,
    machine: Machine,
    levers: Collection[str],
    homes: Collection[int],
    kind: str = "",
    rebuilt: Callable[[Schedule], Program] | None = None,
) -> Side | None:
    """The smallest schedule kept for a program, of those that some of the levers reach; None where there is none.

    Args:
        program: with its costs filled in.
        machine: what it runs on.
        levers: that may be used.
        homes: buffers that may be at home elsewhere.
        kind: of schedules.
        rebuilt: the program that a schedule of this kind is of; default: `program`.
    """
    found = []
    for path in paths(program, machine, levers, kind, "floor"):
        with suppress(*UNREADABLE):
            schedule = msgspec.json.decode(unpacked(path), type=Schedule)
            if {buffer for buffer, _ in schedule.homes} <= set(homes):
                whole = program if rebuilt is None else rebuilt(schedule)
                found.append(Side(whole, schedule, referee(whole, unlimited(machine), schedule)))
    return min(found, key=lambda side: side.peak, default=None)


def has_floor(program: Program, machine: Machine, levers: Collection[str], kind: str = "") -> bool:
    """Whether the smallest schedule has been looked for with all of these levers, and not with some of them alone."""
    return list(paths(program, machine, levers, kind, "floor"))[-1].is_file()


def keep_floor(side: Side, program: Program, machine: Machine, levers: Collection[str], kind: str = "") -> None:
    """Write a schedule down; where that cannot be, a search has to find it again.

    Args:
        side: the schedule.
        program: the program that it was planned for.
        machine: likewise.
        levers: that were allowed.
        kind: of schedules.
    """
    write(list(paths(program, machine, levers, kind, "floor"))[-1], side.schedule)


def known_plan(
    program: Program, machine: Machine, levers: Collection[str], homes: Collection[int], asked: Asked, limit: float
) -> Side | None:
    """The fastest schedule found before for the same budget, if it is as good as it was then.

    Args:
        program: with its costs filled in.
        machine: what it runs on.
        levers: that may be used.
        homes: buffers that may be at home elsewhere.
        asked: what was asked for.
        limit: seconds that a search would have now.

    Returns:
        None where nothing is kept; where the search was broken off after less time than it would have now; where the referee
        refuses it; or where costs have changed so that it is no longer what was found.
    """
    with suppress(*UNREADABLE):
        found = msgspec.json.decode(unpacked(plan_path(program, machine, levers, asked)), type=Found)
        enough = found.limit is None or found.limit >= limit
        if enough and {buffer for buffer, _ in found.schedule.homes} <= set(homes):
            side = Side(program, found.schedule, referee(program, machine, found.schedule, asked.budget))
            return side if ratio_of(side) <= found.ratio + WORSE else None
    return None


def keep_plan(side: Side, machine: Machine, levers: Collection[str], asked: Asked, limit: float | None) -> None:
    """Write down the fastest schedule found for a budget, and the seconds that the search had; None if it ended by itself."""
    write(plan_path(side.program, machine, levers, asked), Found(side.schedule, ratio_of(side), limit))


def ratio_of(side: Side) -> float:
    """The time of a schedule over that of its program's ops, each run once."""
    once = sum(op.seconds for op in side.program.ops)
    return side.time / once if once else 1.0


def unpacked(path: Path) -> bytes:
    """What a file says."""
    return zlib.decompressobj().decompress(path.read_bytes(), BYTES)


def write(path: Path, what: Schedule | Found) -> None:
    """Write a file, if that can be, and let the oldest of its kind go."""
    with suppress(OSError):
        write_atomically(path, zlib.compress(msgspec.json.encode(what), 1))
        files = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda each: each.stat().st_mtime)
        for old in files[:-MOST]:
            old.unlink()


def plan_path(program: Program, machine: Machine, levers: Collection[str], asked: Asked) -> Path:
    """Where the fastest schedule for a budget lies."""
    return list(paths(program, machine, levers, repr(asked), "found"))[-1]


def paths(program: Program, machine: Machine, levers: Collection[str], kind: str, suffix: str) -> Iterator[Path]:
    """Where schedules lie that some of the levers reach; with all of them the last."""
    tiers = [(tier.name, tier.capacity, tier.rounding, tier.alignment) for tier in machine.tiers]
    links = [(link.source, link.target) for link in machine.links]
    for count in range(len(levers) + 1):
        for some in combinations(sorted(levers), count):
            what = repr((program.digest, tiers, links, some, kind))
            name = f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.{suffix}"
            yield cache_directory() / "schedules" / name

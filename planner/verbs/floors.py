"""The smallest schedules known, kept on disk: so that a budget that was said to work does, in another process too.

How small a schedule a search finds depends on the time that it has, and on costs, which are measured again where other work got
in the way. The schedule itself depends on neither; read again, it is replayed by the referee like any other.
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

MOST = 256  # files; the oldest go first
BYTES = 1 << 26  # of a schedule at most


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
    for path in paths(program, machine, levers, kind):
        with suppress(OSError, msgspec.MsgspecError, zlib.error, InvalidSchedule, ValueError, IndexError):
            unpacker = zlib.decompressobj()
            schedule = msgspec.json.decode(unpacker.decompress(path.read_bytes(), BYTES), type=Schedule)
            if {buffer for buffer, _ in schedule.homes} <= set(homes):
                whole = program if rebuilt is None else rebuilt(schedule)
                found.append(Side(whole, schedule, referee(whole, unlimited(machine), schedule)))
    return min(found, key=lambda side: side.peak, default=None)


def keep_floor(side: Side, program: Program, machine: Machine, levers: Collection[str], kind: str = "") -> None:
    """Write a schedule down; where that cannot be, a search has to find it again.

    Args:
        side: the schedule.
        program: the program that it was planned for.
        machine: likewise.
        levers: that were allowed.
        kind: of schedules.
    """
    path = list(paths(program, machine, levers, kind))[-1]
    with suppress(OSError):
        write_atomically(path, zlib.compress(msgspec.json.encode(side.schedule), 1))
        files = sorted(path.parent.glob("*.floor"), key=lambda each: each.stat().st_mtime)
        for old in files[:-MOST]:
            old.unlink()


def paths(program: Program, machine: Machine, levers: Collection[str], kind: str) -> Iterator[Path]:
    """Where schedules lie that some of the levers reach; with all of them the last."""
    tiers = [(tier.name, tier.capacity, tier.rounding, tier.alignment) for tier in machine.tiers]
    links = [(link.source, link.target) for link in machine.links]
    for count in range(len(levers) + 1):
        for some in combinations(sorted(levers), count):
            what = repr((program.digest, tiers, links, some, kind))
            yield cache_directory() / "floors" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.floor"

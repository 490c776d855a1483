"""What the cache holds, by kind: measured costs, schedules that were found, and compiled solvers."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_directory

KINDS = {
    "costs": ("costs-*", "pace-*", "rates-*", "disk-*"),
    "schedules": ("schedules/*", "floors/*"),  # the latter of earlier versions
    "code": ("numba/**/*",),
}


@dataclass(frozen=True)
class Kept:
    """The files of one kind.

    Attributes:
        kind: of `KINDS`.
        files: how many.
        bytes: of all of them.
        newest: seconds since the epoch when one was last written; None where there is none.
    """

    kind: str
    files: int
    bytes: int
    newest: float | None


def contents() -> list[Kept]:
    """What there is of each kind."""
    found = []
    for kind in KINDS:
        stats = []
        for path in paths(kind):
            with suppress(OSError):  # another process has just removed it
                stats.append(path.stat())
        newest = max((each.st_mtime for each in stats), default=None)
        found.append(Kept(kind, len(stats), sum(each.st_size for each in stats), newest))
    return found


def clear(kind: str) -> int:
    """Remove the files of one kind; what is needed of them is made anew. Returns how many are gone.

    Raises:
        OSError: one cannot be removed.
    """
    gone = 0
    for path in paths(kind):
        path.unlink(missing_ok=True)
        gone += 1
    return gone


def paths(kind: str) -> list[Path]:
    """The files of a kind."""
    folder = cache_directory()
    return sorted(path for pattern in KINDS[kind] for path in folder.glob(pattern) if path.is_file())

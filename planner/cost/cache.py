"""Where measurements are kept, and how their files are written."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..ir.files import write_file


def cache_directory() -> Path:
    """Where measurements are kept: `$MEMPLAN_CACHE`, or `~/.cache/memplan`."""
    named = os.environ.get("MEMPLAN_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "memplan"


def file_name(prefix: str, device: str) -> str:
    """A file name that people can read, unique to the device."""
    readable = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")[:80]
    return f"{prefix}-{readable}-{hashlib.sha256(device.encode()).hexdigest()[:8]}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and its folder, so that a reader finds the old or the new content, never a part.

    Raises:
        OSError: the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content, durable=False)  # what is lost is measured again


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to rewrite a file, among processes that ask for it; where locks are unknown, do nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the last writer wins
        yield
        return
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""Functions that numba compiles, and where their machine code is kept.

It takes seconds to compile them, so the code is kept in the user's cache: `$MEMPLAN_CACHE/numba`, or
`~/.cache/memplan/numba`, or numba's own `NUMBA_CACHE_DIR` where that is set. Not beside the sources, where numba would put
it: files that an installer does not know of outlive it. Where nothing can be written, each process compiles for itself.

numba looks at a function's own file to see whether kept code is stale, and compiles in what the function calls in others. So
the folder is named after the text of all solvers: code of another edition is never found.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config as settings

config: Any = settings  # its names are made when it is loaded: no type checker knows them


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: numba compiles the function when it is first called, or takes what was kept.

    Args:
        options: of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if config.CACHE_DIR:
            return njit(cache=True, **options)(function)
        folder = code_directory()
        if folder is None:
            return njit(**options)(function)
        with kept_in(folder):
            return njit(cache=True, **options)(function)

    return decorate


@contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Have numba keep what is decorated meanwhile in a folder: it asks when it decorates. Others' functions are not moved."""
    before, config.CACHE_DIR = config.CACHE_DIR, folder
    try:
        yield
    finally:
        config.CACHE_DIR = before


@cache
def code_directory() -> str | None:
    """The folder of this edition's code, made where it is missing; None where it cannot be written to."""
    try:
        named = os.environ.get("MEMPLAN_CACHE")
        folder = (Path(named).absolute() if named else Path.home() / ".cache" / "memplan") / "numba" / edition()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # no home at all is a RuntimeError
        return None
    return str(folder)


def is_kept(what: str) -> bool:
    """Whether `note_kept` has been told that all of something is in this edition's folder."""
    folder = code_directory()
    return folder is not None and not config.CACHE_DIR and (Path(folder) / what).exists()


def note_kept(what: str) -> None:
    """Remember that all of something has been compiled."""
    folder = code_directory()
    if folder is not None and not config.CACHE_DIR:
        with suppress(OSError):
            (Path(folder) / what).touch()


def edition() -> str:
    """What tells the text of these solvers from that of any others."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return text.hexdigest()[:16]

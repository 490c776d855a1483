"""`memplan cache`: what is kept on disk between runs."""

import time
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from ..ir.units import show_bytes, show_count
from .options import Json
from .tables import table
from .terminal import answer


class Kind(StrEnum):
    """What is kept."""

    COSTS = "costs"
    SCHEDULES = "schedules"
    CODE = "code"
    ALL = "all"


MEANING = {
    "costs": "times of ops, and this machine's rates",
    "schedules": "the fastest and the smallest found, by program",
    "code": "compiled solvers",
}


def cache(
    clear: Annotated[
        list[Kind] | None,
        typer.Option("--clear", metavar="KIND", help="Remove costs, schedules, code or all; may be given more than once."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What memplan keeps on disk between runs, and how to remove it."""
    from ..cost.cache import cache_directory
    from ..cost.contents import KINDS, contents
    from ..cost.contents import clear as remove

    wanted = [kind for kind in KINDS if clear and (kind in clear or Kind.ALL in clear)]
    gone = sum(map(remove, wanted))
    found, now = contents(), time.time()
    rows = [
        (each.kind, str(each.files), show_bytes(each.bytes), "-" if each.newest is None else age(now - each.newest),
         MEANING[each.kind]) for each in found
    ]  # fmt: skip
    told = [f"{show_count(gone, 'file')} removed"] if clear else []
    facts = {"directory": str(cache_directory()), "kinds": [asdict(each) for each in found], "removed": gone}
    answer(as_json, facts, *told, f"in {cache_directory()}:", table(("kind", "files", "size", "newest", "what"), rows))


def age(seconds: float) -> str:
    """A time that has passed, in the largest unit of which there is one."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{show_count(int(seconds // length), unit)} ago"
    return "just now"

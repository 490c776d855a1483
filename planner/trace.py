"""Buffers with lifetimes as a CSV file: MiniMalloc's columns in, the same and `offset` out.

    id,lower,upper,size[,gaps][,pin][,pool][,reuse]

`[lower, upper)` is the lifetime, `size` is in bytes. `gaps`, such as `6-12 15-18`, are half-open pieces of the lifetime
in which the buffer's bytes are not needed. `pin` is the offset at which a buffer must lie, or empty. Buffers of different
`pool`s lie in different memories. `reuse` is the id of a buffer of the same size and pool, begun earlier and ended no
later, which this one may be written over although both are live when it begins. Other columns are carried over to the
output and mean nothing here.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .errors import TraceError
from .files import write_file

NEEDED = ("id", "lower", "upper", "size")
MOST_ROWS = 2_000_000
LARGEST = 2**63 - 1
TOTAL = 2**62  # bytes of all buffers together, so that no sum overflows


@dataclass(frozen=True)
class Trace:
    """What a file says.

    Attributes:
        heads: the columns, in the file's order.
        rows: the cells of each buffer, as they were read.
        ids: of the buffers.
        spans: for each buffer the half-open pieces of time in which it is live, ascending.
        sizes: bytes.
        pins: fixed offsets, or None.
        pools: the memory that each lies in; empty names where the file has no pools.
        reuses: the buffer that each may be written over, or None.
    """

    heads: tuple[str, ...]
    rows: list[list[str]]
    ids: list[str]
    spans: list[list[tuple[int, int]]]
    sizes: list[int]
    pins: list[int | None]
    pools: list[str]
    reuses: list[int | None]

    def by_pool(self) -> dict[str, tuple[list[int], "Trace"]]:
        """For each pool its buffers, as indices and as a trace of their own."""
        members: dict[str, list[int]] = {}
        for index, pool in enumerate(self.pools):
            members.setdefault(pool, []).append(index)
        return {pool: (rows, self.take(rows)) for pool, rows in (members or {"": []}).items()}

    def take(self, rows: list[int]) -> "Trace":
        """Some of the buffers, with all that they may be written over."""
        at = {row: index for index, row in enumerate(rows)}

        def some(column: list) -> list:
            return [column[row] for row in rows]

        return Trace(
            self.heads, some(self.rows), some(self.ids), some(self.spans), some(self.sizes), some(self.pins),
            some(self.pools), [None if old is None else at[old] for old in some(self.reuses)],
        )  # fmt: skip


class Cell:
    """Where in a file something is said."""

    def __init__(self, path: Path, row: int, column: str):
        self.path, self.row, self.column = path, row, column

    def wrong(self, message: str) -> NoReturn:
        """Refuse it."""
        raise TraceError(f"{self.path}, row {self.row}, column {self.column}: {message}")

    def number(self, text: str) -> int:
        """A number from 0 to 2^63 - 1."""
        word = text.strip()
        if word.startswith("-") and word[1:].isdecimal():
            self.wrong(f"{clipped(word)} is negative")
        if not (word.isascii() and word.isdecimal()):
            self.wrong(f"{clipped(text)!r} is not a whole number")
        if len(word) > 19 or int(word) > LARGEST:
            self.wrong(f"{clipped(word)} is larger than 2^63 - 1")
        return int(word)


def clipped(text: str, most: int = 48) -> str:
    """Text short enough for an error's one line."""
    return text if len(text) <= most else text[:most] + "..."


def read_trace(path: Path) -> Trace:
    """The buffers of a file.

    Raises:
        TraceError: what is wrong, with row (the first line is row 1) and column.
        OSError: the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return parse(path, csv.reader(stream))
    except UnicodeDecodeError:
        raise TraceError(f"{path} is not a text file: write CSV with the columns {', '.join(NEEDED)}") from None
    except csv.Error as error:
        raise TraceError(f"{path} is not CSV: {error}") from None


def parse(path: Path, lines: Iterable[list[str]]) -> Trace:
    """The buffers of a file's lines."""
    numbered = enumerate(lines, 1)
    _, first = next(numbered, (0, []))
    heads = tuple(cell.strip() for cell in first)
    missing = [name for name in NEEDED if name not in heads]
    if missing:
        raise TraceError(f"{path}, row 1: no column {missing[0]!r}; the columns are {clipped(', '.join(heads)) or 'none'}")
    twice = [name for name in heads if heads.count(name) > 1]
    if twice:
        raise TraceError(f"{path}, row 1: two columns are called {clipped(twice[0])!r}")
    at = {name: index for index, name in enumerate(heads)}
    trace = Trace(heads, [], [], [], [], [], [], [])
    wishes: list[tuple[Cell, str]] = []
    seen: dict[str, int] = {}
    total = 0
    for row, cells in numbered:
        if not cells:
            continue
        if row > MOST_ROWS + 1:
            raise TraceError(f"{path}, row {row}: more than {MOST_ROWS} buffers; split the trace where few buffers are live")
        if len(cells) != len(heads):
            raise TraceError(f"{path}, row {row}, column {min(len(cells), len(heads)) + 1}: "
                             f"{len(cells)} cells where the first row has {len(heads)}")  # fmt: skip
        name = cells[at["id"]].strip()
        if seen.setdefault(name, row) != row:
            Cell(path, row, "id").wrong(f"{clipped(name)!r} is the id of row {seen[name]} already")
        lower, upper, size = (Cell(path, row, head).number(cells[at[head]]) for head in NEEDED[1:])
        if upper <= lower:
            Cell(path, row, "upper").wrong(f"the lifetime [{lower}, {upper}) is empty: it must end after it begins")
        if not size:
            Cell(path, row, "size").wrong("0: leave out what takes no bytes")
        total += size
        if total > TOTAL:
            Cell(path, row, "size").wrong("all sizes up to here add up to more than 2^62 bytes")
        trace.rows.append(cells)
        trace.ids.append(name)
        trace.spans.append(live_spans(Cell(path, row, "gaps"), lower, upper, cells[at["gaps"]] if "gaps" in at else ""))
        trace.sizes.append(size)
        pin = cells[at["pin"]].strip() if "pin" in at else ""
        trace.pins.append(Cell(path, row, "pin").number(pin) if pin else None)
        trace.pools.append(cells[at["pool"]].strip() if "pool" in at else "")
        wishes.append((Cell(path, row, "reuse"), cells[at["reuse"]].strip() if "reuse" in at else ""))
    place_of = {name: index for index, name in enumerate(trace.ids)}
    taken: dict[int, str] = {}
    for new, (cell, name) in enumerate(wishes):
        trace.reuses.append(reusable(cell, trace, new, name, place_of, taken) if name else None)
    return trace


def reusable(cell: Cell, trace: Trace, new: int, name: str, place_of: dict[str, int], taken: dict[int, str]) -> int:
    """The buffer that one may be written over; `taken` has who claims which already."""
    old = place_of.get(name)
    if old is None:
        cell.wrong(f"no buffer is called {clipped(name)!r}")
    if taken.setdefault(old, trace.ids[new]) != trace.ids[new]:
        cell.wrong(f"{clipped(name)!r} is reused by {clipped(taken[old])!r} already")
    if trace.sizes[old] != trace.sizes[new]:
        cell.wrong(f"{clipped(name)!r} takes {trace.sizes[old]} bytes, not {trace.sizes[new]}")
    if trace.pools[old] != trace.pools[new]:
        cell.wrong(f"{clipped(name)!r} lies in the pool {clipped(trace.pools[old])!r}")
    (begins, _), ends = trace.spans[old][0], trace.spans[old][-1][1]
    if not begins < trace.spans[new][0][0] <= ends <= trace.spans[new][-1][1]:
        cell.wrong(f"{clipped(name)!r} is live from {begins} to {ends}: it must begin before this buffer, and end while it "
                   "is live or when it begins")  # fmt: skip
    return old


def live_spans(place: Cell, lower: int, upper: int, gaps: str) -> list[tuple[int, int]]:
    """A lifetime less its gaps."""
    spans, now = [], lower
    for word in gaps.split():
        begin, dash, end = word.partition("-")
        if not dash:
            place.wrong(f"{clipped(word)!r}: write gaps as begin-end, separated by spaces")
        low, high = place.number(begin), place.number(end)
        if low < now or high <= low or high > upper:
            place.wrong(f"the gap [{low}, {high}) is empty, out of order, or outside the lifetime [{lower}, {upper})")
        if low > now:
            spans.append((now, low))
        now = high
    if now < upper:
        spans.append((now, upper))
    if not spans:
        place.wrong("the gaps leave nothing of the lifetime")
    return spans


def write_trace(path: Path, trace: Trace, offsets: Sequence[int]) -> None:
    """The file again, with the offsets in the column `offset`."""
    heads = [head for head in trace.heads if head != "offset"]
    kept = [index for index, head in enumerate(trace.heads) if head != "offset"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "offset"])
    for cells, offset in zip(trace.rows, offsets, strict=True):
        writer.writerow([*(cells[index] for index in kept), offset])
    write_file(path, text.getvalue())

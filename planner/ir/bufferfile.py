"""Buffers with lifetimes as a CSV file: MiniMalloc's columns in, the same and `offset` out.

    id,lower,upper,size[,gaps][,pin][,pool][,reuse][,alignment][,offset]

`[lower, upper)` is the lifetime, `size` is in bytes. `gaps`, such as `6-12 15-18`, are half-open pieces of the lifetime
in which the buffer's bytes are not needed. `pin` is the offset at which a buffer must lie, or empty. Buffers of different
`pool`s lie in different memories. `reuse` is the id of a buffer of the same size and pool, begun earlier and ended no
later, which this one may be written over although both are live when it begins. `alignment` is what the buffer's offset must
be a multiple of: one number for all of a pool's buffers, or divisors of the alignment asked for. `offset`, as in MiniMalloc,
is where a buffer lies already, and means the same as `pin`: a file that comes out of here is checked when it goes in again.

Columns that ask for more in other tools are refused where they say something (`columns.py`). The rest is carried over
to the output, means nothing here, and is told of in a warning.
"""

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .columns import NEEDED, meaning, refusal, unknown, wrong_heads
from .errors import TraceError
from .files import write_file

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
        alignments: what each buffer's offset must be a multiple of.
    """

    heads: tuple[str, ...]
    rows: list[list[str]]
    ids: list[str]
    spans: list[list[tuple[int, int]]]
    sizes: list[int]
    pins: list[int | None]
    pools: list[str]
    reuses: list[int | None]
    alignments: list[int]

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
            some(self.pools), [None if old is None else at[old] for old in some(self.reuses)], some(self.alignments),
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
    wrong = wrong_heads(heads)
    if wrong:
        raise TraceError(f"{path}, row 1: {wrong}")
    at = {meaning(name): index for index, name in enumerate(heads)}
    refused = [(index, why) for index, name in enumerate(heads) if (why := refusal(name))]
    trace = Trace(heads, [], [], [], [], [], [], [], [])
    wishes: list[tuple[Cell, str]] = []
    seen: dict[str, int] = {}
    total = 0
    for row, cells in numbered:
        if not any(cell.strip() for cell in cells):
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
        for index, why in refused:
            if cells[index].strip():
                Cell(path, row, heads[index] or str(index + 1)).wrong(why)
        trace.rows.append(cells)
        trace.ids.append(name)
        trace.spans.append(live_spans(Cell(path, row, "gaps"), lower, upper, cells[at["gaps"]] if "gaps" in at else ""))
        trace.sizes.append(size)
        trace.pins.append(fixed_place(path, row, [(name, cells[at[name]]) for name in ("pin", "offset") if name in at]))
        aligned = cells[at["alignment"]].strip() if "alignment" in at else ""
        trace.alignments.append(Cell(path, row, "alignment").number(aligned) if aligned else 1)
        if not trace.alignments[-1]:
            Cell(path, row, "alignment").wrong("0: write 1 for a buffer that may lie anywhere")
        trace.pools.append(cells[at["pool"]].strip() if "pool" in at else "")
        wishes.append((Cell(path, row, "reuse"), cells[at["reuse"]].strip() if "reuse" in at else ""))
    place_of = {name: index for index, name in enumerate(trace.ids)}
    taken: dict[int, str] = {}
    for new, (cell, name) in enumerate(wishes):
        trace.reuses.append(reusable(cell, trace, new, name, place_of, taken) if name else None)
    tell(path, trace, at)
    return trace


def fixed_place(path: Path, row: int, given: Iterable[tuple[str, str]]) -> int | None:
    """The offset at which a buffer must lie, out of the columns that can say so."""
    found: int | None = None
    for name, text in given:
        if text.strip():
            cell = Cell(path, row, name)
            place = cell.number(text)
            if found not in (None, place):
                cell.wrong(f"{place}, where the column pin says {found}")
            found = place
    return found


def tell(path: Path, trace: Trace, at: Mapping[str, int]) -> None:
    """Warn of what a reader of the file may take for something else than it is here."""
    loose = unknown(trace.heads)
    if loose:
        names = ", ".join(clipped(name) for name in loose[:8]) + (f" and {len(loose) - 8} more" if len(loose) > 8 else "")
        warnings.warn(f"{path}: of the columns {names} nothing is read; they are carried over", stacklevel=2)
    placed = sum(bool(cells[at["offset"]].strip()) for cells in trace.rows) if "offset" in at else 0
    if placed:
        warnings.warn(f"{path}: the column offset fixes {placed} of {len(trace.rows)} buffers where they lie: leave it out to "
                      "have them placed anew", stacklevel=2)  # fmt: skip
    if trace.ids and any(name.startswith("#") for name in trace.ids):
        warnings.warn(f"{path}: a row that begins with # is a buffer as any other: there are no comments", stacklevel=2)


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
        if "@" in word:
            place.wrong(f"{clipped(word)!r}: a gap frees all of a buffer's bytes or none, so leave the window out")
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
    kept = [index for index, head in enumerate(trace.heads) if meaning(head) != "offset"]
    heads = [trace.heads[index] for index in kept]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "offset"])
    for cells, offset in zip(trace.rows, offsets, strict=True):
        writer.writerow([*(cells[index] for index in kept), offset])
    write_file(path, text.getvalue())

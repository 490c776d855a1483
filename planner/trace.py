"""Buffers with lifetimes as a CSV file: MiniMalloc's columns in, the same and `offset` out.

    id,lower,upper,size[,gaps][,pin]

`[lower, upper)` is the lifetime, `size` is in bytes. `gaps`, such as `6-12 15-18`, are half-open pieces of the lifetime
in which the buffer's bytes are not needed. `pin` is the offset at which a buffer must lie, or empty. Other columns are
carried over to the output and mean nothing here.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .errors import TraceError

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
    """

    heads: tuple[str, ...]
    rows: list[list[str]]
    ids: list[str]
    spans: list[list[tuple[int, int]]]
    sizes: list[int]
    pins: list[int | None]


class Place:
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
    trace = Trace(heads, [], [], [], [], [])
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
            Place(path, row, "id").wrong(f"{clipped(name)!r} is the id of row {seen[name]} already")
        lower, upper, size = (Place(path, row, head).number(cells[at[head]]) for head in NEEDED[1:])
        if upper <= lower:
            Place(path, row, "upper").wrong(f"the lifetime [{lower}, {upper}) is empty: it must end after it begins")
        if not size:
            Place(path, row, "size").wrong("0: leave out what takes no bytes")
        total += size
        if total > TOTAL:
            Place(path, row, "size").wrong("all sizes up to here add up to more than 2^62 bytes")
        trace.rows.append(cells)
        trace.ids.append(name)
        trace.spans.append(live_spans(Place(path, row, "gaps"), lower, upper, cells[at["gaps"]] if "gaps" in at else ""))
        trace.sizes.append(size)
        pin = cells[at["pin"]].strip() if "pin" in at else ""
        trace.pins.append(Place(path, row, "pin").number(pin) if pin else None)
    return trace


def live_spans(place: Place, lower: int, upper: int, gaps: str) -> list[tuple[int, int]]:
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
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*heads, "offset"])
        for cells, offset in zip(trace.rows, offsets, strict=True):
            writer.writerow([*(cells[index] for index in kept), offset])

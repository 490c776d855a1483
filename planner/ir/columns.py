"""What the columns of a file of buffers mean, in every tool that writes such files; and which of them are honoured here."""

from collections.abc import Sequence

NEEDED = ("id", "lower", "upper", "size")
KNOWN = (*NEEDED, "gaps", "pin", "pool", "reuse", "offset", "alignment")
# What other names a needed column has elsewhere, and what to do about it.
OTHER_NAMES = {
    "id": {name: "rename it" for name in ("buffer", "buffer_id", "bufferid", "buffer id", "name", "tensor", "key")},
    "lower": {name: "rename it" for name in ("start", "begin", "first", "birth", "alloc_time", "alloc", "start_time")},
    "upper": {
        name: "rename it, and make it the first time at which the buffer is not live, where it is the last at which it is"
        for name in ("end", "last", "stop", "death", "free_time", "free", "end_time")
    },
    "size": {name: "rename it" for name in ("bytes", "nbytes", "length", "height", "size_bytes")},
}
ASKS = {
    "align": "call it alignment",
    "alignment_bytes": "call it alignment",
    "address": "call it pin where the buffer must lie there, or leave the column out",
    "addr": "call it pin where the buffer must lie there, or leave the column out",
    "fixed": "call it pin where the buffer must lie there, or leave the column out",
    "fixed_offset": "call it pin",
    "hint": "fix the buffer there by a column pin, or leave the column out",
    "window": "leave the column out: a gap frees all of a buffer's bytes or none",
    "windows": "leave the column out: a gap frees all of a buffer's bytes or none",
    "within": "fix the buffer by a column pin, or leave the column out",
    "min_offset": "fix the buffer by a column pin, or leave the column out",
    "max_offset": "fix the buffer by a column pin, or leave the column out",
    "capacity": "give --capacity, by pool if need be",
    "limit": "give --capacity, by pool if need be",
    "memory": "call it pool",
    "bank": "call it pool",
    "space": "call it pool",
    "region": "call it pool",
    "alias": "call it reuse, if the other buffer ends where this one begins",
    "inplace": "call it reuse, if the other buffer ends where this one begins",
    "lifetime": "write it as lower and upper",
    "lifespan": "write it as lower and upper",
    "spans": "write them as lower, upper and gaps",
    "gap": "call it gaps",
    "pinned": "call it pin, with the offset",
    "pins": "call it pin",
    "pools": "call it pool",
    "reuses": "call it reuse",
    "offsets": "call it pin where buffers must lie there, or leave the column out",
}
# A second name of a needed column, beside that column, asks for something too: which of the two is meant?
ASKS |= {
    name: f"leave it or {needed} out: both say the same of a buffer"
    for needed in ("lower", "upper", "size")
    for name in OTHER_NAMES[needed]
}


def meaning(head: str) -> str:
    """A column's name as it is understood: small letters, no space around."""
    return head.strip().lower()


def wrong_heads(cells: Sequence[str]) -> str:
    """What is wrong with a first row, with what to do; empty where nothing is."""
    heads = [meaning(cell) for cell in cells]
    told = ", ".join(cell.strip() for cell in cells)
    shown = (told if len(told) <= 48 else told[:48] + "...") or "none"
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(heads) == 1 and mark in heads[0]:
            return f"the columns are separated by {name}: write commas"
    for needed in NEEDED:
        if needed not in heads:
            other = next((name for name in heads if name in OTHER_NAMES[needed]), None)
            advice = f"; {other!r} may be it: {OTHER_NAMES[needed][other]}" if other is not None else ""
            return f"no column {needed!r}; the columns are {shown}{advice}"
    twice = [name for name in heads if name and heads.count(name) > 1]
    return f"two columns are called {twice[0][:48]!r}" if twice else ""


def refusal(head: str) -> str:
    """Why a column that says something cannot be honoured, with what to do; empty where it can, or means nothing."""
    name = meaning(head)
    if not name:
        return "a cell in a column without a name: name the column, or empty it"
    return f"{name!r} is not supported: {ASKS[name]}" if name in ASKS and name not in KNOWN else ""


def unknown(heads: Sequence[str]) -> list[str]:
    """The columns that mean nothing here, and are carried over."""
    return [head.strip() for head in heads if meaning(head) and meaning(head) not in KNOWN and meaning(head) not in ASKS]

"""Bytes and seconds as people write and read them."""

import re

from .errors import BudgetError

_SUFFIX = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*")


def parse_bytes(text: int | float | str, of: int | None = None) -> int:
    """Read a size: an int, digits, `16GiB`, `16GB`, or `60%` of `of`.

    Args:
        text: what the user wrote.
        of: the bytes that a percentage refers to; None where a percentage has no meaning.

    Raises:
        BudgetError: the text is not a positive size.
    """
    wrong = f"cannot read the budget {text!r}: write bytes as 17179869184, '16GiB', '16GB', or '60%' of the unplanned peak"
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        raise BudgetError(wrong)
    if not isinstance(text, str):
        if not text > 0 or text == float("inf") or text != int(text):
            raise BudgetError(wrong)
        return int(text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(wrong)
    number, suffix = match.groups()
    if suffix == "%":
        if of is None:
            raise BudgetError(f"{text!r}: a percentage has nothing to refer to here; write bytes, as in '16GiB'")
        size = float(number) / 100 * of
    elif suffix.lower() in _SUFFIX:
        size = float(number) * _SUFFIX[suffix.lower()] if suffix or "." in number else int(number)
    else:
        raise BudgetError(wrong)
    if size < 1:
        raise BudgetError(f"the budget {text!r} is less than one byte; {wrong.split(': ', 1)[1]}")
    return int(size)


def show_bytes(size: float) -> str:
    """`1.5 GiB`: three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB" if abs(size) < 10000 else f"{size:.0f} TiB"


def show_seconds(seconds: float) -> str:
    """`12.3 ms`: three significant digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"

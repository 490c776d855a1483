"""Bytes and seconds as people write and read them."""

import re
from decimal import Decimal, localcontext
from numbers import Integral
from typing import Any

from .errors import BudgetError

_SUFFIX = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MOST = 2**62  # bytes, so that sums of a few stay within 64 bits
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*")


def parse_bytes(
    text: float | str | Integral, of: int | None = None, what: str = "budget", whole: str = "unplanned peak"
) -> int:
    """Read a size: an int, digits, `16GiB`, `16GB`, or `60%` of `of`.

    Args:
        text: what the user wrote.
        of: the bytes that a percentage refers to; None where a percentage has no meaning.
        what: the size is, for the error's message.
        whole: what a percentage is of, likewise.

    Raises:
        BudgetError: the text is not a positive size, or one of more than 2^62 bytes.
    """
    percentage = f", or '60%' of the {whole}" if of is not None else ""
    remedy = f"write bytes as 17179869184, '16GiB' or '16GB'{percentage}"
    shown = shorten(text)
    wrong = BudgetError(f"cannot read the {what} {shown}: {remedy}")
    if isinstance(text, bool) or not isinstance(text, Integral | float | str):
        raise wrong
    if not isinstance(text, str):
        if not 0 < text < float("inf") or text != int(text):  # type: ignore[operator]
            raise wrong
        size = Decimal(int(text))
    else:
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise wrong
        number, suffix = match.groups()
        if suffix == "%" and of is None:
            raise BudgetError(f"{shown}: a percentage has nothing to refer to here; write bytes, as in '16GiB'")
        if suffix != "%" and suffix.lower() not in _SUFFIX:
            raise wrong
        unit = Decimal(of or 0) / 100 if suffix == "%" else Decimal(_SUFFIX[suffix.lower()])
        with localcontext(prec=60):  # exact for every size that is not refused
            size = Decimal(number) * unit
    if size < 1:
        raise BudgetError(f"the {what} {shown} is less than one byte; {remedy}")
    if size > MOST:
        raise BudgetError(f"the {what} {shown} is more than 2^62 bytes; {remedy}")
    return int(size)


def shorten(text: Any) -> str:
    """What the user wrote, short enough for one line."""
    if isinstance(text, int) and text.bit_length() > 128:  # Python refuses to write out the longest
        return f"of {text.bit_length()} bits"
    return repr(text) if len(repr(text)) <= 48 else repr(text)[:48] + "..."


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

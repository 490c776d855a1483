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
    """`12.3 ms`: three significant digits, or all before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if abs(seconds) >= 0.9995 * scale or (unit == "ns" and seconds):  # what is rounded to a whole unit is one
            figure = seconds / scale
            return f"{figure:.0f} {unit}" if abs(figure) >= 100 else f"{figure:.3g} {unit}"
    return "0 s"


def show_share(share: float) -> str:
    """`12.3%`; what is not nothing is not shown as nothing."""
    return "0%" if not share else "less than 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def show_change(figure: float, before: float) -> str:
    """`12.3% more`, `12.3% less`, `the same` or `2.5 times as much`: a figure beside the one before."""
    share = figure / before - 1 if before > 0 else 0.0
    if share >= 1:
        return f"{1 + share:.3g} times as much"
    return "the same" if abs(share) < 0.0005 else f"{abs(share):.1%} {'more' if share > 0 else 'less'}"


def show_count(count: int, what: str) -> str:
    """`1 op`, `2 ops`."""
    return f"{count} {what}{'' if count == 1 else 's'}"

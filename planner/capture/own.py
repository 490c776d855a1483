"""An object's own attributes."""

from typing import Any


def own_of(thing: Any) -> dict[str, Any] | None:
    """The dict of an object's attributes; None for one that has none, or something else under that name (a C library's)."""
    try:
        found = thing.__dict__
    except Exception:  # whatever a class does where it is asked for its attributes
        return None
    return found if isinstance(found, dict) else None

"""What `torch.compile(model, backend="memplan", options=...)` may say, checked."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import named_machine
from ...planner.ir.schedule import check_levers
from ...planner.ir.units import parse_bytes


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `options=` may say.

    Attributes:
        budget: as in `memplan.plan`; None for what the machine holds.
        machine: a preset's name, a TOML path or a `Machine`; None for the one at hand.
        inner: what compiles the planned graphs.
        time_limit: seconds for planning one piece, at most.
        seed: of the search.
        allow: as in `memplan.plan`.
    """

    budget: int | float | str | None = None
    machine: Any = None
    inner: Literal["eager", "inductor"] = "eager"
    time_limit: float = 60.0
    seed: int = 0
    allow: tuple[str, ...] | None = None

    @property
    def said(self) -> int | str | None:
        """The budget as bytes, or as a share of each piece's own peak."""
        return self.budget if self.budget is None or is_percentage(self.budget) else parse_bytes(self.budget)  # type: ignore[return-value]

    @property
    def levers(self) -> set[str]:
        """What the plans may do."""
        return check_levers(self.allow)


def read_options(options: Mapping[str, Any] | None) -> Options:
    """The options, checked.

    Raises:
        MemplanError: the first that is wrong, and what is allowed.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(Options.__struct_fields__), key=str)
    if unknown:
        raise MemplanError(
            f"no option {unknown[0]!r}: the options of backend='memplan' are {', '.join(Options.__struct_fields__)}"
        )
    if given.get("budget") is not None:
        parse_bytes(given["budget"], of=1 << 40)
    named_machine(given.get("machine"))
    if isinstance(given.get("allow"), str):
        given["allow"] = (given["allow"],)
    levers = check_levers(given.get("allow"))
    if "offload" in levers and given.get("inner") == "inductor":
        raise MemplanError("inner='inductor' moves no values to other tiers: leave 'offload' out of allow, or take 'eager'")
    if given.get("inner", "eager") not in ("eager", "inductor"):
        raise MemplanError(f"inner={given['inner']!r}: it is 'eager' or 'inductor'")
    try:
        read = msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        raise MemplanError(f"options of backend='memplan': {error}") from None
    if not read.time_limit > 0:
        raise MemplanError(f"time_limit={read.time_limit!r}: give a positive number of seconds")
    return read


def is_percentage(budget: Any) -> bool:
    """Whether a budget is a share of the unplanned peak."""
    return isinstance(budget, str) and budget.strip().endswith("%")

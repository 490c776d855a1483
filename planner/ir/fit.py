"""`Fit`: how large a model, its batch or its sequence may be within a budget, and what it costs on the way there."""

from dataclasses import dataclass
from typing import Literal

from .summary import columns, listed
from .units import show_bytes, show_count, show_seconds, show_share

Why = Literal["bytes", "order", "search", "built", "most"]
MODULES = 3  # that a summary names
NAMES = {"batch": "sequences or samples in a batch", "seq": "tokens in a sequence", "layers": "layers"}


@dataclass(frozen=True)
class FitPoint:
    """One size that was planned for.

    Attributes:
        size: the batch, the length or the depth.
        peak: bytes: of the fastest schedule found within the budget, or of the smallest known where none was.
        time: seconds of that schedule's step.
        fits: whether the referee has accepted it within the budget.
        rate: tokens, or samples, in a second of it.
        unplanned: bytes of the step as eager PyTorch runs it.
    """

    size: int
    peak: int
    time: float
    fits: bool
    rate: float
    unplanned: int


@dataclass(frozen=True, repr=False)
class Fit:
    """The largest size that trains within a budget.

    Attributes:
        name: of the program.
        over: what was made larger: `batch`, `seq`, `layers` or what the caller calls it.
        budget: bytes.
        machine: what it was planned for.
        points: sizes that were planned for, in their order; the one after `largest` among them, where there is one.
        why: what is known of the size after `largest`: `bytes`: one op with what it reads and writes, beside what is resident,
            takes more than the budget; `order`: no schedule keeps the base orders of ops that were tried, by linear programs;
            `search`: no schedule was found; `built`: there is no such model; `most`: no larger one was asked for.
        beyond: that in the words of an error, where the model could not be built.
        unplanned: the largest size that fits as eager PyTorch runs it; 0 if less than 2, None where each size is traced.
        levers: bytes that a lever takes off the smallest step known at the size after `largest` (at `largest`, where there is
            none): those that are not allowed by what they would take off if they were, those that are by what the step would
            take without. Each is a few seconds' search: a longer one finds more.
        allowed: the levers among them that were.
        modules: bytes at the peak of the largest size by module, the most first; numbered layers are one, as `h.*.mlp`.
        unit: what `FitPoint.rate` counts: `tokens` or `samples`.
        estimated: times are estimates by rooflines: nothing was measured.
        traces: how many sizes were traced; all others were computed from one.
        capture_seconds: seconds of that.
        search_seconds: seconds of the rest.
    """

    name: str
    over: str
    budget: int
    machine: str
    points: tuple[FitPoint, ...]
    why: Why
    beyond: str
    unplanned: int | None
    levers: dict[str, int]
    allowed: frozenset[str]
    modules: dict[str, int]
    unit: str
    estimated: bool
    traces: int
    capture_seconds: float
    search_seconds: float

    @property
    def best(self) -> FitPoint:
        """The largest that fits."""
        return max((point for point in self.points if point.fits), key=lambda point: point.size)

    @property
    def largest(self) -> int:
        """Its size."""
        return self.best.size

    @property
    def peak(self) -> int:
        """Its bytes."""
        return self.best.peak

    @property
    def time(self) -> float:
        """Seconds of its step."""
        return self.best.time

    def summary(self) -> str:
        """A table of the points, and what is to be said of them, a line each."""
        return "\n".join([*columns([self.heads, *self.rows]), *self.remarks])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return self.summary()

    @property
    def heads(self) -> tuple[str, ...]:
        """Of the table's columns."""
        return self.over, "peak memory", "unplanned", "step time (predicted)", f"{self.unit} / s", ""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Of the table: a point each."""
        return [
            (str(point.size), show_bytes(point.peak), show_bytes(point.unplanned), show_seconds(point.time),
             f"{point.rate:.4g}" if point.fits else "", self.verdict(point))
            for point in self.points
        ]  # fmt: skip

    def verdict(self, point: FitPoint) -> str:
        """Whether a point fits."""
        return ("largest" if point.size == self.largest else "fits") if point.fits else "does not fit"

    @property
    def remarks(self) -> list[str]:
        """What the figures do not say."""
        peak = f"peak {show_bytes(self.peak)} of {show_bytes(self.budget)} on {self.machine}"
        lines = [f"largest {self.over} of {self.name}: {self.largest}, {peak}", self.next]
        if self.unplanned is not None:
            lines.append(f"unplanned: {self.unplanned or 'no size of 2 or more'}")
        rows = [f"{module or 'the model itself'} {show_bytes(size)}" for module, size in list(self.modules.items())[:MODULES]]
        lines.append(f"at the peak of the largest most is held by {listed(rows)}")
        lines += [line for line in (self.told(self.allowed, "spared"), self.told(self.unused, "to be had")) if line]
        lines.append("times are estimated from rooflines, not measured" if self.estimated else "times rest on measured ops")
        lines.append(f"traced {show_count(self.traces, 'size')} in {show_seconds(self.capture_seconds)}, "
                     f"searched for {show_seconds(self.search_seconds)}")  # fmt: skip
        return lines

    @property
    def next(self) -> str:
        """What is known of the size after the largest."""
        after = self.largest + 1
        if self.why == "most":
            return f"{after} was not tried: {self.largest} is the most that was asked for"
        if self.why == "built":
            return f"{after} cannot be built: {self.beyond}"
        point = next(point for point in self.points if point.size == after)
        known = f"the smallest schedule known takes {show_bytes(point.peak)}"
        return {
            "bytes": f"{after} cannot fit: one op with what it reads and writes, beside what is resident, takes more; {known}",
            "order": f"{after}: no schedule found, and by a linear bound there is none in the orders of ops tried; {known}",
            "search": f"{after}: no schedule found; {known} ({show_share(point.peak / self.budget - 1)} more than the budget)",
        }[self.why]

    @property
    def unused(self) -> frozenset[str]:
        """Levers that were not allowed."""
        return frozenset(self.levers) - self.allowed

    def told(self, names: frozenset[str], what: str) -> str:
        """What some levers give, in words."""
        rows = [f"{name} {show_bytes(size)}" for name, size in self.levers.items() if name in names]
        at = self.largest + (self.why not in ("built", "most"))
        return f"{what} at {at} by: {', '.join(rows)}" if rows else ""

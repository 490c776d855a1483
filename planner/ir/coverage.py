"""How much of a step's predicted time was measured, on what and when; the rest is an estimate."""

from typing import Any

import msgspec

from .units import show_seconds

SOME = 0.005  # of the time: less is not worth a word


class Coverage(msgspec.Struct, frozen=True):
    """How much of a step's cost was measured rather than estimated.

    Attributes:
        ops: that the step runs.
        measured: those of them with measured figures.
        seconds: of all of them.
        measured_seconds: of the measured ones.
        disturbed_seconds: of those among them that were timed beside other work, or while the machine was slow: what was
            measured bounds their times from above, and an estimate says what they are below that.
        device: on which they were measured, and the settings; "" where the times are not this computer's.
        since: the day of the oldest measurement, as 2026-11-30; "" where there is none.
        until: of the newest.
        alike: how many measured ops the estimates of the rest are corrected by; 0 for rates of the machine alone.
        spoilt: whether other work got in the way of the probe that found the machine's rates.
    """

    ops: int
    measured: int
    seconds: float
    measured_seconds: float
    disturbed_seconds: float = 0.0
    device: str = ""
    since: str = ""
    until: str = ""
    alike: int = 0
    spoilt: bool = False

    @property
    def share(self) -> float:
        """Of the time that was measured."""
        return self.measured_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def disturbed(self) -> float:
        """The share of the time of ops that were measured beside other work."""
        return self.disturbed_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def is_sound(self) -> bool:
        """Whether the figures can be."""
        whole = 0 <= self.measured <= self.ops and 0 <= self.alike
        return whole and 0 <= self.disturbed_seconds <= self.measured_seconds <= self.seconds < float("inf")

    def __str__(self) -> str:
        return f"{self.measured} of {self.ops} ops measured, {self.share:.1%} of {show_seconds(self.seconds)}"

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "share": self.share,
            "device": self.device or None,
            "when": self.until or None,
            "since": self.since or None,
            "disturbed": self.disturbed,
            "ops": self.measured,
            "alike": self.alike,
        }

    def describe(self, machine: str) -> str:
        """A line for people: `times: 92 % measured on ..., 2026-11-30; the rest is estimated`.

        Args:
            machine: the name of what was planned for.
        """
        corrected = f", corrected by {self.alike} measured ops" if self.alike else ""
        corrected += ", a probe that other work got in the way of" if self.spoilt else ""
        if not self.measured:
            advice = "; memplan calibrate measures them" if self.device else ""
            return f"times: none measured, estimated from the rates of {machine}{corrected}{advice}"
        when = self.since if self.since == self.until else f"{self.since} to {self.until}"
        line = f"times: {self.share:.0%} measured on {self.device}" + (f", {when}" if when else "")
        if self.disturbed > SOME:
            line += f"; {self.disturbed:.0%} beside other work, known only to take no longer"
        return line + (f"; the rest is estimated{corrected}" if self.share < 1 - SOME / 10 else "")

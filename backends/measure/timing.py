"""When ops are timed, and what their times are worth: how fast the machine was before and after."""

import time
from typing import NamedTuple, Protocol

from ...planner.cost.gauge import Reading, Reference, worse

SPAN = 2.0  # seconds of measuring between two looks at how fast the machine is


class Answer(NamedTuple):
    """A worker's figure, seconds or bytes; and whether other work got in the way."""

    value: float
    disturbed: bool


class Asked(Protocol):
    """What answers: `backends.measure.worker.Worker`."""

    def ask(self, key: str, limit: float) -> Answer | str | None:
        """Time a key."""
        ...

    def look(self, limit: float) -> Reading | None:
        """How fast the machine is."""
        ...


class Timed(NamedTuple):
    """A key's time, and how fast the machine was: the slower of the readings before and after."""

    answer: Answer
    reading: Reading | None


class Timing:
    """Times of keys.

    Attributes:
        times: what was found.
        refused: keys that cannot be run.
    """

    def __init__(self, worker: Asked, reference: Reference, end: float):
        """Look at the machine once.

        Args:
            worker: answers.
            reference: the fastest that the device has been seen; is told how fast it is.
            end: a time of `time.monotonic`, after which nothing is asked for.
        """
        self.worker, self.reference, self.end = worker, reference, end
        self.times: dict[str, Timed] = {}
        self.refused: list[str] = []
        self.waiting: dict[str, Answer] = {}  # what was timed since the last reading
        self.last, self.looked = worker.look(self.left), time.monotonic()
        reference.add([self.last])

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def ask(self, key: str) -> None:
        """Time a key; of several times the one that is not in doubt counts, then the smaller."""
        answer = self.worker.ask(key, self.left)
        if isinstance(answer, Answer):
            self.waiting[key] = answer
        elif answer is None and key not in self.times:
            self.refused.append(key)
        if time.monotonic() - self.looked > SPAN:
            self.look()

    def look(self) -> None:
        """Read how fast the machine is, and note what was timed since the last reading."""
        now = self.worker.look(max(self.left, SPAN))
        self.reference.add([now])
        for key, answer in self.waiting.items():
            new = Timed(answer, worse(self.last, now))
            self.times[key] = min(self.times.get(key, new), new, key=lambda each: (self.doubts(each), each.answer.value))
        self.waiting, self.last, self.looked = {}, now, time.monotonic()

    def doubts(self, timed: Timed) -> bool:
        """Whether the time is an upper bound and no more."""
        return timed.answer.disturbed or self.reference.doubts(timed.reading)

    def finish(self) -> None:
        """Time what is in doubt once more, unless the machine is no better than it was then."""
        self.look()
        for key, timed in list(self.times.items()):
            if not self.doubts(timed):
                continue
            now = self.last
            if now is None or self.reference.is_better(now, timed.reading, timed.answer.disturbed):
                self.ask(key)
        if self.waiting:
            self.look()

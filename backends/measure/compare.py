"""Two runs of a model against each other: two fresh processes that live side by side and step in turns.

One after the other, whatever else the machine does in the one's minute and not in the other's would be taken for a difference
between them. Here each round has a step of both, close together, beginning with another one each time; a round in which other
work held the cores is run again. Peaks are measured before, while the other process waits for its turn: the figures are each
process's own.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec

from ...planner.ir.errors import MemplanError
from .training import COMMAND, Request, Trial, child_environment, in_fresh_process, name_of

SETTLE = 0.25  # seconds before a step: threads of the other process wait that long for more work, and wait by turning
ROOM = 1 << 30  # bytes that a process takes beside its step: torch and what it has loaded
SPARE = 1.25  # of the peaks: what allocators hold back, and what only the first step needs

Tell = Callable[[str, float], None]


class Comparison(msgspec.Struct, frozen=True):
    """Two runs.

    Attributes:
        first: what was measured of it.
        second: likewise.
        ratio: the second's time over the first's, the median over the rounds; None where they did not take turns.
        rounds: that count.
        disturbed: of those, in which other work held the cores, though they were run again.
    """

    first: Trial
    second: Trial
    ratio: float | None
    rounds: int
    disturbed: int


def compare(first: Request, second: Request, peaks: tuple[int, int], device: str, tell: Tell) -> Comparison:
    """Run both in turns; one after the other where memory is short for both at once.

    Args:
        first: with as many steps as `second`.
        second: likewise.
        peaks: bytes that a step of each is predicted to take.
        device: the kind of device that they run on.
        tell: is told the stage, and the share that is done.

    Raises:
        MemplanError: a run failed; the message has its reason.
    """
    if SPARE * sum(peaks) + 2 * ROOM <= room_of(device):
        return in_turns(first, second, tell)
    tell(f"running {kind_of(first)}", 0.0)
    one = in_fresh_process(first)
    tell(f"running {kind_of(second)}", 0.5)
    other = in_fresh_process(second)
    return Comparison(one, other, None, first.steps, max(one.disturbed, other.disturbed))


def in_turns(first: Request, second: Request, tell: Tell) -> Comparison:
    """Both at once, a step at a time."""
    with ExitStack() as stack:
        runs = []
        for number, request in enumerate((first, second)):
            tell(f"running {kind_of(request)}", number / 4)
            runs.append(stack.enter_context(Child(request)))
        for run in runs:
            run.ask("step")  # warms up
        kept: list[tuple[list[float], bool]] = []
        spare, turn = first.steps, 0
        while len(kept) < first.steps:
            tell("stepping in turns", 0.5 + len(kept) / first.steps / 2)
            times, disturbed = [0.0, 0.0], False
            for index in (turn % 2, 1 - turn % 2):
                time.sleep(SETTLE)
                answer = runs[index].ask("step")
                times[index] = float(answer["seconds"])
                disturbed |= bool(answer["disturbed"])
            turn += 1
            if disturbed and spare:
                spare -= 1
                continue
            kept.append((times, disturbed))
        found = [run.ask("end") for run in runs]
    quiet = [times for times, disturbed in kept if not disturbed]
    used = quiet or [times for times, _ in kept]
    one, other = (
        msgspec.structs.replace(msgspec.convert(answer, Trial), seconds=statistics.median(times[index] for times in used))
        for index, answer in enumerate(found)
    )
    ratio = statistics.median(times[1] / times[0] for times in used)
    return Comparison(one, other, ratio, len(used), 0 if quiet else len(used))


class Child:
    """A process that trains a step at a time. Use as a context manager: then its peaks have been measured."""

    def __init__(self, request: Request):
        self.request = request

    def __enter__(self) -> "Child":
        self.log = tempfile.TemporaryFile()
        command = [*COMMAND, "--turns"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, env=child_environment())
        try:
            self.ask(msgspec.json.encode(self.request).decode())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and read the answer.

        Raises:
            MemplanError: the process failed, or has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        what = name_of(self.request)
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            status = self.process.wait()
            if status < 0:
                raise MemplanError(f"{what} was killed by signal {-status}: is there memory for it?") from None
            self.log.seek(0)
            last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise MemplanError(f"{what} failed: {''.join(last) or f'exit status {status}'}") from None
        if "error" in answer:
            raise MemplanError(f"{what} failed: {answer['error']}")
        return answer


def kind_of(request: Request) -> str:
    """In a word."""
    return "unplanned" if request.plan is None else "planned"


def room_of(device: str) -> float:
    """Bytes that processes may take on a device now."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()  # what this process has done with
        return float(torch.cuda.mem_get_info()[0])
    from ...planner.cost.local import memory_available, memory_limit

    return min(float(memory_limit()), memory_available())


__all__ = ["Child", "Comparison", "compare"]

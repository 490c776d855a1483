"""What a command shows in the end: its answer on standard output, or the error that ended it, and its exit status."""

import json
import sys
from typing import Any, NoReturn

from rich.console import Console, RenderableType

from .errors import BudgetError, InvalidSchedule, MemplanError
from .flags import in_flags

WIDE = 10_000  # columns: a terminal wraps what is too long for it, and rich would cut it off
INTERRUPTED = 130  # as shells have it: 128 and the number of the signal
BROKEN_PIPE = 141


def answer(as_json: bool, facts: dict[str, Any], *shown: RenderableType) -> None:
    """The command's result on standard output: `facts` as one object for programs, or what is `shown`, for people.

    Raises:
        MemplanError: there is no standard output.
    """
    if sys.stdout is None:
        raise MemplanError("standard output is closed: there is nowhere to print the answer")
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False, width=WIDE)
    for part in shown:
        with console.capture() as text:
            console.print(part)
        print("\n".join(line.rstrip() for line in text.get().splitlines()))


def warn(message: object) -> None:
    """A warning, in one line."""
    say("warning: " + in_flags(" ".join(str(message).split())), "yellow")


def say(line: str, style: str = "") -> None:
    """A line on standard error, after the program's name; in colour on a terminal."""
    Console(stderr=True, highlight=False, width=WIDE).print(f"memplan: {line}", style=style or None, markup=False)


def fail(error: Exception, as_json: bool) -> NoReturn:
    """End the process with the error in one line."""
    if isinstance(error, MemoryError):
        message = "not enough memory in this process: use a smaller model or batch"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = " ".join(str(error).split())
    if error.__cause__ is None:  # else the message quotes somebody else's, and perhaps a line of the user's code
        message = in_flags(message)
    facts: dict[str, Any] = {"error": message, "kind": type(error).__name__}
    if isinstance(error, BudgetError):
        facts["minimum_budget"] = error.minimum
    if isinstance(error, InvalidSchedule):
        facts |= {"rule": error.rule, "instruction": error.instruction}
    end(facts, message, status_of(error), as_json)


def end(facts: dict[str, Any], line: str, status: int, as_json: bool) -> NoReturn:
    """End the process with a line on standard error, and with `facts` on standard output for programs."""
    if as_json and sys.stdout is not None:
        print(json.dumps(facts), flush=True)
    say(line, "red")
    raise SystemExit(status)


def status_of(error: Exception) -> int:
    """The exit status: 2 for a budget that cannot be read, 3 for one that cannot be met, 1 for any other error."""
    if isinstance(error, BudgetError):
        return 2 if error.minimum is None else 3
    return 1

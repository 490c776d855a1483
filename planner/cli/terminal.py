"""What a command shows in the end: its answer on standard output, or the error that ended it, and its exit status."""

import json
import os
import sys
from contextlib import suppress
from io import StringIO
from typing import Any, NoReturn

from rich.console import Console, RenderableType

from ..ir.errors import BudgetError, InvalidSchedule, MemplanError
from .flags import in_flags

WIDE = 10_000  # columns: a terminal wraps what is too long for it, and rich would cut it off
INTERRUPTED = 130  # as shells have it: 128 and the number of the signal
BROKEN_PIPE = 141


def answer(as_json: bool, facts: dict[str, Any], *shown: RenderableType) -> None:
    """The command's result on standard output: `facts` as one object for programs, or what is `shown`, for people.

    Raises:
        MemplanError: standard output is closed, or full.
    """
    if as_json:
        put(json.dumps(facts))
        return
    text = StringIO()
    console = Console(file=text, force_terminal=Console().is_terminal, highlight=False, width=WIDE)
    for part in shown:
        console.print(part)
    put("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def put(text: str) -> None:
    """Print on standard output, at once. Where its reader has gone, the process ends as if by the signal of a broken pipe.

    Raises:
        MemplanError: standard output is closed, or full.
    """
    if sys.stdout is None:
        raise MemplanError("standard output is closed: there is nowhere to print the answer")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()
        raise SystemExit(BROKEN_PIPE) from None
    except OSError as error:
        drop_output()
        raise MemplanError(f"cannot write the answer to standard output: {error.strerror}") from None


def drop_output() -> None:
    """Let what is left for standard output go nowhere: the interpreter's last flush would end in a traceback."""
    with suppress(OSError, ValueError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        facts |= {"minimum_budget": error.minimum, "levers": error.levers}
    if isinstance(error, InvalidSchedule):
        facts |= {"rule": error.rule, "instruction": error.instruction}
    end(facts, message, status_of(error), as_json)


def end(facts: dict[str, Any], line: str, status: int, as_json: bool) -> NoReturn:
    """End the process with a line on standard error, and with `facts` on standard output for programs."""
    if as_json:
        with suppress(MemplanError):  # the line below still tells
            put(json.dumps(facts))
    say(line, "red")
    raise SystemExit(status)


def status_of(error: Exception) -> int:
    """The exit status: 2 for a budget that cannot be read, 3 for one that cannot be met, 1 for any other error."""
    if isinstance(error, BudgetError):
        return 2 if error.minimum is None else 3
    return 1

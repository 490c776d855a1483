"""What a command shows: its answer, the progress of long work, and the error that ended it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .errors import BudgetError, InvalidSchedule

Report = Callable[[str, float], None]

console = Console(stderr=True, highlight=False)


def answer(as_json: bool, facts: dict[str, Any], shown: RenderableType) -> None:
    """The command's result: `facts` on standard output for programs, or `shown` on standard error for people."""
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(shown)


@contextmanager
def progress(stage: str) -> Iterator[Report]:
    """A spinner with elapsed time while standard error is a terminal. Yields what to call with (stage, share done).

    What is printed meanwhile goes to standard error: a user's model may print, and standard output is for the answer.
    """
    if not console.is_terminal:
        with redirect_stdout(sys.stderr):
            yield lambda stage, done: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with redirect_stdout(sys.stderr), Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(stage, total=None)
        yield lambda stage, done: bars.update(task, description=stage, completed=done, total=1.0 if done > 0 else None)


def fail(error: Exception, as_json: bool) -> NoReturn:
    """End the process with the error in one line."""
    if isinstance(error, MemoryError):
        message = "not enough memory in this process: use a smaller model or batch"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = " ".join(str(error).split())
    if as_json:
        facts: dict[str, Any] = {"error": message, "kind": type(error).__name__}
        if isinstance(error, BudgetError):
            facts |= {"minimum_budget": error.minimum, "levers": error.levers}
        if isinstance(error, InvalidSchedule):
            facts |= {"rule": error.rule, "instruction": error.instruction}
        print(json.dumps(facts))
    print(f"memplan: {message}", file=sys.stderr)
    raise SystemExit(status_of(error))


def status_of(error: Exception) -> int:
    """The exit status: 2 for a budget that cannot be read, 3 for one that cannot be met, 1 for any other error."""
    if isinstance(error, BudgetError):
        return 2 if error.minimum is None else 3
    return 1

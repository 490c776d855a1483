"""What a person sees on standard error while a command works: a running line on a terminal, else a line now and then.

Nothing is silent for longer than `PERIOD` and a second, whatever the stage does: a thread of its own keeps the time.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

SHORT = 1.0  # seconds: a command that ends sooner shows its answer, or its error, and nothing else
PERIOD = 3.0  # seconds between two lines of one stage
TICK = 0.5  # seconds between two looks at the clock
Report = Callable[[str, float], None]


@contextmanager
def progress(stage: str, quiet: bool = False) -> Iterator[Report]:
    """Show that work is under way. Yields what to call with (stage, share done); a share of 0 or 1 says nothing.

    What is printed meanwhile goes to standard error: a user's model may print, and standard output is for the answer.

    Args:
        stage: the first.
        quiet: show nothing.
    """
    console = Console(stderr=True, highlight=False)
    with redirect_stdout(sys.stderr):
        if quiet:
            yield lambda stage, done: None
        elif console.is_terminal:
            with RunningLine(console) as line:
                line.tell(stage, 0.0)
                yield line.tell
        else:
            with Lines() as lines:
                lines.tell(stage, 0.0)
                yield lines.tell


def elapsed(began: float) -> str:
    """`7 s`, `1:07 min`: since a reading of the monotonic clock."""
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02} min" if minutes else f"{seconds} s"


class Lines:
    """A line for each stage when it first begins, and one every few seconds, after a short while. Use as a context manager."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.stage, self.done = "", 0.0
        self.told: set[str] = set()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.clock = threading.Thread(target=self.keep_time, daemon=True)

    def __enter__(self) -> "Lines":
        self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.clock.join()

    def tell(self, stage: str, done: float) -> None:
        """Note where the work is."""
        self.stage, self.done = stage, done
        self.look()

    def keep_time(self) -> None:
        """Write every `PERIOD` while nothing else is written."""
        while not self.ended.wait(TICK):
            self.look()

    def look(self) -> None:
        """Write a line if one is due."""
        now = time.monotonic()
        if now - self.began >= SHORT and (self.stage not in self.told or now - self.last >= PERIOD):
            self.told.add(self.stage)
            self.write()

    def write(self) -> None:
        """One line: how long it has been, what is done, and how much of it where that is known."""
        share = f", {self.done:.0%}" if 0 < self.done < 1 else ""
        with self.lock, suppress(OSError, ValueError):  # nobody reads standard error
            print(f"memplan: {elapsed(self.began)}: {self.stage}{share}", file=sys.stderr, flush=True)
            self.last = time.monotonic()


class Elapsed(ProgressColumn):
    """The time since the command began, which runs whatever a stage says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()

    def render(self, task: Task) -> Text:
        """As `elapsed` has it."""
        return Text(elapsed(self.began), style="progress.elapsed")


class RunningLine:
    """A spinner, the stage, its bar and the time, on one line that is gone at the end. Use as a context manager."""

    def __init__(self, console: Console):
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), Elapsed()
        self.bars = Progress(*columns, console=console, transient=True)
        self.task: TaskID | None = None
        self.stage, self.measured = "", False

    def __enter__(self) -> "RunningLine":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def tell(self, stage: str, done: float) -> None:
        """Show the stage. rich stops a task that has reached its total, and keeps a total it once had: so a new stage, and one
        whose share ends, is a new task."""
        measured = 0 < done < 1
        if self.task is None or stage != self.stage or measured != self.measured:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.stage, self.measured = stage, measured
            self.task = self.bars.add_task(stage, total=1.0 if measured else None)
        if measured:
            self.bars.update(self.task, completed=done)

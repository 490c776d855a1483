"""What the commands share: rows kept as JSON lines, questions to fresh processes, tables in markdown."""

import datetime
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..backends.measure.training import CHILD

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MIB = 1 << 20
GIB = 1 << 30
Row = dict[str, Any]


# What glibc's malloc does with what is freed: whatever it does by default; gives it back at once, so that the resident set
# follows the tensors; keeps all of it, so that no step pays for pages that an earlier one has touched.
MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "returning": CHILD,
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 * MIB)},
}
ALLOCATORS = (
    "Single operations and whole steps are timed with an allocator that keeps what is freed, and totals are taken with one "
    "that gives it back, both glibc's (`MALLOC` in `record.py`)."
)

MACHINE = {"task": "machine"}  # of the row that notes one
FILES = ("file", "bare")  # of a row: kept relative to the folder of the results


class Results:
    """Rows of a file, to which each measurement is added as it is made, so that a run that was cut short can go on.

    Each row has the processor (`on`) of the last machine noted before it, which its line leaves out.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        self.on: str | None = None
        for line in path.read_text().splitlines() if path.is_file() else ():
            if line.strip():
                self.rows.append(self.placed(self.located(json.loads(line))))

    def placed(self, row: Row) -> Row:
        """A row with its processor."""
        if matches(row, MACHINE):
            self.on = row["cpu"]
            return row
        return row | {"on": self.on}

    def add(self, row: Row) -> Row:
        """Append a row, to the file as well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = self.placed(row)
        self.rows.append(row)
        with self.path.open("a") as stream:
            stream.write(self.text(row))
        return row

    def located(self, row: Row) -> Row:
        """A row whose files are where this machine has them."""
        return row | {key: str(self.path.parent / row[key]) for key in FILES if key in row}

    def text(self, row: Row) -> str:
        """A row's line, which names no folder of this machine."""
        here = f"{self.path.parent}/"
        known = {key: value for key, value in row.items() if key != "on"}
        return json.dumps(known | {key: str(row[key]).removeprefix(here) for key in FILES if key in row}) + "\n"

    def drop(self, **keys: Any) -> None:
        """Remove the rows with these values, and machines that nothing is left of."""
        rows = [row for row in self.rows if not matches(row, keys)]
        followers = zip_longest(rows, rows[1:], fillvalue=MACHINE)
        self.rows = [row for row, after in followers if not (matches(row, MACHINE) and matches(after, MACHINE))]
        self.on = next((row["cpu"] for row in reversed(self.rows) if matches(row, MACHINE)), None)
        if self.path.is_file():
            self.path.write_text("".join(self.text(row) for row in self.rows))

    def all(self, **keys: Any) -> list[Row]:
        """The rows with these values that did not fail."""
        return [row for row in self.rows if matches(row, keys) and "failed" not in row]

    def last(self, **keys: Any) -> Row | None:
        """The latest row with these values that did not fail."""
        return next(iter(reversed(self.all(**keys))), None)

    def failed(self, **keys: Any) -> Row | None:
        """The latest row with these values, if it failed."""
        found = [row for row in self.rows if matches(row, keys)]
        return found[-1] if found and "failed" in found[-1] else None


def matches(row: Row, keys: Row) -> bool:
    """Whether a row has these values."""
    return all(row.get(key) == value for key, value in keys.items())


# Fresh processes


def ask(module: str, request: Row, *, malloc: str = "default", timeout: float | None = None) -> Iterator[Row]:
    """Rows that `python -m memplan.benchmarks.<module>` answers to a request; the last has `failed` if it failed.

    Args:
        module: serves a request on its standard input, as `answer` does.
        request: what to do.
        malloc: one of `MALLOC`, what the process's allocator does with freed memory.
        timeout: seconds.
    """
    environment = {**os.environ, **MALLOC[malloc]}
    command = [sys.executable, "-P", "-m", f"memplan.benchmarks.{module}", "--serve"]
    text, failed = json.dumps(request), None
    try:
        child = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=timeout)
        lines, status, errors = child.stdout.splitlines(), child.returncode, child.stderr
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        lines, status = (output.decode() if isinstance(output, bytes) else output).splitlines(), 0
        failed, errors = f"took more than {timeout:.0f} s", ""
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)
    if status:
        last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
        failed = f"killed by signal {-status}" if status < 0 else last[0][:300]
    if failed:
        yield {"failed": failed}


def answer(serve: Any) -> None:
    """Read a request from standard input and print the rows that `serve` makes of it, each as soon as it is known."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model or a compiler prints must not get between the rows
    for row in serve(json.loads(sys.stdin.read())):
        output.write(json.dumps(row) + "\n")
        output.flush()


def say(text: str) -> None:
    """Progress, on standard error, with the time of day."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# Tables


def machine_lines() -> Row:
    """What the measurements were taken on."""
    import torch

    from .. import __version__
    from ..planner.cost.local import cpu_name, memory_limit

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        **MACHINE,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory_limit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "memplan": __version__ + (f" ({git.stdout.strip()})" if git.returncode == 0 else ""),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def note_machine(results: Results) -> None:
    """Keep what this machine is, unless the last note says the same."""
    facts = machine_lines()
    if results.last(**MACHINE) != facts:
        results.add(facts)


def header(title: str, results: Results) -> list[str]:
    """The top of a markdown file: the title, and each machine that rows were taken on."""
    lines = [f"# {title}", ""]
    for row in results.all(**MACHINE):
        gpu = f"{row['gpu']}, " if "gpu" in row else ""
        lines.append(
            f"- {row['date']}: {gpu}{row['cpu']}, {row['cores']} cores, torch on {row['threads']} threads, "
            f"{row['memory'] / GIB:.1f} GiB, torch {row['torch']}, Python {row['python']}, memplan {row['memplan']}"
        )
    return [*lines, ""]


def paragraph(text: str) -> list[str]:
    """Prose, in lines of the width that the files have."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, figures flush right."""
    rule = [":--", *["--:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)] + [""]


def mib(size: float | None) -> str:
    """Bytes in MiB, to a tenth."""
    return "-" if size is None else f"{size / MIB:.1f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{share:.{digits}%}"


def ratio(value: float | None) -> str:
    """A ratio, to three decimals."""
    return "-" if value is None else f"{value:.3f}"


def verdict(met: bool | None) -> str:
    """Whether a goal was met; a dash where nothing was measured."""
    return "-" if met is None else "yes" if met else "**no**"


def mean(values: Iterable[float]) -> float | None:
    """The arithmetic mean, None of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else None

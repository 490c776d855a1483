"""What an op costs: measured figures where a table has them, else an estimate and a model of workspaces.

Costs enter a program in one place, `apply_costs`. Nothing here runs a kernel; `backends.measure.worker` does that and fills
the table.
"""

import hashlib
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..ir.coverage import Coverage
from ..ir.machine import Machine
from ..ir.program import Op, Program
from .cache import cache_directory, file_name, locked, write_atomically
from .estimate import Estimate, Sample, Work, roofline
from .gauge import Reading, Reference
from .workspaces import modelled_workspace

__all__ = ["Coverage", "Figures", "Table", "apply_costs", "coverage", "roofline"]

FORMAT = 4  # 3 did not know how fast the machine was
TRIES = 2


class Figures(NamedTuple):
    """What was measured of a call.

    Attributes:
        seconds: it takes.
        workspace: bytes beside its operands.
        disturbed: whether other work got in the way of every run, so that the time is only an upper bound.
        reading: how fast the machine was then; None where that is not known.
        work: of the op, for estimates of others of its kind.
        tries: how often it was timed again because the machine had been slow, and was so again.
    """

    seconds: float
    workspace: int
    disturbed: bool = False
    reading: Reading | None = None
    work: Work | None = None
    tries: int = 0


# Measurements


class TableFile(msgspec.Struct, frozen=True):
    """A table on disk. Keys are hashed, for they are long; None marks a key that cannot be measured."""

    device: str
    entries: dict[str, Figures | None]
    format: int = FORMAT


class Table:
    """What was measured on one device: op key -> seconds and workspace bytes.

    Attributes:
        device: what the figures hold for, as `planner.cost.local.device_key` names it.
        path: the file they are kept in.
        reference: the fastest that the device has been seen.
    """

    def __init__(self, device: str, directory: Path | None = None):
        """Open the device's table, which is empty where there is no file or none that can be read."""
        self.device = device
        self.path = (directory or cache_directory()) / file_name("costs", device)
        self.reference = Reference(device, directory)
        self.entries = self.read()

    def __contains__(self, key: str) -> bool:
        """Whether the key was tried, successfully or not."""
        return digest(key) in self.entries

    def __len__(self) -> int:
        return sum(figures is not None for figures in self.entries.values())

    def get(self, key: str) -> Figures | None:
        """What was measured; None where the key was not measured or cannot be."""
        return self.entries.get(digest(key))

    def doubts(self, figures: Figures | None) -> bool:
        """Whether these are figures of which the time is only an upper bound: in other work's way, or of a slow hour.

        Where the machine was slow each time, though it was not before, that is how fast it is while it works: a processor
        that has grown hot, say.
        """
        if figures is None or figures.reading is None:
            return figures is not None and figures.disturbed
        slow = figures.tries < TRIES and self.reference.doubts(figures.reading)
        return figures.disturbed or figures.reading.disturbed or slow

    def note_tries(self, keys: Iterable[str]) -> None:
        """Remember that ops were timed again while the machine seemed quiet, where that has not helped."""
        for key in keys:
            figures = self.get(key)
            if figures is not None and self.doubts(figures):
                self.entries[digest(key)] = figures._replace(tries=figures.tries + 1)

    def update(self, found: Mapping[str, Figures | None]) -> None:
        """Add figures by key; None marks a key that cannot be measured."""
        self.entries = self.merged(self.entries, {digest(key): figures for key, figures in found.items()})

    def replace(self, found: Mapping[str, Figures | None]) -> None:
        """Put figures in the place of those that are there and in the file, whatever those are; and save."""
        made = {digest(key): figures for key, figures in found.items()}
        self.entries |= made
        self.save(made)

    def samples(self) -> list[Sample]:
        """What is known of which work, for estimates."""
        return [Sample(figures.work, figures.seconds, not self.doubts(figures)) for figures in self.entries.values()
                if figures is not None and figures.work is not None]  # fmt: skip

    def merged(self, old: Mapping[str, Figures | None], new: Mapping[str, Figures | None]) -> dict[str, Figures | None]:
        """The better figures of each key: those not in doubt first, the least time among them.

        What disturbs a run only lengthens it. One figure is the median of several runs already, so that a single one that
        cannot be has no say.
        """
        made = dict(old)
        for key, figures in new.items():
            before = old.get(key)
            if before is not None and figures is not None:
                figures = min(figures, before, key=lambda each: (self.doubts(each), each.seconds))
            made[key] = figures if figures is not None else before
        return made

    def read(self) -> dict[str, Figures | None]:
        """The entries on disk; a file that makes no sense is left aside with a warning."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"cannot read the measurements in {self.path}: {error.strerror}", stacklevel=3)
            return {}
        try:
            file = msgspec.json.decode(content, type=TableFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            warnings.warn(f"ignoring {self.path}, which is not a table of measurements: {error}", stacklevel=3)
            return {}
        if file.format != FORMAT or file.device != self.device:
            return {}
        usable = {key: f for key, f in file.entries.items() if f is None or (0 < f.seconds < float("inf") and f.workspace >= 0)}
        if len(usable) < len(file.entries):
            warnings.warn(f"ignoring impossible figures in {self.path}", stacklevel=3)
        return usable

    def save(self, instead: Mapping[str, Figures | None] | None = None) -> None:
        """Write the table, with what other processes have added to the file since; a failure is a warning.

        Args:
            instead: what counts whatever the file has of it, by digest.
        """
        try:
            with locked(self.path):
                self.entries = self.merged(self.read(), self.entries) | dict(instead or {})
                write_atomically(self.path, msgspec.json.encode(TableFile(self.device, self.entries)))
        except OSError as error:
            warnings.warn(f"cannot keep the measurements in {self.path}: {error.strerror}", stacklevel=2)


def digest(key: str) -> str:
    """What stands for a key on disk."""
    return hashlib.sha256(key.encode()).hexdigest()


# Programs


def apply_costs(program: Program, machine: Machine, table: Table | None = None) -> Program:
    """The program with time and workspace for every op, and buffers of the sizes that the machine hands out.

    A time that was measured beside other work is an upper bound and no more: some are a hundred times too long, and a plan that
    believed them would repeat much to spare one addition. So such an op costs the least of its bound and of its estimate,
    which rests on ops that were timed in quiet (`estimate`). Whether plans should be chosen by more, as the best under both
    what was timed and what is estimated, was tried on a small transformer whose ops took 1.1 to 4 times their roofline, by
    kind, and 25 % more or less by op: with 10 to 100 % of the ops marked and 1.5 to 500 times too long, at two budgets, the
    plans chosen by these costs take at most 1.3 % longer than those chosen by the true ones (6.3 % where the bounds are
    believed). So they are not: there is less to gain than the search itself leaves.

    Args:
        program: as captured.
        machine: its first tier rounds buffers; its first unit gives the times that were not measured.
        table: measurements of the device; None or a missing key falls back on the roofline and a modelled workspace.
    """
    rounding = machine.tiers[0].rounding
    buffers = tuple(
        msgspec.structs.replace(buffer, bytes=-(-buffer.bytes // rounding) * rounding) for buffer in program.buffers
    )

    estimate = Estimate(table.samples() if table is not None else (), machine)

    def cost(op: Op) -> Op:
        figures = table.get(op.key) if table is not None else None
        if figures is None:
            written = sum(program.buffers[buffer].bytes for buffer in op.writes)
            modelled = modelled_workspace(op.key, written, program.device)
            figures = Figures(estimate.seconds(op), modelled + op.workspace)  # an update's own, and unread results
        elif table is not None and table.doubts(figures):
            figures = figures._replace(seconds=min(figures.seconds, estimate.seconds(op)))
        return msgspec.structs.replace(op, seconds=figures.seconds, workspace=figures.workspace)

    return msgspec.structs.replace(program, buffers=buffers, ops=tuple(cost(op) for op in program.ops))


def coverage(
    program: Program, table: Table | None, runs: Iterable[int] | None = None, alike: int = 0, spoilt: bool = False
) -> Coverage:
    """What the table covers of a step of a program that `apply_costs` has been through.

    Args:
        program: with its costs.
        table: that they came from; None for a machine that is not at hand.
        runs: the ops that the step runs, as often as it does; default: each once.
        alike: how many measured ops the other times rest on.
        spoilt: whether other work got in the way when the machine's rates were found.
    """
    ops = program.ops if runs is None else [program.ops[run] for run in runs]
    found = [(op, table.get(op.key) if table is not None else None) for op in ops]
    known = [(op, figures) for op, figures in found if figures is not None]
    days = sorted(figures.reading.when for _, figures in known if figures.reading is not None)
    return Coverage(
        ops=len(ops),
        measured=len(known),
        seconds=sum(op.seconds for op in ops),
        measured_seconds=sum(op.seconds for op, _ in known),
        disturbed_seconds=sum(op.seconds for op, figures in known if table is not None and table.doubts(figures)),
        device=table.device if table is not None else "",
        since=day_of(days[0]) if days else "",
        until=day_of(days[-1]) if days else "",
        alike=alike,
        spoilt=spoilt,
    )


def day_of(when: int) -> str:
    """The day of a time in seconds since 1970, as 2026-11-30."""
    return time.strftime("%Y-%m-%d", time.localtime(when))

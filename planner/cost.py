"""What an op costs: measured figures where a table has them, else the machine's roofline and a model of workspaces.

Costs enter a program in one place, `apply_costs`. Nothing here runs a kernel; `backends.measure` does that and fills
the table.
"""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from .cache import cache_directory, file_name, locked, write_atomically
from .keys import read_key
from .machine import Machine
from .program import Op, Program
from .units import show_seconds
from .workspaces import modelled_workspace


class Figures(NamedTuple):
    """What was measured of a call.

    Attributes:
        seconds: it takes.
        workspace: bytes beside its operands.
        disturbed: whether other work got in the way of every run, so that the time is only an upper bound.
    """

    seconds: float
    workspace: int
    disturbed: bool = False


FORMAT = 3
# Seconds of Python in a call of an optimizer's step that comes between large kernels, and so finds no cache warm; seen on two
# cores of an Intel Xeon, where a loop of such calls takes a fifth of it each. Beside a GPU it runs while kernels do.
OPTIMIZER_CALL = 2.5e-4


# Roofline


def roofline(op: Op, machine: Machine) -> float:
    """Seconds that the op takes at least on the machine's first unit: the longest of compute, memory and launch."""
    unit = machine.units[0]
    tier = machine.tiers[machine.tier_index(unit.tier)]
    call = read_key(op.key)
    dtype = next((tensor.dtype for tensor in call.tensors if tensor.floating), "default") if call else "default"
    rate = unit.flops.get(dtype, unit.flops["default"]) * unit.efficiency
    python = OPTIMIZER_CALL if machine.device == "cpu" and op.target.startswith("optimizer.") else 0.0
    return max(op.flops / rate, op.traffic / tier.bandwidth, unit.launch) + python


# Measurements


class TableFile(msgspec.Struct, frozen=True):
    """A table on disk. Keys are hashed, for they are long; None marks a key that cannot be measured."""

    device: str
    entries: dict[str, Figures | None]
    format: int = FORMAT


class Table:
    """What was measured on one device: op key -> seconds and workspace bytes.

    Attributes:
        device: what the figures hold for, as `planner.local.device_key` names it.
        path: the file they are kept in.
    """

    def __init__(self, device: str, directory: Path | None = None):
        """Open the device's table, which is empty where there is no file or none that can be read."""
        self.device = device
        self.path = (directory or cache_directory()) / file_name("costs", device)
        self.entries = self.read()

    def __contains__(self, key: str) -> bool:
        """Whether the key was tried, successfully or not."""
        return digest(key) in self.entries

    def __len__(self) -> int:
        return sum(figures is not None for figures in self.entries.values())

    def get(self, key: str) -> Figures | None:
        """What was measured; None where the key was not measured or cannot be."""
        return self.entries.get(digest(key))

    def update(self, found: Mapping[str, Figures | None]) -> None:
        """Add figures by key; None marks a key that cannot be measured."""
        self.entries = merged(self.entries, {digest(key): figures for key, figures in found.items()})

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

    def save(self) -> None:
        """Write the table, with what other processes have added to the file since; a failure is a warning."""
        try:
            with locked(self.path):
                self.entries = merged(self.read(), self.entries)
                write_atomically(self.path, msgspec.json.encode(TableFile(self.device, self.entries)))
        except OSError as error:
            warnings.warn(f"cannot keep the measurements in {self.path}: {error.strerror}", stacklevel=2)


def merged(old: Mapping[str, Figures | None], new: Mapping[str, Figures | None]) -> dict[str, Figures | None]:
    """The newer figures, but for those that were disturbed and have better ones before them."""
    made = dict(old)
    for key, figures in new.items():
        before = old.get(key)
        if figures is not None and figures.disturbed and before is not None:
            figures = min(before, figures, key=lambda each: (each.disturbed, each.seconds))
        made[key] = figures
    return made


def digest(key: str) -> str:
    """What stands for a key on disk."""
    return hashlib.sha256(key.encode()).hexdigest()


# Programs


def apply_costs(program: Program, machine: Machine, table: Table | None = None) -> Program:
    """The program with time and workspace for every op, and buffers of the sizes that the machine hands out.

    Args:
        program: as captured.
        machine: its first tier rounds buffers; its first unit gives the times that were not measured.
        table: measurements of the device; None or a missing key falls back on the roofline and a modelled workspace.
    """
    rounding = machine.tiers[0].rounding
    buffers = tuple(
        msgspec.structs.replace(buffer, bytes=-(-buffer.bytes // rounding) * rounding) for buffer in program.buffers
    )

    def cost(op: Op) -> Op:
        figures = table.get(op.key) if table is not None else None
        if figures is None:
            written = sum(program.buffers[buffer].bytes for buffer in op.writes)
            modelled = modelled_workspace(op.key, written, program.device)
            figures = Figures(roofline(op, machine), modelled + op.workspace)  # an update's own, and unread results
        return msgspec.structs.replace(op, seconds=figures.seconds, workspace=figures.workspace)

    return msgspec.structs.replace(program, buffers=buffers, ops=tuple(cost(op) for op in program.ops))


class Coverage(msgspec.Struct, frozen=True):
    """How much of a program's cost was measured rather than modelled.

    Attributes:
        ops: ops in the program.
        measured: those of them with measured figures.
        seconds: of all ops, run once each.
        measured_seconds: of the measured ones.
    """

    ops: int
    measured: int
    seconds: float
    measured_seconds: float

    def __str__(self) -> str:
        share = self.measured_seconds / self.seconds if self.seconds > 0 else 0.0
        return f"{self.measured} of {self.ops} ops measured, {share:.1%} of {show_seconds(self.seconds)}"


def coverage(program: Program, table: Table | None) -> Coverage:
    """What the table covers of a program that `apply_costs` has been through."""
    known = [op for op in program.ops if table is not None and table.get(op.key) is not None]
    return Coverage(
        ops=len(program.ops),
        measured=len(known),
        seconds=sum(op.seconds for op in program.ops),
        measured_seconds=sum(op.seconds for op in known),
    )

"""What `memplan alloc` does: a file of buffers, pool by pool, to addresses that were checked."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...solvers.face.answer import Limit, Status
from ...solvers.storage.methods import method as placing
from ...solvers.warm import compile_addresses
from ..ir.bufferfile import Trace, read_trace, write_trace
from ..ir.errors import MemplanError
from ..ir.units import parse_bytes, show_bytes, show_count
from ..pipeline.storage import PlacedPool, place_pools, pools_of
from .solver import check_solver, solving

WORST_FIRST = (Status.INFEASIBLE, Status.UNKNOWN, Status.FEASIBLE, Status.OPTIMAL)


@dataclass(frozen=True)
class Places:
    """The answer for a file.

    Attributes:
        file: that was read.
        trace: what it says.
        pools: the answer for each memory.
        seconds: it took to find.
    """

    file: Path
    trace: Trace
    pools: list[PlacedPool]
    seconds: float

    @property
    def offsets(self) -> list[int]:
        """Of each buffer; 0 where there is no answer."""
        found = [0] * len(self.trace.ids)
        for pool in self.pools:
            for row, offset in zip(pool.rows, () if pool.packing.best is None else pool.packing.best.tolist(), strict=False):
                found[row] = offset
        return found

    @property
    def reason(self) -> str:
        """Why there is no answer, in one line, or empty."""
        found = [(pool.name, pool.reason) for pool in self.pools if pool.reason]
        return "" if not found else f"pool {found[0][0]!r}: {found[0][1]}" if len(self.pools) > 1 else found[0][1]

    @property
    def peak(self) -> int | None:
        """Bytes of all pools together; None where one has no answer."""
        peaks = [pool.peak for pool in self.pools]
        return None if None in peaks else sum(peak for peak in peaks if peak is not None)

    @property
    def bound(self) -> int:
        """No addresses need fewer bytes, all pools together."""
        return sum(pool.packing.bound for pool in self.pools)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        many = len(self.pools) > 1
        status = min((pool.packing.status for pool in self.pools), key=WORST_FIRST.index)
        facts: dict[str, Any] = {
            "peak": self.peak,
            "lower_bound": self.bound,
            "status": status.value,
            "seconds": self.seconds,
            "buffers": len(self.trace.ids),
            "method": "by pool" if many else self.pools[0].packing.method,
            "capacity": None if many else self.pools[0].capacity,
        }
        facts |= {"pools": {pool.name: facts_of(pool) for pool in self.pools}} if many else {}
        return facts | ({"reason": self.reason} if self.reason else {})

    def rows(self) -> list[tuple[str, ...]]:
        """For people: what, the figure, and what to say of it."""
        peak = self.peak or 0
        over = peak / self.bound - 1 if self.bound else 0.0
        rows: list[tuple[str, ...]] = [
            ("peak", f"{peak}", show_bytes(peak)),
            ("lower bound", f"{self.bound}", "proven smallest" if not over else f"peak is {over:.2%} above"),
        ]
        if len(self.pools) > 1:
            for pool in self.pools:
                how = f"{show_count(len(pool.rows), 'buffer')}, placed by {pool.packing.method}"
                rows.append((f"pool {pool.name}", f"{pool.peak}", how))
        else:
            rows.append(("buffers", f"{len(self.trace.ids)}", f"placed by {self.pools[0].packing.method}"))
        return [*rows, ("seconds", f"{self.seconds:.3f}", "")]


@solving()
def find_places(
    file: Path, capacity: str | None, align: int, method: str, time_limit: float, seed: int,
    report: Callable[[str, float], None], solver: str | None = None,
) -> Places:  # fmt: skip
    """Read a file and place its buffers.

    Args:
        file: CSV, as `planner/ir/bufferfile.py` says.
        capacity: bytes to fit into, for every pool, or as `fast=1MiB,slow=4GiB`; None for the smallest peaks.
        align: every offset is a multiple of it, and of what the file's column `alignment` says.
        method: one of `METHODS`.
        time_limit: seconds for all pools together.
        seed: of the search.
        report: told what is being done.
        solver: of the integer program, which is the method then; default: HiGHS, where that is the method.

    Raises:
        TraceError: what is wrong in the file, with row and column.
        MemplanError: a capacity names no pool, or the solver cannot be used, or not with the method.
        PlacementError: addresses did not pass the check.
    """
    return AllocSession(file, capacity, align, method, solver).place(time_limit, seed, report)


class AllocSession:
    """One file read, to be placed. The arguments are those of `find_places`."""

    def __init__(self, file: Path, capacity: str | None, align: int, method: str, solver: str | None = None):
        self.way, self.solver = placing(method_of(method, solver)), solver
        self.file, self.trace = file, read_trace(file)
        self.pools = pools_of(file, self.trace, align, capacities(capacity, file, list(self.trace.by_pool())))

    def place(self, time_limit: float, seed: int, report: Callable[[str, float], None]) -> Places:
        """Addresses for every pool; what has to be compiled first takes none of the time."""
        compile_addresses(report)
        report("placing", 0.0)
        began = time.perf_counter()
        placed = place_pools(self.pools, self.way, Limit(seconds=time_limit, seed=seed, solver=self.solver))
        return Places(self.file, self.trace, placed, time.perf_counter() - began)


def method_of(method: str, solver: str | None) -> str:
    """The method that a solver leaves: it solves an integer program.

    Raises:
        MemplanError: the solver cannot be used, or not with the method.
    """
    check_solver(solver)
    if solver is None:
        return method
    if method not in ("auto", "mip"):
        raise MemplanError(f"solver={solver!r} solves an integer program, and the method {method} is none: give method mip")
    return "mip"


def capacities(text: str | None, file: Path, names: list[str]) -> dict[str, int | None]:
    """The bytes of each pool: of all alike, or of those named."""
    if text is None or "=" not in text:
        return dict.fromkeys(names, None if text is None else parse_bytes(text, what="capacity"))
    named = {name.strip(): size for name, _, size in (word.partition("=") for word in text.split(","))}
    for name in named:
        if name not in names:
            pools = ", ".join(map(repr, names)) if names != [""] else "none"
            raise MemplanError(f"--capacity names the pool {name!r}, and the pools of {file} are: {pools}")
    return {name: parse_bytes(named[name], what="capacity") if name in named else None for name in names}


def facts_of(pool: PlacedPool) -> dict[str, Any]:
    """A pool for JSON."""
    found = pool.packing
    return {
        "peak": pool.peak, "lower_bound": found.bound, "status": found.status.value, "buffers": len(pool.rows),
        "method": found.method, "capacity": pool.capacity,
    }  # fmt: skip


def write_places(places: Places, out: Path | None, pictures: list[Path]) -> None:
    """The file again with offsets, and the packing drawn, pools one above the other."""
    trace, offsets = places.trace, places.offsets
    if out is not None:
        write_trace(out, trace, offsets)
    if not pictures:
        return
    from ...backends.report.pictures import packing, save

    base, lifted = 0, list(offsets)
    for pool in places.pools:
        for row in pool.rows:
            lifted[row] += base
        base += pool.peak or 0
    room = places.pools[0].capacity if len(places.pools) == 1 else None
    for path in pictures:
        save(packing(places.file.name, trace.spans, trace.sizes, lifted, places.bound, room), path)

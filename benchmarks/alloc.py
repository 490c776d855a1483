"""Addresses: MiniMalloc's public instances, the same as blocks that come again, and rectangles cut at random.

    python -m memplan.benchmarks.alloc
    python -m memplan.benchmarks.alloc --peer 12      omnimalloc's supermalloc beside it, with 12 threads, if installed

Every packing is checked by walking through time. Seconds are of a process that has the compiled functions loaded; the
time to load them is on a row of its own, and compiling them for the first time takes half a minute once.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..planner.ir.bufferfile import read_trace
from ..planner.ir.referee import first_clash
from ..planner.pipeline.storage import approve, storage_of
from ..solvers.face.answer import Limit
from ..solvers.storage import allocate
from ..solvers.storage.instances import cut_rectangle, tower
from ..solvers.storage.levels import pack_levels
from ..solvers.storage.problem import Storage, peak_of
from .command import Command
from .record import HERE, Results, Row, ask, header, markdown, ratio, say

INSTANCES = "ABCDEFGHIJK"
DATA = HERE / "data" / "minimalloc"
CAPACITY = 1048576
SIZES = (1_000, 10_000, 100_000, 1_000_000)
BLOCKS = 32
KEPT = (50_000, 7_000)  # bytes that each block keeps
FRAYS = (0.0, 0.02, 0.1, 0.3)


def cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def warm_up() -> float:
    """Load the compiled functions; seconds."""
    began = time.perf_counter()
    for count, fray in ((40, 0.0), (60, 0.1)):  # the second is too hard for the fast answers
        allocate.solve(cut_rectangle(count, 5, fray=fray)[0], Limit(seconds=2.0))
    return time.perf_counter() - began


def timed(storage: Storage, capacity: int | None, seconds: float) -> tuple[Row, np.ndarray | None]:
    """One packing: its row, and the offsets."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    made = allocate.solve(storage, Limit(capacity, seconds))
    row: Row = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "status": made.status.value}
    peak = peak_of(storage, made.best) if made.best is not None else None
    return row | {"peak": peak, "bound": made.bound, "load": storage.bound, "method": made.method}, made.best


def serve(request: Row) -> Iterator[Row]:
    """Answer a request of `run`: one row."""
    yield measure(request)


def measure(request: Row) -> Row:
    """What the parent asks for."""
    loading = warm_up()
    if request["task"] == "instance":
        trace = read_trace(Path(request["file"]))
        storage = storage_of(Path(request["file"]), trace, 1)
        row, offset = timed(storage, request["capacity"], request["seconds"])
        if offset is not None:
            approve(trace, offset.tolist(), 1)
        return row | {"loading": loading, "buffers": len(storage)}
    if request["task"] == "peer":
        return peer(request)
    if request["task"] == "tower":
        return towers(request)
    storage, _ = cut_rectangle(request["count"], request["seed"], fray=request["fray"])
    row, offset = timed(storage, None, request["seconds"])
    if offset is not None and len(storage) <= 100_000:
        columns = (storage.lower, storage.upper, offset, storage.size, np.arange(len(storage)))
        assert first_clash(zip(*(column.tolist() for column in columns), strict=True)) is None
    return row | {"buffers": len(storage), "optimum": 2**40}


def towers(request: Row) -> Row:
    """An instance as a block that comes many times, each time with buffers that are kept: flat, and on two levels."""
    trace = read_trace(Path(request["file"]))
    block = storage_of(Path(request["file"]), trace, 1)
    storage = tower(block, request["blocks"], KEPT)
    began = time.perf_counter()
    flat = allocate.solve(storage, Limit(seconds=request["seconds"]), blocks=False).found
    middle = time.perf_counter()
    levels = pack_levels(storage, allocate.solve, request["seconds"])
    row: Row = {"buffers": len(storage), "load": storage.bound, "flat": peak_of(storage, flat), "wall": middle - began}
    if levels is not None:
        columns = (storage.lower, storage.upper, levels.offset, storage.size, np.arange(len(storage)))
        assert first_clash(zip(*(column.tolist() for column in columns), strict=True)) is None
        row |= {"levels": peak_of(storage, levels.offset), "rigid": levels.rigid, "found": levels.blocks[0],
                "levels_wall": time.perf_counter() - middle}  # fmt: skip
    return row


def peer(request: Row) -> Row:
    """omnimalloc's supermalloc, minimising, on the same file."""
    import omnimalloc  # pyright: ignore[reportMissingImports]
    from omnimalloc.allocators import SupermallocAllocator  # pyright: ignore[reportMissingImports]

    trace = read_trace(Path(request["file"]))
    jobs = [omnimalloc.Allocation(id=name, size=size, start=spans[0][0], end=spans[0][1])
            for name, size, spans in zip(trace.ids, trace.sizes, trace.spans, strict=True)]  # fmt: skip
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = omnimalloc.allocate(jobs, SupermallocAllocator(timeout=request["seconds"], num_threads=request["threads"]))
    spent = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
    found = {each.id: each.offset for each in done}
    approve(trace, [found[name] for name in trace.ids], 1)
    return spent | {"peak": max(each.offset + each.size for each in done)}


def run(results: Results, options: argparse.Namespace) -> None:
    """Everything that is missing."""

    def once(request: Row, **keys: Any) -> None:
        if results.last(**keys) is None:
            say(", ".join(f"{value}" for value in keys.values()))
            for row in ask("alloc", request, timeout=900):
                results.add(keys | row)

    for name in options.instances:
        file = str(options.data / f"{name}.{CAPACITY}.csv")
        once({"task": "instance", "file": file, "capacity": CAPACITY, "seconds": 20.0}, task="capacity", name=name)
        once({"task": "instance", "file": file, "capacity": None, "seconds": 30.0}, task="minimise", name=name)
        if options.peer:
            request = {"task": "peer", "file": file, "threads": options.peer, "seconds": 30.0}
            once(request, task="peer", name=name, threads=options.peer)
    for name in options.instances:
        file = str(options.data / f"{name}.{CAPACITY}.csv")
        request = {"task": "tower", "file": file, "blocks": options.blocks, "seconds": 10.0}
        once(request, task="tower", name=name, blocks=options.blocks)
    for count in options.sizes:
        for fray in FRAYS:
            request = {"task": "cut", "count": count, "seed": 1, "fray": fray, "seconds": 10.0}
            once(request, task="cut", count=count, fray=fray)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Addresses", results)
    lines += ["Written by `python -m memplan.benchmarks.alloc`. Seconds are CPU time of all threads unless called wall.", ""]
    fits = {row["name"]: row for row in results.all(task="capacity")}
    least = {row["name"]: row for row in results.all(task="minimise")}
    peers = {row["name"]: row for row in results.all(task="peer")}
    heads = ["instance", "buffers", "fits 1048576", "CPU s", "smallest peak", "over bound", "proven", "wall s", "found by"]
    heads += ["supermalloc over bound", "its wall s"] if peers else []
    rows = []
    for name in sorted(set(fits) & set(least)):
        fit, low = fits[name], least[name]
        row = [name, low["buffers"], "yes" if fit["status"] == "optimal" else "**no**", f"{fit['cpu']:.2f}", low["peak"]]
        row += [ratio(low["peak"] / low["load"]), "yes" if low["status"] == "optimal" else "no", f"{low['wall']:.2f}"]
        row += [low["method"]]
        if name in peers:
            row += [ratio(peers[name]["peak"] / low["load"]), f"{peers[name]['wall']:.1f}"]
        rows.append(tuple(map(str, row)))
    lines += ["## MiniMalloc's instances", ""]
    if fits:
        solved = [row["cpu"] for row in fits.values() if row["status"] == "optimal"]
        lines += [f"Within the capacity: {len(solved)} of {len(fits)}, median {np.median(solved):.2f} CPU s, worst "
                  f"{max(solved):.2f}. Loading the compiled functions took {fits[min(fits)]['loading']:.1f} s.", "",
                  f"Smallest peak within 30 s: {sum(row['status'] == 'optimal' for row in least.values())} of {len(least)} "
                  f"proven.", "", *markdown(tuple(heads), rows), ""]  # fmt: skip
    stacked = sorted(results.all(task="tower"), key=lambda row: row["name"])
    lines += ["## Repetition", "", "An instance as a block that comes many times, under kept buffers; 10 s each.",
              "*Rigid*: blocks as rectangles, before the repair.", ""]  # fmt: skip
    rows = [(row["name"], str(row["blocks"]), str(row["buffers"]), ratio(row["flat"] / row["load"]), f"{row['wall']:.2f}",
             ratio(row["rigid"] / row["load"]), ratio(row["levels"] / row["load"]), f"{row['levels_wall']:.2f}")
            for row in stacked if "levels" in row]  # fmt: skip
    heads = ["instance", "blocks", "buffers", "flat over bound", "wall s", "rigid", "two levels over bound", "wall s"]
    lines += markdown(tuple(heads), rows)
    lines += ["## Rectangles cut at random", ""]
    lines += ["*Frayed* by a share: lifetimes cut short by up to it, so that buffers no longer fit one another exactly, while"]
    lines += ["one moment keeps the bound. 10 s of search, where there are few enough buffers.", ""]
    cuts = sorted(results.all(task="cut"), key=lambda row: (row["fray"], row["count"]))
    rows = [(str(row["buffers"]), f"{row['fray']:.0%}", ratio(row["peak"] / row["optimum"]), f"{row['wall']:.2f}",
             row["method"]) for row in cuts]  # fmt: skip
    lines += markdown(("buffers", "frayed", "peak over optimum", "wall s", "found by"), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.instances, options.sizes, options.blocks = ["B", "C"], [1000], 4


def main() -> None:
    """The command line."""
    command = Command("alloc", __doc__, run, render, serve, quick=quick, small="two instances")
    command.add("--data", type=Path, default=DATA, help="folder of the instances")
    command.add("--instances", nargs="*", default=list(INSTANCES))
    command.add("--sizes", type=int, nargs="*", default=list(SIZES), help="of the cut rectangles")
    command.add("--blocks", type=int, default=BLOCKS, help="of the repetition")
    command.add("--peer", type=int, default=0, metavar="THREADS", help="also run omnimalloc's supermalloc")
    command()


if __name__ == "__main__":
    main()

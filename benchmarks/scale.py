"""Plans for what does not fit here: Llama shapes on the meta device, for machines that are not here.

    python -m memplan.benchmarks.scale
    python -m memplan.benchmarks.scale --shapes 7b --depths 8 16

Each plan is made in a fresh process, whose peak resident size is reported with the seconds of tracing and of solving.
The depth table plans 7B's shape with more and fewer layers, each for half of its own unplanned peak, on eight GPUs
taken as one, so that capacity never decides.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from .command import Command
from .record import GIB, Results, Row, ask, header, markdown, percent, say, verdict

# name -> (budget, machine, optimizer, seconds allowed for tracing and solving)
SHAPES: dict[str, tuple[str, str, str, float]] = {
    "7b": ("80GB", "h100-80gb", "adamw", 90.0),
    "70b": ("640GB", "h100-8x80gb", "adamw", 240.0),
}
DEPTHS = (8, 16, 32, 64, 128)
DEPTH_MACHINE = "h100-8x80gb"
MOST_MEMORY = 8e9  # bytes
MOST_SOLVING = 15.0  # seconds
LINEAR = 1.1  # growth of time over growth of depth that still counts as linear, for noise


def serve(request: Row) -> Iterator[Row]:
    """Plan one shape in this process."""
    began = time.monotonic()
    from ..planner.verbs.plan import plan
    from .models import llama_7b, llama_70b
    from .planning import facts_of

    name, layers = request["shape"], request["layers"]
    model, args = llama_70b() if name == "70b" else llama_7b(layers) if layers else llama_7b()
    built = time.monotonic()
    made = plan(
        model, request["budget"], args, optimizer=request["optimizer"], machine=request["machine"],
        time_limit=request["time_limit"],
    )  # fmt: skip
    done = time.monotonic()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    seconds = {"import_seconds": built - began, "plan_seconds": done - built, "rss": rss}
    yield facts_of(made) | seconds | {"resident": made.program.resident_bytes}


def measure(results: Results, request: Row, timeout: float) -> None:
    """One row, unless it is known."""
    keys = {"task": "scale", "shape": request["shape"], "layers": request["layers"]}
    if results.last(**keys):
        return
    say(f"{request['shape']}, {request['layers'] or 'all'} layers, {request['budget']} on {request['machine']}")
    for row in ask("scale", request, timeout=timeout):
        results.add(request | keys | row)
        if "failed" in row:
            say(f"failed: {row['failed']}")


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("shape", "machine", "budget", "peak", "unplanned", "smallest known", "step", "overhead", "gap", "ops",
             "tracing", "solving", "together", "planner's RSS", "goals met")  # fmt: skip
    rows = []
    for shape, (_, _, _, allowed) in SHAPES.items():
        row = results.last(task="scale", shape=shape, layers=None)
        if row is not None:
            rows.append((shape, row["machine"], *figures(row), verdict(goals(row, allowed))))
        elif failed := results.failed(task="scale", shape=shape, layers=None):
            rows.append((shape, failed["machine"], failed["failed"][:80], *[""] * 12))
    lines = header("Planning what does not fit here", results)
    allowances = ", ".join(f"{allowed:.0f} s ({shape})" for shape, (_, _, _, allowed) in SHAPES.items())
    lines += [
        "Written by `python -m memplan.benchmarks.scale --render`. Sequence 8192, batch 1, bfloat16. Sizes are GiB;",
        "times of steps are predictions of the machine's description. Goals: tracing and solving within",
        f"{allowances}, solving alone within {MOST_SOLVING:.0f} s, in under {MOST_MEMORY / 1e9:.0f} GB.",
        "",
        *markdown(heads, rows),
    ]
    depths = sorted(results.all(task="scale", shape="7b-depth"), key=lambda row: row["layers"])
    depths = list({row["layers"]: row for row in depths}.values())
    rows = []
    for before, row in zip([None, *depths], depths, strict=False):
        growth = "" if before is None else f"{spent(row) / spent(before):.2f}"
        rows.append((str(row["layers"]), *figures(row), growth))
    lines += [
        "## Depth",
        "",
        f"7B's layers, without an optimizer, for half of the unplanned peak, on {DEPTH_MACHINE}. Growth: of tracing",
        "and solving together, against the row above.",
        "",
        *markdown(("layers", *heads[2:-1], "growth"), rows),
    ]
    if len(depths) > 1:
        grown = [spent(b) / spent(a) * a["layers"] / b["layers"] <= LINEAR for a, b in pairwise(depths)]
        lines += [f"Linear in depth or less: {verdict(all(grown))}.", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def spent(row: Row) -> float:
    """Seconds of tracing and solving."""
    return row["capture_seconds"] + row["solve_seconds"]


def goals(row: Row, allowed: float) -> bool:
    """Whether a plan of a whole shape was made within time and memory."""
    return spent(row) <= allowed and row["solve_seconds"] <= MOST_SOLVING and 0 < row["rss"] < MOST_MEMORY


def figures(row: Row) -> tuple[str, ...]:
    """The columns from the budget to the planner's memory."""
    sizes = (row["budget"], row["peak"], row["unplanned_peak"], row["minimum"])
    return (
        *(f"{size / GIB:.1f}" for size in sizes), f"{row['time']:.3f} s", percent(row["overhead"]), percent(row["gap"]),
        str(row["ops"]), f"{row['capture_seconds']:.1f} s", f"{row['solve_seconds']:.1f} s", f"{spent(row):.1f} s",
        f"{row['rss'] / 1e9:.2f} GB",
    )  # fmt: skip


def run(results: Results, options: argparse.Namespace) -> None:
    """Both shapes, then the depths."""
    for shape in options.shapes:
        budget, machine, optimizer, _ = SHAPES[shape]
        request: Row = {"shape": shape, "layers": None, "budget": budget, "machine": machine, "optimizer": optimizer,
                        "time_limit": options.time_limit}  # fmt: skip
        measure(results, request, options.timeout)
    for layers in options.depths:
        request = {"shape": "7b-depth", "layers": layers, "budget": options.depth_budget, "machine": DEPTH_MACHINE,
                   "optimizer": None, "time_limit": options.time_limit}  # fmt: skip
        measure(results, request, options.timeout)


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.shapes, options.depths = [], [2, 4]


def main() -> None:
    """The command line."""
    command = Command("scale", __doc__, run, render, serve, quick=quick, small="two and four layers")
    command.add("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    command.add("--depths", nargs="*", type=int, default=list(DEPTHS), help="layers of 7B")
    command.add("--depth-budget", default="50%", help="of the depth table")
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

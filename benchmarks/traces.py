"""Addresses of real steps: every model, training and inference, planned and unplanned, flat and by equal blocks.

    python -m memplan.benchmarks.traces

Plans are made for a preset, so that nothing is measured but the placing. *Arena over live* is the arena's size over the
most bytes live at once, each buffer rounded up to the alignment: no arena is smaller. Every schedule with its addresses
is replayed by the referee. *Two levels* packs each repeating block once (MEMO's way), as rectangles, then repaired.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .command import Command
from .models import MODELS, build, gpt2
from .record import Results, Row, ask, header, markdown, ratio, say

MACHINE = "h100-80gb"
STEPS = ("unplanned", "50%", "smallest")
PASSES = ("train", "infer")
DEPTHS = (16, 32, 64, 128)
SECONDS = 2.0  # of search, for each placing


def serve(request: Row) -> Iterator[Row]:
    """Place the steps of one model."""
    if "layers" in request:
        made = gpt2(layers=request["layers"], width=64, heads=2, vocab=256, batch=2, seq=64)
        yield from steps(made, "train", ["unplanned"])
    else:
        yield from steps(build(request["model"]), request["pass"], list(STEPS))


def steps(made: tuple, kind: str, wanted: list[str]) -> Iterator[Row]:
    """Rows of the steps that there are plans for."""
    from ..planner.ir.errors import BudgetError
    from ..planner.verbs.session import Session

    model, args = made
    session = Session(model, args, train=kind == "train", machine=MACHINE, time_limit=60.0)
    planner = session.planner
    for step in wanted:
        try:
            side = planner.kept if step == "unplanned" else planner.floor
            if step == "50%":
                side = planner.solve(planner.unplanned.peak // 2).found
        except BudgetError:
            continue
        yield {"step": step} | place(side.program, session.machine, side.schedule)


class Timed(NamedTuple):
    """The answer of a call and the least of three times that it took, in seconds."""

    value: Any
    seconds: float


def timed(call: Callable[[], Any]) -> Timed:
    """Call three times."""
    spent, value = [], None
    for _ in range(3):
        began = time.perf_counter()
        value = call()
        spent.append(time.perf_counter() - began)
    return Timed(value, min(spent))


def place(program: Any, machine: Any, schedule: Any) -> Row:
    """Addresses for one schedule, flat and on two levels."""
    from ..passes.place import Place, find_lives, requests_of
    from ..planner.ir.referee import referee
    from ..solvers.face.answer import Limit
    from ..solvers.storage import allocate
    from ..solvers.storage.levels import pack_levels
    from ..solvers.storage.problem import peak_of

    lives = [life for life in find_lives(program, machine, schedule) if life.tier == 0]
    size = np.array([buffer.bytes for buffer in program.buffers], np.int64)
    storage, _ = requests_of(lives, size, machine.tiers[0].alignment)
    flat = timed(lambda: allocate.solve(storage, Limit(seconds=SECONDS), blocks=False))
    levels = timed(lambda: pack_levels(storage, allocate.solve, SECONDS))
    placed, (extent,) = Place(SECONDS)(program, machine, schedule)
    referee(program, machine, placed)
    row = {"buffers": len(storage), "live": extent.live, "arena": extent.bytes, "peak": peak_of(storage, flat.value.found),
           "wall": flat.seconds, "method": flat.value.method}  # fmt: skip
    if levels.value is not None:
        two = levels.value
        row |= {"blocks": two.blocks, "members": two.members, "rigid": two.rigid,
                "repaired": peak_of(storage, two.offset), "levels_wall": levels.seconds}  # fmt: skip
    return row


def run(results: Results, options: argparse.Namespace) -> None:
    """Everything that is missing."""
    jobs = [({"model": name, "pass": kind}, {"model": name, "pass": kind}) for name in options.models for kind in PASSES]
    jobs += [({"layers": layers}, {"model": f"depth {layers}", "pass": "train"}) for layers in options.depths]
    for request, keys in jobs:
        if results.last(**keys) is None:
            say(", ".join(keys.values()))
            for row in ask("traces", request, timeout=900):
                results.add(keys | row)


def cells(row: Row) -> tuple[str, ...]:
    """A row of either table, from the number of buffers on."""
    two = ("-",) * 5
    if "rigid" in row:
        two = (f"{row['blocks'][0]} ({row['blocks'][1]})", f"{row['members'] / row['buffers']:.0%}",
               ratio(row["rigid"] / row["live"]), ratio(row["repaired"] / row["live"]),
               f"{row['levels_wall'] * 1e3:.0f}")  # fmt: skip
    return (str(row["buffers"]), f"{row['arena'] / row['live']:.4f}", f"{row['wall'] * 1e3:.0f}", row["method"], *two)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    placed = [row for row in results.all() if "arena" in row]
    models = [row for row in placed if not row["model"].startswith("depth")]
    depths = [row for row in placed if row["model"].startswith("depth")]
    heads = ("buffers", "arena over live", "ms", "found by", "blocks (different)", "of all buffers", "two levels over live",
             "repaired", "ms")  # fmt: skip
    lines = header("Addresses of real steps", results)
    lines += [f"Written by `python -m memplan.benchmarks.traces`. Plans for {MACHINE}; times are the least of three.", ""]
    if models:
        worst = max(row["arena"] / row["live"] for row in models)
        two = [row["repaired"] / row["peak"] for row in models if "rigid" in row]
        lines += [f"{len(models)} steps: the arena is at most {worst:.4f} of the live bytes.", ""]
        if two:
            lines += [f"On two levels, against flat: {np.mean(two):.4f} on average, {max(two):.4f} at worst, after the repair "
                      f"({np.mean([row['rigid'] / row['peak'] for row in models if 'rigid' in row]):.4f} on average before "
                      f"it).", ""]  # fmt: skip
    lines += markdown(("model", "pass", "step", *heads),
                      [(row["model"], row["pass"], row["step"], *cells(row)) for row in models])  # fmt: skip
    lines += ["## Depth", "", "The unplanned training step of a GPT-2 of equal layers.", ""]
    lines += markdown(("layers", *heads), [(row["model"].split()[1], *cells(row)) for row in depths])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.depths = ["gpt2:tiny"], [4]


def main() -> None:
    """The command line."""
    command = Command("traces", __doc__, run, render, serve, quick=quick)
    command.add_models(MODELS)
    command.add("--depths", type=int, nargs="*", default=list(DEPTHS), help="layers")
    command()


if __name__ == "__main__":
    main()

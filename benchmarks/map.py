"""Inferences on a scratchpad: bytes beyond the compulsory ones, against rules, and executed on real bytes.

    python -m memplan.benchmarks.map
    python -m memplan.benchmarks.map --networks vit_b_16 nasnet_a --curve 0 --no-run

For each of the fourteen networks of `examples/networks`, in 8 bits, in 8 bits with ops run again in place of loads, in 8 bits
with weights in the scratchpad, and in 32 bits: a mapping at COSMA's three sizes (the largest op, halfway, the smallest peak),
the rules of `solvers/scratchpad/replacement.py`, and what a byte less says; in the first of these, then a curve over sizes
between the first and the last. In 32 bits the mappings are run on the scratchpad machine beside the model, and so are the
inferences of models that the other benchmarks train.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..planner.ir.errors import BudgetError
from ..planner.ir.machine import load_machine
from ..planner.verbs.map import compared, map_model
from .command import Command
from .models import build
from .record import (
    HERE,
    Results,
    Row,
    ask,
    header,
    markdown,
    mean,
    paragraph,
    percent,
    ratio,
    say,
    verdict,
)

NAMES = (
    "resnet50", "densenet121", "resnext50", "r2plus1d_18", "s3d", "fcn", "lraspp", "deeplabv3", "transformer", "vit_b_16",
    "nasnet_a", "amoebanet_d", "pnasnet_5", "darts",
)  # fmt: skip
SEARCHED = ("nasnet_a", "amoebanet_d", "pnasnet_5", "darts")  # found by search, not drawn by hand
TRAINED = tuple(f"{name} (trained)" for name in ("gpt2", "llama", "bert", "vit", "resnet50", "t5", "unet"))
SIZES = ("M_R", "M_H", "M_P")


class Group(NamedTuple):
    """Rows of the table: bits of an element, whose, and whether weights take room, ops may run again, mappings are run,
    and whether there is a curve over sizes."""

    bits: int
    names: tuple[str, ...] = NAMES
    weights: bool = False
    recompute: bool = False
    run: bool = False
    curve: bool = False

    @property
    def key(self) -> Row:
        """What its rows have in common."""
        return {"task": "map", "bits": self.bits, "weights": self.weights, "recompute": self.recompute}


GROUPS = {
    "8 bits": Group(8, curve=True),
    "8 bits, ops may run again": Group(8, recompute=True),
    "8 bits, weights in the scratchpad": Group(8, weights=True),
    "32 bits": Group(32, run=True),
    "32 bits, ops may run again": Group(32, recompute=True, run=True),
    "Models that are trained elsewhere here, the inference and its loss": Group(32, TRAINED, run=True),
}
BANDWIDTH = min(link.bandwidth for link in load_machine("scratchpad").links)


def serve(request: Row) -> Iterator[Row]:
    """Everything about one network in one number of bits."""
    with torch.device("cpu" if request["run"] else "meta"):
        model, args = make(request["name"])
    options: dict[str, Any] = {each: request[each] for each in ("bits", "weights", "recompute", "time_limit")}
    made = map_model(model.eval(), "M_P", args, **options)
    low, high = made.mapper.landmarks["M_R"], made.mapper.landmarks["M_P"]
    for size in SIZES:
        made.mapping = made.mapper.map(made.mapper.landmarks[size], request["time_limit"])
        made.__dict__.pop("baselines", None)
        row = {"size": size} | made.facts()
        if request["run"]:
            began = time.perf_counter()
            row |= compared(made, args, {}) | {"run_seconds": time.perf_counter() - began}
        yield row
    try:
        made.mapper.map(low - 1)
    except BudgetError as error:
        yield {"size": "M_R - 1", "refused": str(error)}
    for number in range(request["curve"]):
        capacity = low + (high - low) * (number + 1) // (request["curve"] + 1)
        if low < high:
            found = made.mapper.map(capacity, request["time_limit"])
            yield {"size": "curve", "scratchpad": capacity, "noncompulsory": found.noncompulsory, "lower_bound": found.bound,
                   "seconds": found.seconds}  # fmt: skip


def make(name: str) -> tuple[torch.nn.Module, tuple]:
    """A network, or a model that is trained, by name."""
    if name in TRAINED:
        return build(name.partition(" ")[0])
    sys.path.insert(0, str(HERE.parent / "examples" / "networks"))
    torch.manual_seed(0)
    return importlib.import_module("all").NETWORKS[name]()


def measure(results: Results, name: str, group: str, options: argparse.Namespace) -> None:
    """One network in one group of the table, unless it is there."""
    kind = GROUPS[group]
    if results.last(**kind.key, name=name, size="M_R") is not None:
        return
    say(f"{name}, {group}")
    request = kind.key | {"name": name, "bits": None if kind.bits == 32 else kind.bits, "time_limit": options.time_limit,
                          "run": kind.run and not options.no_run, "curve": options.curve * kind.curve}  # fmt: skip
    for row in ask("map", request, timeout=options.timeout):
        results.add(kind.key | {"name": name} | row)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Inferences on a scratchpad", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.map`. Networks of `examples/networks`, batch 1, weights not in the "
        "scratchpad where nothing else is said, fused as `passes/fuse.py` says. Sizes are COSMA's (arXiv 2311.18246): M_R, "
        "the largest op's operands and results; M_P, the smallest peak of any order, proven; M_H, halfway. *Moved*: bytes "
        "beyond the compulsory ones, by the referee's count, with an address for every operand. *Best*, *mean* of the rules: "
        "orders as traced and of smallest peak, Belady's choice and a small integer program, arenas of TensorFlow Lite and "
        "XLA; those of the eight that find addresses. *Run*: on a machine of exactly that many bytes, against the model. "
        "*Of ideal*: time by the machine's clock over the larger of computing and its busier link. *Of least*: the same over "
        "the least time that this order and residency allow, whenever their copies start (`scratchpad/overlap.py`), or, where "
        "ops run again, over computing. *Again*: ops run a second time; of such mappings no bound is known, so they stand "
        "beside *once*, the fewest bytes without."
    )
    for group, kind in GROUPS.items():
        found = {name: landmarks(results, name, group) for name in kind.names}
        rows = [row_of(row, kind, once(results, row)) for mine in found.values() for row in mine]
        if rows:
            judged = ["once, KiB", "less than once", "again"] if kind.recompute else ["bound, KiB", "gap"]
            heads = ["network", "size", "KiB", "moved, KiB", *judged, "seconds", "best rule, KiB", "mean rule, KiB", "rules",
                     "less than best", "less than mean", *["run"] * kind.run, "of ideal", "of least"]  # fmt: skip
            lines += [f"## {group}", "", *markdown(heads, rows)]
            lines += repeated(results, found) if kind.recompute else summary(found)
    for group in GROUPS:
        lines += curves(results, group)
    refused = results.last(task="map", size="M_R - 1")
    if refused is not None:
        lines += paragraph(f"A byte less than M_R, {refused['name']}: *{refused['refused']}*")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def landmarks(results: Results, name: str, group: str) -> list[Row]:
    """The rows of a network, one for each different size."""
    rows = [results.last(**GROUPS[group].key, name=name, size=size) for size in SIZES]
    return list({row["scratchpad"]: row for row in rows if row is not None}.values())


def once(results: Results, row: Row) -> Row:
    """The row of the same mapping without ops that run again."""
    wanted = {key: row[key] for key in ("task", "name", "bits", "weights", "size")}
    return results.last(**wanted, recompute=False) or row


def row_of(row: Row, kind: Group, before: Row) -> list[str]:
    """A line of the table."""
    known = known_of(row)
    best, average = min(known, default=None), mean(known)
    judged = [kib(row["lower_bound"]), percent(row["gap"])]
    if kind.recompute:
        judged = [kib(before["noncompulsory"]), percent(saved(row, before["noncompulsory"])), str(row["repeated"])]
    cells = [
        row["name"], row["size"], kib(row["scratchpad"]), kib(row["noncompulsory"]), *judged, f"{row['seconds']:.2f}",
        kib(best), kib(average), f"{len(known)} of {len(row['baselines'])}",
        percent(saved(row, best)), percent(saved(row, average)),
    ]  # fmt: skip
    ran = "-" if "equal" not in row else "equal" if row["equal"] else f"{row['difference']:.0e}"
    times = [ratio(row["time"] / ideal_of(row)), ratio(row["time"] / row["least_time"])]
    return [*cells, *[ran] * kind.run, *times]


def ideal_of(row: Row) -> float:
    """Seconds of computing or of the busier link, whichever are more."""
    return max(row["compute_time"], *(size / BANDWIDTH for size in row["moved"].values()))


def kib(size: float | None) -> str:
    """Bytes in KiB."""
    return "-" if size is None else f"{size / 1024:.1f}"


def saved(row: Row, size: float | None) -> float | None:
    """The share of a rule's bytes that the mapping spares; None where the rule moves none or finds no addresses."""
    return None if not size else 1 - row["noncompulsory"] / size


def summary(found: dict[str, list[Row]]) -> list[str]:
    """What a group of the table comes to."""
    lines = []
    for title, names in (("drawn by hand", [n for n in found if n not in SEARCHED]), ("found by search", SEARCHED)):
        rows = [row for name in names for row in found.get(name, ())]
        if not rows:
            continue
        pressed = [row for row in rows if row["size"] == "M_R" and row["sizes"]["M_R"] < row["sizes"]["M_P"]]
        best = mean([s for row in pressed if (s := saved(row, min(known_of(row), default=None))) is not None])
        average = mean([s for row in pressed if (s := saved(row, mean(known_of(row)))) is not None])
        gap, seconds = max(row["gap"] for row in rows), [row["seconds"] for row in rows]
        lines += paragraph(
            f"Networks {title}: {sum(row['noncompulsory'] <= row['lower_bound'] for row in rows)} of {len(rows)} "
            f"mappings proven "
            f"best, largest gap {percent(gap)}; {mean(seconds) or 0:.2f} s on average, {max(seconds):.2f} s at most. At "
            f"M_P all move "
            f"nothing: {verdict(all(not row['noncompulsory'] for row in rows if row['scratchpad'] == row['sizes']['M_P']))}. "
            f"M_R < M_P: {', '.join(row['name'] for row in pressed) or 'none'}; at M_R, against the best rule that "
            f"finds addresses "
            f"{percent(best)} less on average, against their mean {percent(average)}. Time over the least: at most "
            f"{ratio(max(row['time'] / row['least_time'] for row in rows))}; over the ideal: at most "
            f"{ratio(max(row['time'] / ideal_of(row) for row in rows))}, at M_P "
            f"{ratio(max(row['time'] / ideal_of(row) for row in rows if row['scratchpad'] == row['sizes']['M_P']))}."
        )
    return lines


def repeated(results: Results, found: dict[str, list[Row]]) -> list[str]:
    """What a group of the table comes to where ops run again."""
    pairs = [(row, once(results, row)) for mine in found.values() for row in mine]
    moving = [(row, before) for row, before in pairs if before["noncompulsory"]]
    less = mean([share for row, before in moving if (share := saved(row, before["noncompulsory"])) is not None])
    times = [row["time"] / before["time"] for row, before in moving]
    return paragraph(
        f"Of {len(moving)} mappings that move anything without, {sum(not row['noncompulsory'] for row, _ in moving)} move "
        f"nothing beyond the compulsory bytes now, and on average they move {percent(less)} less. They take "
        f"{ratio(min(times, default=1.0))} to {ratio(max(times, default=1.0))} of the time."
    )


def known_of(row: Row) -> list[int]:
    """The bytes of the rules that find addresses."""
    return [size for size in row["baselines"].values() if size is not None]


def curves(results: Results, group: str) -> list[str]:
    """Sizes between M_R and M_P."""
    kind = GROUPS[group]
    rows = []
    for name in kind.names:
        found = results.all(**kind.key, name=name, size="curve")
        if found:
            rows.append([name, *(f"{kib(row['noncompulsory'])}{'' if row['noncompulsory'] <= row['lower_bound'] else '*'}"
                                 for row in found)])  # fmt: skip
    if not rows:
        return []
    count = max(len(row) for row in rows) - 1
    return [
        f"## Between M_R and M_P: {group}", "",
        *paragraph("KiB moved beyond the compulsory ones, at sizes evenly between; a star where not proven best."),
        *markdown(["network", *(f"{number + 1}/{count + 1}" for number in range(count))], rows),
    ]  # fmt: skip


def run(results: Results, options: argparse.Namespace) -> Iterator[None]:
    """Every group of every network."""
    for group in options.groups:
        for name in (name for name in options.networks if name in GROUPS[group].names):
            measure(results, name, group, options)
            yield


def forget(results: Results, options: argparse.Namespace) -> None:
    """Drop the networks' rows."""
    for name in options.networks:
        results.drop(name=name)


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.networks, options.curve, options.time_limit = ["vit_b_16", "r2plus1d_18"], 2, 5.0
    options.groups = ["8 bits"]


def main() -> None:
    """The command line."""
    command = Command("map", __doc__, run, render, serve, quick=quick, small="two networks", forget=forget)
    known = [*NAMES, *TRAINED]
    command.add("--networks", nargs="+", default=known, choices=known, metavar="NAME", help=", ".join(known))
    command.add("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="GROUP", help=" | ".join(GROUPS))
    command.add("--curve", type=int, default=10, help="sizes between M_R and M_P; 0: none")
    command.add("--no-run", action="store_true", help="plan only")
    command.add_limits(planning=50.0, process=1800.0)
    command()


if __name__ == "__main__":
    main()

"""Inferences on a scratchpad: bytes beyond the compulsory ones, against rules, and executed on real bytes.

    python -m memplan.benchmarks.map
    python -m memplan.benchmarks.map --networks vit_b_16 nasnet_a --curve 0 --no-run

For each of the fourteen networks of `examples/networks`, in 8 and in 32 bits: a mapping at COSMA's three sizes (the largest
op, halfway, the smallest peak), the rules of `solvers/replacement.py`, and what a byte less says; then a curve over sizes
between the first and the last. In 32 bits the mappings are run on the scratchpad machine beside the model.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..planner.errors import BudgetError
from ..planner.machine import load_machine
from ..planner.maps import compared, map_model
from .record import (
    HERE,
    Results,
    Row,
    answer,
    ask,
    header,
    markdown,
    mean,
    note_machine,
    options_of,
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
SIZES = ("M_R", "M_H", "M_P")
BANDWIDTH = min(link.bandwidth for link in load_machine("scratchpad").links)


def serve(request: Row) -> Iterator[Row]:
    """Everything about one network in one number of bits."""
    sys.path.insert(0, str(HERE.parent / "examples" / "networks"))
    factory = importlib.import_module("all").NETWORKS[request["name"]]
    torch.manual_seed(0)
    with torch.device("cpu" if request["run"] else "meta"):
        model, args = factory()
    options: dict[str, Any] = {"bits": request["bits"], "weights": request["weights"], "time_limit": request["time_limit"]}
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


def measure(results: Results, name: str, bits: int, options: argparse.Namespace) -> None:
    """One network in one number of bits, unless it is there."""
    if results.last(name=name, bits=bits, size="M_R") is not None:
        return
    say(f"{name}, {bits} bits")
    request = {"name": name, "bits": None if bits == 32 else bits, "weights": False, "time_limit": options.time_limit,
               "run": bits == 32 and not options.no_run, "curve": options.curve}  # fmt: skip
    for row in ask("map", request, timeout=options.timeout):
        results.add({"task": "map", "name": name, "bits": bits} | row)


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    lines = header("Inferences on a scratchpad", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.map`. Networks of `examples/networks`, batch 1, weights not in the "
        "scratchpad, fused as `passes/fuse.py` says. Sizes are COSMA's (arXiv 2311.18246): M_R, the largest op's operands "
        "and results; M_P, the smallest peak of any order, proven; M_H, halfway. *Moved*: bytes beyond the compulsory ones, "
        "by the referee's count, with an address for every operand. *Best*, *mean* of the rules: orders as traced and of "
        "smallest peak, Belady's choice and a small integer program, arenas of TensorFlow Lite and XLA; those of the eight "
        "that find addresses. *Run*: on a machine of exactly that many bytes, against the model. *Of ideal*: time by the "
        "machine's clock over the larger of computing and its busier link. *Of least*: the same over the least time that "
        "this order and residency allow, whenever their copies start (`solvers/overlap.py`)."
    )
    for bits in sorted({row["bits"] for row in results.all(task="map")}):
        lines += [f"## {bits} bits", ""]
        heads = ["network", "size", "KiB", "moved, KiB", "bound, KiB", "gap", "seconds", "best rule, KiB", "mean rule, KiB",
                 "rules", "less than best", "less than mean"]  # fmt: skip
        heads += ["run", "of ideal", "of least"] if bits == 32 else []
        rows = [row_of(row, bits) for name in NAMES for row in landmarks(results, name, bits)]
        lines += markdown(heads, rows)
        lines += summary(results, bits)
    lines += curves(results)
    refused = results.last(task="map", size="M_R - 1")
    if refused is not None:
        lines += paragraph(f"A byte less than M_R, {refused['name']}: *{refused['refused']}*")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def landmarks(results: Results, name: str, bits: int) -> list[Row]:
    """The rows of a network, one for each different size."""
    rows = [results.last(task="map", name=name, bits=bits, size=size) for size in SIZES]
    return list({row["scratchpad"]: row for row in rows if row is not None}.values())


def row_of(row: Row, bits: int) -> list[str]:
    """A line of the table."""
    known = [size for size in row["baselines"].values() if size is not None]
    best, average = min(known, default=None), mean(known)
    cells = [
        row["name"], row["size"], kib(row["scratchpad"]), kib(row["noncompulsory"]), kib(row["lower_bound"]),
        percent(row["gap"]), f"{row['seconds']:.2f}", kib(best), kib(average), f"{len(known)} of {len(row['baselines'])}",
        percent(saved(row, best)), percent(saved(row, average)),
    ]  # fmt: skip
    if bits != 32:
        return cells
    ran = "-" if "equal" not in row else "equal" if row["equal"] else f"{row['difference']:.0e}"
    ideal = max(row["compute_time"], *(size / BANDWIDTH for size in row["moved"].values()))
    return [*cells, ran, ratio(row["time"] / ideal), ratio(row["time"] / row["least_time"])]


def kib(size: float | None) -> str:
    """Bytes in KiB."""
    return "-" if size is None else f"{size / 1024:.1f}"


def saved(row: Row, size: float | None) -> float | None:
    """The share of a rule's bytes that the mapping spares; None where the rule moves none or finds no addresses."""
    return None if not size else 1 - row["noncompulsory"] / size


def summary(results: Results, bits: int) -> list[str]:
    """What the table comes to."""
    lines = []
    for title, names in (("drawn by hand", [n for n in NAMES if n not in SEARCHED]), ("found by search", SEARCHED)):
        rows = [row for name in names for row in landmarks(results, name, bits)]
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
            f"{percent(best)} less on average, against their mean {percent(average)}."
        )
    return lines


def known_of(row: Row) -> list[int]:
    """The bytes of the rules that find addresses."""
    return [size for size in row["baselines"].values() if size is not None]


def curves(results: Results) -> list[str]:
    """Sizes between M_R and M_P."""
    lines = []
    for bits in sorted({row["bits"] for row in results.all(task="map", size="curve")}):
        rows = []
        for name in NAMES:
            found = results.all(task="map", name=name, bits=bits, size="curve")
            if found:
                rows.append([name, *(f"{kib(row['noncompulsory'])}{'' if row['noncompulsory'] <= row['lower_bound'] else '*'}"
                                     for row in found)])  # fmt: skip
        if rows:
            count = max(len(row) for row in rows) - 1
            lines += [f"## Between M_R and M_P, {bits} bits", ""]
            lines += paragraph("KiB moved beyond the compulsory ones, at sizes evenly between; a star where not proven best.")
            lines += markdown(["network", *(f"{number + 1}/{count + 1}" for number in range(count))], rows)
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 32], choices=(8, 16, 32), help="of an element")
    parser.add_argument("--curve", type=int, default=10, help="sizes between M_R and M_P; 0: none")
    parser.add_argument("--no-run", action="store_true", help="plan only")
    parser.add_argument("--time-limit", type=float, default=50.0, help="seconds of search for each mapping, at most")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for each network")
    options_of(parser, "map", "two networks")
    options = parser.parse_args()
    if options.serve:
        return answer(serve)
    if options.quick:
        options.networks, options.curve, options.time_limit = ["vit_b_16", "r2plus1d_18"], 2, 5.0
        options.bits, options.out = [8], options.out / "quick"
    results = Results(options.out / "map.jsonl")
    if not options.render:
        for name in options.networks if options.fresh else ():
            results.drop(name=name)
        note_machine(results)
        for bits in options.bits:
            for name in options.networks:
                measure(results, name, bits, options)
                render(results, options.out / "map.md")
    render(results, options.out / "map.md")
    print(options.out / "map.md")
    return None


if __name__ == "__main__":
    main()

"""How far from the fastest possible: the gap that comes with each plan, at half and at 30 % of the unplanned peak.

    python -m memplan.benchmarks.optimal

A gap of 3 % says that no schedule within the budget that keeps the order of ops is faster by more than 3 %: it is
`(time - bound) / time`, with a bound from linear relaxations. Costs are those measured on this machine. That plans of
small graphs are the very best is tested against an exact solver in tests/.
"""

import argparse
from pathlib import Path

from .command import Command, each_model
from .models import FIVE
from .record import Results, ask, header, markdown, mib, percent, ratio, say, verdict

BUDGETS = ("50%", "30%")
GOAL = 0.05


def measure(results: Results, name: str, options: argparse.Namespace) -> None:
    """Plan one model for each budget that is missing."""
    missing = [budget for budget in options.budgets if not results.last(task="gap", model=name, label=budget)]
    if not missing:
        return
    say(f"{name}: {', '.join(missing)}")
    request = {"model": name, "folder": str(options.out / "plans" / "gap"), "time_limit": options.time_limit,
               "budgets": {budget: budget for budget in missing}}  # fmt: skip
    for row in ask("planning", request, malloc="returning", timeout=options.timeout):
        results.add({"task": "gap", "model": name} | row)
        if "failed" in row:
            say(f"{name} failed: {row['failed']}")


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("model", "budget", "MiB", "predicted peak", "overhead", "gap", "solving", f"gap <= {GOAL:.0%}")
    rows = []
    for row in {(row["model"], row["label"]): row for row in results.all(task="gap")}.values():
        if row.get("infeasible"):
            rows.append((row["model"], row["label"], "infeasible", f"smallest known {mib(row['minimum'])}", *["-"] * 4))
            continue
        rows.append((
            row["model"], row["label"], mib(row["budget"]), mib(row["peak"]), ratio(row["overhead"]),
            percent(row["gap"], 2), f"{row['solve_seconds']:.1f} s", verdict(row["gap"] <= GOAL),
        ))  # fmt: skip
    lines = header("Gaps to a lower bound", results)
    lines += ["Written by `python -m memplan.benchmarks.optimal --render`.", "", *markdown(heads, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models = ["gpt2:tiny"]


def main() -> None:
    """The command line."""
    command = Command("optimal", __doc__, each_model(measure), render, quick=quick)
    command.add_models(FIVE)
    command.add("--budgets", nargs="+", default=list(BUDGETS), help="as in memplan.plan")
    command.add_limits()
    command()


if __name__ == "__main__":
    main()

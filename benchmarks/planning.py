"""Plans for one model, made in a process of their own and saved: one capture for many budgets.

The process runs with the allocator that the steps will be measured under, for what an op costs depends on it, and
memplan keeps its measurements apart by it.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from ..planner.ir.errors import BudgetError
from ..planner.ir.plan import Plan
from ..planner.verbs.session import Session
from .models import build
from .record import Row, answer

SEARCHES = 4  # plans made to find the budget of a given overhead


def facts_of(plan: Plan) -> Row:
    """A plan's figures."""
    return {
        "budget": plan.budget,
        "peak": plan.peak,
        "time": plan.time,
        "overhead": plan.time / plan.unplanned.time - 1,
        "gap": plan.gap,
        "status": plan.status,
        "minimum": plan.minimum,
        "unplanned_peak": plan.unplanned.peak,
        "unplanned_time": plan.unplanned.time,
        "recomputed": plan.counts.recompute,
        "offloaded": plan.counts.offload,
        "moved": plan.moved,
        "ops": len(plan.program.ops),
        "capture_seconds": plan.capture_seconds,
        "solve_seconds": plan.solve_seconds,
        "schedule": hashlib.sha256(msgspec.json.encode(plan.schedule)).hexdigest()[:16],
    }


def attempt(
    session: Session, label: str, budget: int | str | None, folder: Path, arena: bool = False, strategy: str | None = None
) -> Row:
    """One plan, saved; where no schedule fits, the smallest budget that works."""
    began = time.monotonic()
    try:
        plan = session.plan(budget, arena, strategy)
    except BudgetError as error:
        return {"label": label, "budget": budget, "infeasible": True, "minimum": error.minimum}
    row = facts_of(plan) | {"label": label, "wall_seconds": time.monotonic() - began}
    file = folder / f"{row['schedule']}.json"
    plan.save(file)
    return row | {"file": str(file)}


def serve(request: Row) -> Iterator[Row]:
    """Plan a model for every budget asked for.

    The request has `model`, `folder`, `time_limit` (seconds for each plan), and any of `budgets` (by label; "none" for
    no budget; with `arena`, for steps in one, and with `lend` for gradients in it too), `points` (how many, from the
    unplanned peak to the floor), and `overhead` (a share: the plan of about that predicted overhead, found by bisection).
    """
    torch.manual_seed(0)
    model, args = build(request["model"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(model, args, time_limit=request["time_limit"], lend_gradients=request.get("lend", False))
    for label, budget in request.get("budgets", {}).items():
        yield attempt(session, label, None if budget == "none" else budget, folder, request.get("arena", False))
    if "points" in request:
        top, bottom, points = session.planner.unplanned.peak, session.planner.floor.peak, request["points"]
        made = []
        for index in range(points):
            made.append(attempt(session, f"sweep:{index}", top - (top - bottom) * index // max(points - 1, 1), folder))
            yield made[-1]
        if "overhead" in request:
            yield from bisect(session, [row for row in made if "overhead" in row], request["overhead"], folder)


def bisect(session: Session, sweep: list[Row], overhead: float, folder: Path) -> Iterator[Row]:
    """The smallest budget found whose predicted overhead is at most the given one, between two points of a sweep."""
    good = [row for row in sweep if row["overhead"] <= overhead]
    bad = [row for row in sweep if row["overhead"] > overhead]
    if not good or not bad:
        return
    high, low = min(row["budget"] for row in good), max(row["budget"] for row in bad)
    best = None
    for _ in range(SEARCHES):
        middle = (high + low) // 2
        row = attempt(session, f"overhead:{overhead}", middle, folder)
        if row.get("overhead", 1.0) <= overhead:
            best, high = row, middle
        else:
            low = middle
    if best is not None:
        yield best


def main() -> None:
    """Answer a request of `record.ask`."""
    answer(serve)


if __name__ == "__main__":
    main()

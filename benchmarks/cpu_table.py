"""The tables of cpu.py, from its rows: the claims first, then each model."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .record import MIB, Results, Row, header, markdown, mean, mib, percent, ratio, verdict
from .step import paired_ratio

SLACK = 0.03, 16 * MIB  # what a measured total may exceed its budget by
PREDICTION = 0.05  # how far a measured total may be from the predicted one
FREE = 1.03  # time over eager's where nothing has to be saved
CHEAP = 1.05  # time over eager's that counts as almost free
PAGES = 0.005  # by which two measurements of the same step differ
WORTH = 0.02  # an overhead smaller than this is noise, and not divided by
TOLERANCE = 0.01  # by which a peak may rise where the budget falls, for noise


@dataclass(frozen=True)
class Point:
    """A plan, what was measured of it, and eager's times beside its own."""

    plan: Row
    peak: Row
    slower: float | None

    @property
    def total(self) -> int:
        """Bytes measured."""
        return self.peak["total"]

    @property
    def within(self) -> bool:
        """Whether the measured total keeps the budget, by the slack allowed."""
        share, fixed = SLACK
        return self.total <= (self.plan["budget"] or self.plan["unplanned_peak"]) * (1 + share) + fixed


class Measured:
    """Everything measured of one model."""

    def __init__(self, results: Results, name: str):
        self.results, self.name = results, name
        self.eager = self.peak("eager")
        self.checkpoint = self.peak("checkpoint")
        self.plans = {row["label"]: row for row in results.all(task="plan", model=name)}
        self.sweep = [point for label in self.labels("sweep:") if (point := self.point(label)) is not None]
        self.points = [point for label in self.plans if (point := self.point(label)) is not None]

    def peak(self, method: str) -> Row | None:
        """The row of a peak that was found."""
        row = self.results.last(task="peak", model=self.name, method=method)
        return row if row is not None and row["total"] is not None else None

    def labels(self, prefix: str) -> list[str]:
        """Labels of plans, in the order of their numbers."""
        found = [label for label in self.plans if label.startswith(prefix)]
        return sorted(found, key=lambda label: float(label.rpartition(":")[2]))

    def point(self, label: str) -> Point | None:
        """The plan of that label, if it exists and was measured."""
        plan = self.plans.get(label)
        if plan is None or "schedule" not in plan:
            return None
        peak = self.peak(plan["schedule"])
        return Point(plan, peak, self.slower(plan["schedule"])) if peak is not None else None

    def slower(self, method: str, against: str = "eager") -> float | None:
        """Time over another method's, from the latest process that held both."""
        for row in reversed(self.results.all(task="time", model=self.name)):
            found = paired_ratio(row["seconds"], method, against)
            if found is not None:
                return found
        return None

    def equal(self, row: Row) -> str:
        """Whether a method's numbers are eager's on the same processor, bit for bit."""
        eager = self.results.last(task="peak", model=self.name, method="eager", on=row["on"])
        if eager is None:
            return "-"
        same = {key: row[key] == eager[key] for key in ("numbers", "trained", "state")}
        if all(same.values()):
            return "yes"
        if same["numbers"]:
            return "first steps only"
        return "loss only" if row["numbers"]["losses"] == eager["numbers"]["losses"] else "no"

    @property
    def baselines(self) -> list[str]:
        """Methods with a measured peak other than eager and plans, in order."""
        found = [row["method"] for row in self.results.all(task="peak", model=self.name)]
        ratios = {method for method in found if method.startswith("torch-budget:")}
        ordered = sorted(ratios, key=lambda method: float(method.partition(":")[2]))
        return [*(["checkpoint"] if self.checkpoint else []), *ordered]

    @property
    def monotone(self) -> bool:
        """Whether the measured totals fall with the budget."""
        totals = [point.total for point in self.sweep]
        return all(after <= before * (1 + TOLERANCE) for before, after in pairwise(totals))

    # The claims' figures; None where something was not measured

    @property
    def overheads(self) -> tuple[float, float] | None:
        """Overhead at checkpointing's own peak, and checkpointing's."""
        point, theirs = self.point("at:checkpoint"), self.slower("checkpoint")
        return (point.slower - 1, theirs - 1) if point and point.slower and theirs else None

    @property
    def overhead_share(self) -> float | None:
        """The first of `overheads` over the second, where that is large enough to divide by."""
        found = self.overheads
        return found[0] / found[1] if found and found[1] >= WORTH else None

    @property
    def cheap_share(self) -> float | None:
        """The smallest total with at most 5 % of overhead, over eager's total.

        Of the points timed together: a point timed elsewhere may have been lucky with its rounds.
        """
        labels = [label for label in self.plans if not label.startswith("at:torch-budget")]
        points = [point for label in labels if (point := self.point(label)) is not None]
        cheap = [point.total for point in points if point.slower is not None and point.slower <= CHEAP]
        return min(cheap) / self.eager["total"] if cheap and self.eager else None

    @property
    def floor_share(self) -> float | None:
        """The smallest total measured, over checkpointing's."""
        totals = [point.total for point in self.points]
        return min(totals) / self.checkpoint["total"] if totals and self.checkpoint else None


def render(results: Results, path: Path, five: list[str]) -> None:
    """Write the markdown file."""
    names = list(dict.fromkeys(row["model"] for row in results.all(task="peak")))
    models = [Measured(results, name) for name in names]
    lines = header("Training steps on the CPU", results)
    lines += [
        "Written by `python -m memplan.benchmarks.cpu --render`; README.md says how to read it. Times are ratios:",
        "medians over rounds in which one process runs each method once. Sizes are MiB, everything counted.",
        "",
    ]
    allocators = sorted({row["allocator"] for row in results.all(task="time")})
    if allocators:
        lines += [f"Times were taken with the allocator setting: {', '.join(allocators)}.", ""]
    lines += ["## Claims", "", *claims(models, five), "## By model", "", *overview(models)]
    for model in models:
        lines += [f"## {model.name}", "", *sweep_table(model), *baseline_table(model)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def claims(models: list[Measured], five: list[str]) -> list[str]:
    """Each claim with its goal, what was measured, and whether it was met."""
    points = [point for model in models for point in model.points]
    swept = [point for model in models for point in model.sweep]
    off = [abs(point.total / point.plan["peak"] - 1) for point in swept]
    equal = [model.equal(point.peak) == "yes" for model in models for point in model.points]
    rivals = [found for model in models for method in model.baselines if (found := rival(model, method)) is not None]
    rows = [
        counted("measured total within budget + 3 % + 16 MiB", [point.within for point in points]),
        counted("totals fall with the budget, by model", [model.monotone for model in models if model.sweep]),
        counted(f"measured within {PREDICTION:.0%} of predicted, on the sweep", [value <= PREDICTION for value in off]),
        counted("loss, gradients and trained state bit-equal to eager's", equal),
        counted("faster than each baseline at its measured peak", [found < 1 for found in rivals]),
    ]
    plain = [point for model in models if (point := model.point("none")) is not None]
    free = [point.slower for point in plain if point.slower is not None]
    rows.append(goal("no budget: time over eager's, worst model", max(free, default=None), FREE))
    heads = [(model.point("none"), model.eager) for model in models]
    less = [point.total <= eager["total"] * (1 + PAGES) for point, eager in heads if point and eager]
    rows.append(counted(f"no budget: peak at most eager's, to {PAGES:.1%}", less))
    for which, chosen in (("first five", [m for m in models if m.name.partition(":")[0] in five]), ("all", models)):
        pairs = [found for model in chosen if (found := model.overheads) is not None]
        ours, theirs = mean(pair[0] for pair in pairs), mean(pair[1] for pair in pairs)
        share = ours / theirs if ours is not None and theirs else None
        rows.append(goal(f"mean overhead at checkpointing's peak over checkpointing's mean, {which} models", share, 0.75))
        cheap = mean(value for model in chosen if (value := model.cheap_share) is not None)
        rows.append(goal(f"smallest total with at most 5 % of overhead, over eager's, mean over {which} models", cheap, 0.70))
    floors = [value for model in models if (value := model.floor_share) is not None]
    rows.append(goal("smallest total over checkpointing's, worst model", max(floors, default=None), 0.90))
    return markdown(("claim", "goal", "measured", "met"), rows)


def counted(what: str, outcomes: list[bool]) -> tuple[str, str, str, str]:
    """A claim that must hold everywhere."""
    return what, "all", f"{sum(outcomes)} of {len(outcomes)}", verdict(all(outcomes) if outcomes else None)


def goal(what: str, value: float | None, limit: float) -> tuple[str, str, str, str]:
    """A claim about a figure that must not exceed a limit."""
    return what, f"<= {limit:g}", ratio(value), verdict(None if value is None else value <= limit)


def rival(model: Measured, method: str) -> float | None:
    """The time of the plan for a baseline's measured peak, over the baseline's."""
    plan = model.plans.get(f"at:{method}")
    return model.slower(plan["schedule"], method) if plan is not None and "schedule" in plan else None


def overview(models: list[Measured]) -> list[str]:
    """The figures behind the averages."""
    heads = ("model", "eager", "checkpoint", "its time", "plan there", "overhead share", "5 % total share",
             "floor share", "no budget, time", "its total")  # fmt: skip
    rows = []
    for model in models:
        at, plain = model.point("at:checkpoint"), model.point("none")
        rows.append((
            model.name, mib(model.eager["total"] if model.eager else None),
            mib(model.checkpoint["total"] if model.checkpoint else None), ratio(model.slower("checkpoint")),
            ratio(at.slower if at else None), ratio(model.overhead_share), ratio(model.cheap_share),
            ratio(model.floor_share), ratio(plain.slower if plain else None), mib(plain.total if plain else None),
        ))  # fmt: skip
    return markdown(heads, rows)


def sweep_table(model: Measured) -> list[str]:
    """One row a budget, from the unplanned peak to the floor, then no budget and almost free."""
    heads = ("budget", "predicted", "measured", "measured / predicted", "within", "time / eager", "predicted time",
             "gap", "recomputed", "equal to eager")  # fmt: skip
    rows = []
    for label in ("none", *model.labels("overhead:"), *model.labels("sweep:")):
        point, plan = model.point(label), model.plans.get(label)
        if plan is None:
            continue
        if point is None:
            rows.append((mib(plan["budget"]), "infeasible" if plan.get("infeasible") else "not measured", *[""] * 8))
            continue
        name = "none" if plan["budget"] is None else mib(plan["budget"])
        rows.append((
            name, mib(plan["peak"]), mib(point.total), ratio(point.total / plan["peak"]), verdict(point.within),
            ratio(point.slower), ratio(1 + plan["overhead"]), percent(plan["gap"]), str(plan["recomputed"]),
            model.equal(point.peak),
        ))  # fmt: skip
    if not rows:
        return []
    return [*markdown(heads, rows), f"Measured totals fall with the budget: {verdict(model.monotone)}.", ""]


def baseline_table(model: Measured) -> list[str]:
    """Each baseline, and the plan for its measured peak."""
    heads = ("method", "total", "time / eager", "equal to eager", "plan's total", "plan's time / eager",
             "plan's time / method's", "faster")  # fmt: skip
    rows = []
    if model.eager:
        rows.append(("eager", mib(model.eager["total"]), "1", "", "", "", "", ""))
    for method in model.baselines:
        row, plan = model.peak(method), model.plans.get(f"at:{method}", {})
        if row is None:
            continue
        point, found = model.point(f"at:{method}"), rival(model, method)
        rows.append((
            method, mib(row["total"]), ratio(model.slower(method)), model.equal(row),
            "infeasible" if plan.get("infeasible") else mib(point.total if point else None),
            ratio(point.slower if point else None), ratio(found), verdict(None if found is None else found < 1),
        ))  # fmt: skip
    for failed in {row["method"]: row for row in model.results.rows if row.get("model") == model.name
                   and row.get("task") == "peak" and "failed" in row}.values():  # fmt: skip
        if model.peak(failed["method"]) is None:
            rows.append((failed["method"], f"failed: {failed['failed'][:80]}", *[""] * 6))
    return markdown(heads, rows)

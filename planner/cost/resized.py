"""What the ops of a family cost at sizes at which nobody has measured them.

An op that was measured at one size takes its time at another times the ratio of its rooflines there; between two sizes at which
it was measured, the share of the roofline that it reaches is interpolated by how much it does. These are estimates: the keys at
such sizes are not in the table, and `coverage` counts them as not measured. Scratch space is taken to shrink with nothing and
to grow as fast as the work or the traffic does, whichever grows faster.
"""

import math
from collections.abc import Sequence

import msgspec

from ..ir.machine import Machine
from ..ir.program import Op, Program
from .estimate import Work, least_time, work_of
from .table import Table
from .workspaces import modelled_workspace


class Resized:
    """Costs of a family's programs.

    Attributes:
        anchors: its programs whose costs are known, as `apply_costs` has them; the first is that of the example's sizes.
        machine: what they run on.
        table: measurements of the device, or None.
    """

    def __init__(self, known: Program, machine: Machine, table: Table | None):
        self.machine, self.table = machine, table
        self.anchors: list[Program] = []
        self.works: list[list[Work]] = []
        self.measured: list[list[bool]] = []
        self.add(known)

    def add(self, known: Program) -> None:
        """Learn from a program of the family whose ops have been measured."""
        self.anchors.append(known)
        self.works.append([work_of(op) for op in known.ops])
        self.measured.append([self.table is not None and self.table.get(op.key) is not None for op in known.ops])

    def apply(self, program: Program) -> Program:
        """A program of the family with time and workspace for every op, and buffers as the machine rounds them."""
        rounding = self.machine.tiers[0].rounding
        replace = msgspec.structs.replace
        buffers = tuple(replace(buffer, bytes=-(-buffer.bytes // rounding) * rounding) for buffer in program.buffers)
        known: dict[tuple, tuple[float, int]] = {}
        ops = []
        for index, op in enumerate(program.ops):
            mark = self.anchors[0].ops[index].key, op.key, op.flops, op.traffic, op.workspace
            if mark not in known:
                known[mark] = self.cost(index, op, program)
            seconds, workspace = known[mark]
            ops.append(replace(op, seconds=seconds, workspace=workspace))
        return Program(program.name, buffers, tuple(ops), program.outputs, program.device)

    def cost(self, index: int, op: Op, program: Program) -> tuple[float, int]:
        """Seconds and workspace of one op."""
        same = next((anchor.ops[index] for anchor in self.anchors if anchor.ops[index].key == op.key), None)
        if same is not None:
            return same.seconds, same.workspace
        figures = None if self.table is None else self.table.get(op.key)
        work = self.works[0][index]._replace(flops=op.flops, traffic=op.traffic)
        estimate = least_time(work, self.machine) * self.share(index, work)
        if figures is None or self.table is None:
            return estimate, self.workspace(index, op, program)
        return min(figures.seconds, estimate) if self.table.doubts(figures) else figures.seconds, figures.workspace

    def share(self, index: int, work: Work) -> float:
        """How many times its roofline an op takes, by the anchors on both sides of it."""
        points = sorted((amount(works[index]), anchor.ops[index].seconds / least_time(works[index], self.machine))
                        for works, anchor in zip(self.works, self.anchors, strict=True))  # fmt: skip
        return between(points, amount(work))

    def workspace(self, index: int, op: Op, program: Program) -> int:
        """Bytes beside the results: of measured ops no less than was measured, of others as their kernels' sources suggest."""
        found = []
        for works, measured, anchor in zip(self.works, self.measured, self.anchors, strict=True):
            if measured[index]:
                known = works[index]
                grown = max(1.0, op.traffic / max(known.traffic, 1), op.flops / max(known.flops, 1.0))
                found.append(math.ceil(anchor.ops[index].workspace * grown))
        if found:
            return min(found)
        written = sum(program.buffers[buffer].bytes for buffer in op.writes)
        return modelled_workspace(op.key, written, program.device) + op.workspace


def amount(work: Work) -> float:
    """How much an op does, to compare it with itself at other sizes."""
    return math.log(1.0 + work.flops + work.traffic)


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a place, on the line between the two points beside it; outside of them that of the nearest."""
    low, high = points[0], points[-1]
    for point in points:
        low = point if point[0] <= at else low
    high = next((point for point in points if point[0] >= at), high)
    if not low[0] < at < high[0]:
        return low[1] if at >= low[0] else high[1] if at >= high[0] else points[0][1]
    part = (at - low[0]) / (high[0] - low[0])
    return low[1] + part * (high[1] - low[1])

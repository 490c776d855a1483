"""What an op takes that was not measured: the machine's roofline, times what measured ops of its kind took of theirs.

A roofline says what an op takes at least. Eager kernels take more, each kind its own share: on two cores of an Intel Xeon a
step whose roofline was 131 ms took 611 ms by its measured ops. So it is corrected by the median of time over roofline of the
ops of that kind (operator and element type) that were measured on the device, of whatever model; and where there are not
enough of them, by that of all ops.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ..ir.machine import Machine
from ..ir.program import Op
from .keys import read_key

# Seconds of Python in a call of an optimizer's step that comes between large kernels, and so finds no cache warm; seen on two
# cores of an Intel Xeon, where a loop of such calls takes a fifth of it each. Beside a GPU it runs while kernels do.
OPTIMIZER_CALL = 2.5e-4
OF_KIND = 3  # measured ops that tell of their kind
OF_ALL = 8  # that tell of all
LOW = 0.25  # the share of ops, by weight, below what is taken of those timed beside other work: that only lengthens


class Work(NamedTuple):
    """What the roofline wants to know of an op.

    Attributes:
        target: the operator.
        dtype: of its arithmetic.
        flops: floating-point operations.
        traffic: bytes read and written.
    """

    target: str
    dtype: str
    flops: float
    traffic: int


def work_of(op: Op) -> Work:
    """The work of an op."""
    call = read_key(op.key)
    dtype = next((tensor.dtype for tensor in call.tensors if tensor.floating), "default") if call else "default"
    return Work(op.target, dtype, op.flops, op.traffic)


def roofline(op: Op, machine: Machine) -> float:
    """Seconds that the op takes at least on the machine's first unit: the longest of compute, memory and launch."""
    return least_time(work_of(op), machine)


def least_time(work: Work, machine: Machine) -> float:
    """The same of its work."""
    unit = machine.units[0]
    tier = machine.tiers[machine.tier_index(unit.tier)]
    rate = unit.flops.get(work.dtype, unit.flops["default"]) * unit.efficiency
    python = OPTIMIZER_CALL if machine.device == "cpu" and work.target.startswith("optimizer.") else 0.0
    return max(work.flops / rate, work.traffic / tier.bandwidth, unit.launch) + python


class Sample(NamedTuple):
    """A measured op: its work, its time, and whether that is to be believed."""

    work: Work
    seconds: float
    quiet: bool


class Estimate:
    """Times of ops that were not measured, by those that were.

    Attributes:
        ops: how many measured ops it rests on; 0 for the roofline alone.
    """

    def __init__(self, samples: Iterable[Sample], machine: Machine):
        """Of all samples if there are too few quiet ones, the lower of them: outliers do not count, what slows all does."""
        self.machine = machine
        known = list(samples)
        quiet = [sample for sample in known if sample.quiet]
        used = quiet if len(quiet) >= OF_ALL else known if len(known) >= OF_ALL else []
        self.ops, part = len(used), 0.5 if used is quiet else LOW
        kinds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        pairs = []
        for work, seconds, _ in used:
            least = least_time(work, machine)
            pairs.append((seconds / least, least))
            kinds.setdefault(work[:2], []).append(pairs[-1])
        self.overall = quantile(pairs, part) if pairs else 1.0
        self.of_kind = {kind: quantile(each, part) for kind, each in kinds.items() if len(each) >= OF_KIND}

    def seconds(self, op: Op) -> float:
        """What the op takes."""
        work = work_of(op)
        return least_time(work, self.machine) * self.of_kind.get(work[:2], self.overall)


def quantile(pairs: list[tuple[float, float]], part: float) -> float:
    """The value up to which lies that part of the weight, of (value, weight): ops that take long count for more."""
    ordered = sorted(pairs)
    goal, total = part * sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        total += weight
        if total >= goal:
            return value
    return ordered[-1][0]

"""One budget for all pieces of a model that `torch.compile` has cut at its graph breaks.

At any moment one piece runs and the others *hold* what they saved, or the gradients they made. With h the bytes that a
piece holds at most, p its own peak, and R the bytes of all parameters and inputs (each storage once), the step is
within the budget B if for every run k of a piece in the step

    R + sum of h over the other runs + p(k) <= B

which is checked before each run, for the runs of this step that still hold something (so a piece that runs once per
layer counts once per layer). When a step has been seen whole, all its pieces are given schedules between their least
and their most, by one common share, the largest found that satisfies the rule.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...passes.liveness import Liveness, held_bytes
from ...planner.cost.local import local_machine
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine, named_machine
from ...planner.ir.plan import Side, unlimited
from ...planner.ir.program import Program
from ...planner.ir.referee import referee
from ...planner.ir.schedule import check_levers
from ...planner.ir.units import parse_bytes
from ...planner.pipeline.planner import Planner
from ..eager.witness import Witness, backward_number, keeps_graph

if TYPE_CHECKING:
    from .compilation import Code

SHARES = (1.0, 0.75, 0.5, 0.3, 0.15, 0.05, 0.0)  # of the way from a piece's least to its most, tried in this order


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `options=` may say.

    Attributes:
        budget: as in `memplan.plan`; None for what the machine holds.
        machine: a preset's name, a TOML path or a `Machine`; None for the one at hand.
        inner: what compiles the planned graphs.
        time_limit: seconds for planning one piece, at most.
        seed: of the search.
        allow: as in `memplan.plan`.
    """

    budget: int | float | str | None = None
    machine: Any = None
    inner: Literal["eager", "inductor"] = "eager"
    time_limit: float = 60.0
    seed: int = 0
    allow: tuple[str, ...] | None = None

    @property
    def said(self) -> int | str | None:
        """The budget as bytes, or as a share of each piece's own peak."""
        return self.budget if self.budget is None or is_percentage(self.budget) else parse_bytes(self.budget)  # type: ignore[return-value]

    @property
    def levers(self) -> set[str]:
        """What the plans may do."""
        return check_levers(self.allow)


_ledgers: "weakref.WeakValueDictionary[int, Ledger]" = weakref.WeakValueDictionary()  # pieces hold theirs, it its options


def ledger_of(options: Mapping[str, Any] | None) -> "Ledger":
    """The ledger of one `torch.compile` call, which hands the same `options` object to each piece."""
    found = _ledgers.get(id(options)) if options is not None else None
    if found is not None and found.given is options and found.options == read_options(options):
        return found
    ledger = Ledger(read_options(options), options)
    if options is not None:
        _ledgers[id(options)] = ledger  # holds `options`, so that its id is not given to another while it lives
    return ledger


def read_options(options: Mapping[str, Any] | None) -> Options:
    """The options, checked.

    Raises:
        MemplanError: the first that is wrong, and what is allowed.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(Options.__struct_fields__), key=str)
    if unknown:
        raise MemplanError(
            f"no option {unknown[0]!r}: the options of backend='memplan' are {', '.join(Options.__struct_fields__)}"
        )
    if given.get("budget") is not None:
        parse_bytes(given["budget"], of=1 << 40)
    named_machine(given.get("machine"))
    if isinstance(given.get("allow"), str):
        given["allow"] = (given["allow"],)
    levers = check_levers(given.get("allow"))
    if "offload" in levers and given.get("inner") == "inductor":
        raise MemplanError("inner='inductor' moves no values to other tiers: leave 'offload' out of allow, or take 'eager'")
    if given.get("inner", "eager") not in ("eager", "inductor"):
        raise MemplanError(f"inner={given['inner']!r}: it is 'eager' or 'inductor'")
    try:
        read = msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        raise MemplanError(f"options of backend='memplan': {error}") from None
    if not read.time_limit > 0:
        raise MemplanError(f"time_limit={read.time_limit!r}: give a positive number of seconds")
    return read


class Room(NamedTuple):
    """What a run may take.

    Attributes:
        now: bytes of the peak of the piece's own program, its parameters and inputs included.
        later: bytes of what it leaves behind when its backward has run, while the pieces before it run theirs.
        held: bytes that others hold, for the message.
    """

    now: int
    later: int
    held: int


@dataclass(eq=False)
class Visit:
    """One run of a piece, from its forward pass until its backward pass has used up what was saved.

    Attributes:
        code: what ran.
        inputs: bytes of each storage that it was given.
        outputs: bytes of each storage that it returned.
        saved: the largest storage that it saved; while that lives, the run holds memory.
        begun: whether its backward pass has begun.
        tasks: which backward passes have reached it; the second is refused.
    """

    code: "Code"
    inputs: dict[int, int]
    outputs: dict[int, int] = field(default_factory=dict)
    saved: StorageWeakRef | None = None
    begun: bool = False
    tasks: set[int] = field(default_factory=set)

    def watch(self, results: Sequence[Any], witness: Witness) -> None:
        """Have the backward pass looked at when it reaches what this run returned."""

        def reached(gradient: torch.Tensor) -> None:
            self.code.backward.refuse()
            self.begun = True
            self.tasks.add(backward_number())
            if len(self.tasks) > 1:
                raise MemplanError("this planned step has run backward already and freed what it read: call the model again")
            if witness.budget is not None and keeps_graph():
                witness.retained(self.code.held, "what a planned step has saved")

        for value in results:
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                value.register_hook(reached)

    @property
    def holding(self) -> bool:
        """Whether the backward pass is still to come."""
        return self.saved is not None and not self.saved.expired()


class Ledger:
    """One budget and all that is held against it.

    Attributes:
        options: the options.
        given: the object they were read from.
        holding: runs of this step that hold something.
        step: all runs since nothing was held.
        witness: says what is beside the budget.
        cautious: a piece found too little left: from now on every piece takes as little as it can.
    """

    def __init__(self, options: Options, given: Mapping[str, Any] | None):
        self.options = options
        self.given = given
        self.holding: list[Visit] = []
        self.step: list[Visit] = []
        self.cautious = False
        self.parameters: dict[int, tuple[StorageWeakRef, int]] = {}
        self.machines: dict[str, Machine] = {}
        self.pieces = 0
        self.settled: set[tuple[int, ...]] = set()
        self.witness = Witness(options.said)

    def machine(self, device: str) -> Machine:
        """The machine planned for."""
        if device not in self.machines:
            offload = "offload" in self.options.levers
            self.machines[device] = named_machine(self.options.machine) or local_machine(device, offload=offload)
        return self.machines[device]

    def budget(self, machine: Machine) -> int | None:
        """Bytes for all pieces together; None where each piece has its own, in percent."""
        capacity = machine.tiers[0].capacity
        asked = self.options.budget
        if asked is None:
            return capacity
        return None if is_percentage(asked) else min(parse_bytes(asked), capacity)

    def enter(self) -> None:
        """A piece is about to run: see what is still held, and whether a step has ended."""
        self.holding = [visit for visit in self.holding if visit.holding]
        if not self.holding and self.step:
            finished, self.step = self.step, []
            if len(finished) > 1 and self.options.budget is not None and not is_percentage(self.options.budget):
                self.settle(finished)

    def look(self, code: "Code", name: str, tensors: Sequence[torch.Tensor]) -> None:
        """A piece is about to run with these: see what lies beside the budget."""
        self.witness.buckets()
        before = [visit for visit in self.holding if visit.code is code]
        if before and is_percentage(self.options.budget):  # others are held against a budget in bytes
            self.witness.pending(sum(visit.code.held for visit in before))
        if not any(visit.begun for visit in self.step):
            self.witness.gradients((value for value in tensors if value.requires_grad), f" of the parameters of {name}")

    def room(self, inputs: dict[int, int], budget: int) -> Room:
        """What a run with these inputs may take."""
        self.parameters = {key: known for key, known in self.parameters.items() if not known[0].expired()}
        returned = {key: size for visit in self.holding for key, size in visit.outputs.items()}
        resident = {key: size for key, (_, size) in self.parameters.items()}
        for visit in self.holding:
            resident |= visit.inputs
        others = sum(size for key, size in resident.items() if key not in returned and key not in inputs)
        counted_twice = sum(size for key, size in inputs.items() if key in returned)
        holds = [visit.code.held for visit in self.holding]
        held = sum(holds) + others - counted_twice
        everything = held + sum(inputs.values())
        later = min((budget - (everything - visit.code.held + visit.code.own) for visit in self.holding), default=budget)
        return Room(budget - held, later, held)

    def settle(self, finished: list[Visit]) -> None:
        """Share the budget among the pieces of a step that has been seen whole."""
        codes = list({id(visit.code): visit.code for visit in finished}.values())
        seen = tuple(id(visit.code.planner) for visit in finished)
        if seen in self.settled or all(code.side is code.planner.kept for code in codes):
            return
        self.settled.add(seen)
        budget = self.budget(codes[0].planner.machine)
        assert budget is not None
        resident: dict[int, int] = {}
        for visit in finished:
            resident |= visit.inputs
        for visit in finished:
            for key in visit.outputs:
                resident.pop(key, None)
        fixed = sum(resident.values())
        for share in SHARES:
            sides = {id(code): code.at_share(share) for code in codes}
            held = {id(code): held_bytes(code.program, sides[id(code)].schedule) for code in codes}
            total = fixed + sum(held[id(visit.code)] for visit in finished)
            worst = max(sides[id(code)].peak - code.program.resident_bytes - held[id(code)] for code in codes)
            if total + worst <= budget:
                for code in codes:
                    code.wanted = sides[id(code)]
                return

    def refuse(self) -> None:
        """Have every piece that is now held plan for its least from the next step on."""
        self.cautious = True
        for visit in self.holding:
            visit.code.wanted = visit.code.at_share(0.0)


def is_percentage(budget: Any) -> bool:
    """Whether a budget is a share of the unplanned peak."""
    return isinstance(budget, str) and budget.strip().endswith("%")


def small_schedules(planner: Planner) -> list[Side]:
    """Schedules that take little in one way or another.

    A small peak is not all: what a piece holds counts while every other piece runs. So besides the smallest peak known,
    there is the schedule that saves only what it must and computes the rest a second time.
    """
    if planner.program.boundary == len(planner.program.ops):
        return [planner.kept, planner.floor]
    if not planner.recompute:
        return [planner.kept, planner.floor]
    schedule = Liveness()(planner.program, replayed(planner.program))
    again = Side(planner.program, schedule, referee(planner.program, unlimited(planner.machine), schedule))
    return [planner.kept, planner.floor, again]


def replayed(program: Program) -> list[int]:
    """The order in which the forward pass runs again, op by op, when the backward pass first needs its results."""
    outputs = set(program.outputs)
    again = [op.repeatable and not outputs & set(op.writes) for op in program.ops[: program.boundary]]
    order = list(range(program.boundary + 1))
    done: set[int] = set()
    for late in range(program.boundary + 1, len(program.ops)):
        needed: set[int] = set()
        stack = [late]
        while stack:
            for buffer in program.ops[stack.pop()].reads:
                maker = program.producer[buffer]
                if 0 <= maker < program.boundary and again[maker] and maker not in done and maker not in needed:
                    needed.add(maker)
                    stack.append(maker)
        order += [*sorted(needed), late]
        done |= needed
    return order


def burden(program: Program, side: Side) -> int:
    """How much a piece weighs on the others: what it holds, and less so its peak, which passes."""
    return 2 * held_bytes(program, side.schedule) + side.peak


def storages(tensors: Sequence[torch.Tensor], rounding: int) -> dict[int, int]:
    """Bytes of each storage, as the machine hands them out."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return {key: -(-size // rounding) * rounding for key, size in found.items()}


def left_bytes(program: Program) -> int:
    """Bytes of its own that are live when a step ends: outputs, tangents and gradients."""
    return sum(program.buffers[buffer].bytes for buffer in program.outputs)

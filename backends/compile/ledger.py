"""One budget for all pieces of a model that `torch.compile` has cut at its graph breaks, and for all of its calls.

At any moment one run of a piece is under way and the others *hold* what they saved, or what they leave behind. With

    R       the bytes of all parameters and inputs, each storage once, and of gradients that are there when the run begins
    s(j)    what run j has saved or, if that is more, what it leaves behind beside gradients of parameters
    l(j)    all that it leaves behind
    p(k)    the peak of run k without its parameters and inputs

the step is within the budget B if for every run k in it

    R + H + p(k) <= B

where H is the sum of s(j) over the other runs and, for each piece, the most by which l(j) passes s(j): runs of one piece have
their gradients added to those of the first. It holds in whichever order backward passes run, and is checked before each
run, for the runs of this step that still hold something. When a step has been seen whole, all its runs are given schedules
between their least and their most, by one common share, the largest found that satisfies the rule.

Until then a run may come that nobody has left room for: another call before the backward pass of the first, an evaluation
between the two. It takes as little as it can, and that is told; from the next step on the budget is kept. Where those that
hold something take as little as they can already, the run is refused.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...planner.cost.local import local_machine
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine, named_machine
from ...planner.ir.program import Program
from ...planner.ir.units import parse_bytes, show_bytes
from ..eager.together import Together
from ..eager.witness import Witness, backward_number, keeps_graph
from .options import Options, is_percentage, read_options
from .weight import Weight, together

if TYPE_CHECKING:
    from .compilation import Code
    from .door import Piece

SHARES = (1.0, 0.75, 0.5, 0.3, 0.15, 0.05, 0.0)  # of the way from a piece's least to its most, tried in this order
SETTLED = 1024  # kinds of steps that are remembered to have been settled

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


class Room(NamedTuple):
    """What a run may take.

    Attributes:
        now: bytes of the peak of the piece's own program, its parameters and inputs included.
        later: bytes of what it leaves behind when its backward has run, while the pieces before it run theirs.
        held: bytes that lie beside it: what other runs hold, and gradients that are there.
        given: bytes of the storages that it is given.
    """

    now: int
    later: int
    held: int
    given: int

    def of(self, program: Program) -> int:
        """The same as `now` where inputs do not fill their storages, which the program takes them to do."""
        return self.now - max(0, self.given - program.resident_bytes)


@dataclass(eq=False)
class Visit:
    """One run of a piece, from its forward pass until its backward pass has used up what was saved.

    Attributes:
        code: what ran.
        inputs: bytes of each storage that it was given.
        gradients: bytes of gradients that were there when it began.
        together: says where runs of a piece in one backward pass have other last bits than eager's.
        outputs: bytes of each storage that it returned.
        saved: the largest storage that it saved; while that lives, the run holds memory.
        begun: whether its backward pass has begun.
        last: which backward pass has reached it last.
        kept: whether that one was to keep the graph; if not, another one is refused.
    """

    code: "Code"
    inputs: dict[int, int]
    gradients: int
    together: Together
    outputs: dict[int, int] = field(default_factory=dict)
    saved: StorageWeakRef | None = None
    begun: bool = False
    last: int | None = None
    kept: bool = False

    def watch(self, results: Sequence[Any], ledger: "Ledger") -> None:
        """Have the backward pass looked at when it reaches what this run returned."""

        def reached(gradient: torch.Tensor) -> None:
            self.code.backward.refuse()
            self.begun = True
            number = backward_number()
            if self.last not in (None, number) and not self.kept:
                raise MemplanError("this planned step has run backward already and freed what it read: call the model again")
            if self.last != number:
                self.together.note()
            self.last, self.kept = number, keeps_graph()
            if self.kept:
                ledger.retained(self.code)

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
        asked: the programs, by their digest, of runs that were asked to leave room.
        settled: steps that have been seen whole, by what ran in them.
        retains: a backward pass was asked to keep its graph, and works on a copy of what was saved.
        parameters: that pieces have seen: their storages by identity, with their bytes.
        leaves: the parameters themselves, by identity, for their gradients.
        pieces: of the model.
        numbered: how many there have been.
        made: how often code of one was made.
    """

    def __init__(self, options: Options, given: Mapping[str, Any] | None):
        self.options = options
        self.given = given
        self.holding: list[Visit] = []
        self.step: list[Visit] = []
        self.cautious = self.retains = False
        self.parameters: dict[int, tuple[StorageWeakRef, int]] = {}
        self.leaves: dict[int, weakref.ref[torch.Tensor]] = {}
        self.machines: dict[str, Machine] = {}
        self.pieces: weakref.WeakSet[Piece] = weakref.WeakSet()
        self.numbered = self.made = 0
        self.settled: set[tuple[Any, ...]] = set()
        self.asked: set[str] = set()
        self.witness = Witness(options.said)

    def number(self, piece: "Piece") -> int:
        """Take in a piece. Returns its number, from 1."""
        self.pieces.add(piece)
        self.numbered += 1
        return self.numbered

    def counts(self) -> dict[str, int]:
        """What is planned now: shapes traced alone, traces for every size, their schedules; and how often code was made."""
        codes = [code for piece in self.pieces for code in piece.codes.values()]
        every = [trace for piece in self.pieces for trace in piece.traces.values()]
        return {"shapes": sum(code.trace is None for code in codes), "every": len(every),
                "schedules": sum(len(trace.ways.ways) for trace in every), "runners": self.made}  # fmt: skip

    @property
    def traces_sizes(self) -> bool:
        """Whether one trace may serve every size: Inductor compiles for one, and copies to other tiers have fixed places."""
        return self.options.inner == "eager" and "offload" not in self.options.levers

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

    def enter(self, parameters: Iterable[torch.Tensor], inputs: dict[int, int]) -> None:
        """A piece is about to run with these parameters: see what is still held, and whether a step has ended."""
        for value in parameters:
            place = value.untyped_storage()
            self.parameters[place._cdata] = StorageWeakRef(place), inputs[place._cdata]
            self.leaves[id(value)] = weakref.ref(value)
        self.parameters = {key: known for key, known in self.parameters.items() if not known[0].expired()}
        self.leaves = {key: known for key, known in self.leaves.items() if known() is not None}
        self.holding = [visit for visit in self.holding if visit.holding]
        if not self.holding and self.step:
            finished, self.step = self.step, []
            shared = self.options.budget is not None and not is_percentage(self.options.budget)
            if shared and (len(finished) > 1 or self.cautious):
                self.settle(finished)

    def gradients(self) -> int:
        """Bytes of gradients that are there."""
        found = [leaf.grad for leaf in (known() for known in self.leaves.values()) if leaf is not None]
        return sum(gradient.nbytes for gradient in found if gradient is not None)

    def look(self, code: "Code", name: str, tensors: Sequence[torch.Tensor]) -> None:
        """A piece is about to run with these: see what lies beside the budget."""
        self.witness.buckets()
        if not is_percentage(self.options.budget):
            return  # a budget in bytes counts the rest
        before = [visit for visit in self.holding if visit.code is code]
        if before:
            self.witness.pending(sum(visit.code.held for visit in before))
        if not any(visit.begun for visit in self.step):
            self.witness.gradients((value for value in tensors if value.requires_grad), f" of the parameters of {name}")

    def room(self, inputs: dict[int, int], budget: int) -> Room:
        """What a run with these inputs may take."""
        returned = {key: size for visit in self.holding for key, size in visit.outputs.items()}
        resident = {key: size for key, (_, size) in self.parameters.items()}
        for visit in self.holding:
            resident |= visit.inputs
        others = sum(size for key, size in resident.items() if key not in returned and key not in inputs)
        counted_twice = sum(size for key, size in inputs.items() if key in returned)
        fixed = self.gradients() + others - counted_twice
        held = fixed + together(visit.code.weight for visit in self.holding)
        later = budget
        for visit in self.holding:
            rest = together(other.code.weight for other in self.holding if other is not visit)
            later = min(later, budget - (fixed + sum(inputs.values()) + rest + self.most(visit.code.weight)))
        return Room(budget - held, later, held, sum(inputs.values()))

    def most(self, weight: Weight) -> int:
        """The peak of a run, with what a backward pass that keeps its graph copies."""
        return weight.own + self.retains * weight.again

    def settle(self, finished: list[Visit]) -> None:
        """Share the budget among the runs of a step that has been seen whole."""
        gradients = max(visit.gradients for visit in finished)
        seen = (*(visit.code.program.digest for visit in finished), gradients > 0, self.retains)
        if seen in self.settled:
            return
        if len(self.settled) >= SETTLED:
            self.settled.clear()
        self.settled.add(seen)
        codes = {visit.code.program.digest: visit.code for visit in finished}
        budget = self.budget(finished[0].code.planner.machine)
        assert budget is not None
        resident: dict[int, int] = {}
        for visit in finished:
            resident |= visit.inputs
        for visit in finished:
            for key in visit.outputs:
                resident.pop(key, None)
        fixed = sum(resident.values()) + gradients
        for share in SHARES:
            sides = {digest: code.at_share(share) for digest, code in codes.items()}
            weights = [visit.code.weighed(sides[visit.code.program.digest]) for visit in finished]
            total = [together(weights[:at] + weights[at + 1 :]) + self.most(weight) for at, weight in enumerate(weights)]
            if fixed + max(total) <= budget:
                for visit in finished:
                    visit.code.wanted = sides[visit.code.program.digest]
                self.asked -= set(sides) if share else set()
                return

    def excess(self, name: str, room: Room) -> bool:
        """A run finds no room beside those that hold something; whether it may pass the budget, for this once.

        It may where one of them has not been asked yet to take as little as it can, which all do from the next step on.
        """
        if all(visit.code.program.digest in self.asked for visit in self.holding):
            return False
        self.cautious = True
        self.asked |= {visit.code.program.digest for visit in self.holding}
        self.witness.said.discard("pending")
        for visit in self.holding:
            visit.code.wanted = visit.code.at_share(0.0)
        count = len(self.holding)
        before = "1 run before it waits" if count == 1 else f"{count} runs before it wait"
        held, budget = f"{show_bytes(room.held)} ({room.held} bytes)", show_bytes(room.now + room.held)
        self.witness.say("pending", room.held, f"{name} begins while {before} for the backward pass and {held} lie beside it: "
                         f"nothing had left room for that, so this step may pass the budget of {budget}; from the next step on "
                         "there is room for all")  # fmt: skip
        return True

    def retained(self, code: "Code") -> None:
        """A backward pass was asked to keep its graph: from the next step on there is room for what it copies."""
        self.retains = True
        budget, held = self.witness.budget, code.held
        if isinstance(budget, int):
            copied = f"{show_bytes(held)}, {held} bytes"
            self.witness.say("retained", held, "backward(retain_graph=True) keeps what a planned step has saved, and works on "
                             f"a copy ({copied}): this step may pass the budget of {show_bytes(budget)}; from the next step on "
                             "there is room for that")  # fmt: skip
        elif budget is not None:
            self.witness.retained(held, "what a planned step has saved")


def storages(tensors: Sequence[torch.Tensor], rounding: int) -> dict[int, int]:
    """Bytes of each storage, as the machine hands them out."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return {key: -(-size // rounding) * rounding for key, size in found.items()}


__all__ = ["Ledger", "Options", "Room", "Visit", "ledger_of", "storages"]

"""Whether a call is the one that was planned for, on a model that still is what it was then.

Everything here is looked at before every step, and takes some tens of microseconds; so what is looked at is found once.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from ...planner.capture.calls import Signature, autocast_state, flatten_call, leaf_names
from ...planner.capture.capture import Captured
from ...planner.capture.graph import Source
from ...planner.capture.guards import KNOWN
from ...planner.capture.hooks import hook_tables, is_traced_hook, name_of, owner_told
from ...planner.capture.inputs import TensorFacts, check_places, distance, facts, places_of, same
from ...planner.capture.questions import Call, inputs_of
from ...planner.capture.reads import Watch
from ...planner.capture.sized import Sized
from ...planner.capture.writes import WriteBack, training_set
from ...planner.ir.errors import PlanMismatch
from .fetched import absence_of


class Checks:
    """Holds calls of a module to what was captured, and says what each of the code's arguments is.

    Attributes:
        watch: what forward reads beside tensors.
        stores: what it stores.
        slots: for each of the code's arguments that is a parameter or a buffer, the table that holds it, and its key there.
    """

    def __init__(
        self, module: nn.Module, captured: Captured, arguments: Sequence[Source], moves: bool = False, lays: bool = False,
        sized: Sized | None = None, admit: Callable[[tuple[int, ...]], bool] | None = None,
    ):  # fmt: skip
        """Look up what will be looked at.

        Args:
            module: that is called.
            captured: what was planned.
            arguments: of the code that runs.
            moves: whether it moves parameters elsewhere.
            lays: copy inputs that lie in memory otherwise than planned, where they would be refused.
            sized: the sizes that vary, of code that takes any.
            admit: whether that may run with given ones; default: with those that the trace serves.
        """
        self.module = module
        self.captured = captured
        self.arguments = arguments
        self.lays = lays
        self.sized, self.admit = sized, admit
        self.admitted: set[tuple[int, ...]] = set()
        places = {name: (owner._parameters if kind == "parameter" else owner._buffers, key)
                  for kind, owner, key, name in slots(module)}  # fmt: skip
        self.slots = [places.get(source.name) for source in arguments]
        self.children = [(owner._modules, dict(owner._modules)) for owner in module.modules()]
        looking = {(row.whose.owner, row.whose.table, row.whose.key) for row in captured.observed}
        self.hooks = [(owner_told(owner), table, dict(table), {key for key in table if (owner, attribute, key) in looking})
                      for owner, attribute, table in hook_tables(module)]  # fmt: skip
        self.tied = [(name, places[name], places[names[0]]) for names in captured.structure.tied for name in names[1:]]
        self.moved = changed_by(captured, arguments, moves)
        whose = self.moved | {place.storage for place in captured.signature.places if place is not None}
        self.owners = [(name, place) for name, place in places.items() if name in whose]
        tensors = [index for index, known in enumerate(captured.signature.inputs) if isinstance(known, TensorFacts)]
        self.looked_into = {tensors[index] for index in inputs_of(captured.questions)}
        own = training_set(captured.writes)
        self.modes = [(name, module.get_submodule(name), training)
                      for name, training in captured.signature.training if name not in own]  # fmt: skip
        self.look_up(captured.model())

    def look_up(self, model: nn.Module | None, renewed: bool = False) -> None:
        """Find what is watched and what is stored, in the module and in the model that it stands for."""
        roots = [self.module] if model is None else [self.module, model]
        self.watch = Watch(self.captured.reads, roots, renewed)
        self.stores = WriteBack(self.captured.writes, roots)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Checks":
        """The same of a copied module, which is watched once it is whole."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        for key, value in vars(self).items():
            if key not in ("watch", "stores"):
                shared = ("captured", "arguments", "sized", "admit")
                setattr(made, key, value if key in shared else copy.deepcopy(value, memo))
        return made

    def check_call(self, args: tuple, kwargs: dict) -> list[Any]:
        """The call's leaves, if it is the call that was planned for.

        Raises:
            PlanMismatch: what differs.
        """
        try:
            leaves, spec = flatten_call(self.module, args, kwargs)
        except TypeError as error:
            raise PlanMismatch(f"the arguments do not fit the model's forward: {error}") from None
        return self.check_leaves(leaves, spec)

    def check_leaves(self, leaves: list[Any], spec: TreeSpec) -> list[Any]:
        """The same for a call that has been flattened. What lies in memory otherwise than planned is replaced by a copy.

        Raises:
            PlanMismatch: what differs.
        """
        signature = self.captured.signature
        if spec != signature.spec:
            was, now = (", ".join(leaf_names(self.module, each)) or "nothing" for each in (signature.spec, spec))
            now += ", nested otherwise" * (was == now)
            raise PlanMismatch(f"the plan was made for a call with {was}, and this one has {now}: plan for it, or call the "
                               "model itself")  # fmt: skip
        signature = self.signature(leaves)
        for index, (leaf, known) in enumerate(zip(leaves, signature.inputs, strict=True)):
            now = facts(leaf)
            both = isinstance(now, TensorFacts) and isinstance(known, TensorFacts)
            if not same(now, known) and self.lays and both and now == msgspec.structs.replace(known, stride=now.stride):
                made = torch.empty_strided(known.shape, known.stride, dtype=leaf.dtype, device=leaf.device)
                leaves[index] = made.copy_(leaf.detach())
            elif not same(now, known):
                name = leaf_names(self.module, spec)[index]
                raise PlanMismatch(
                    f"{name} was {known} when the plan was made and is {now} now: plan for it, or call the model itself"
                )
        self.check_memory(leaves, signature)
        self.check_structure()
        for name, module, training in self.modes:
            if module.training != training:
                mode = "training" if training else "evaluation"
                raise PlanMismatch(
                    f"module {name or 'itself'} was in {mode} mode when the plan was made: switch back, or plan again"
                )
        if autocast_state(self.captured.program.device) != signature.autocast:
            raise PlanMismatch("autocast was set otherwise when the plan was made: call under the same autocast, or plan again")
        self.check_answers(leaves)
        return leaves

    def check_answers(self, leaves: list[Any]) -> None:
        """Refuse a call in which what the model asks of its inputs' values has other answers.

        Raises:
            PlanMismatch: which.
        """
        if not self.captured.questions:
            return
        sized = self.captured.sized
        sizes = None if sized is None else sized.of(leaves)
        by_symbol = None if sized is None or sizes is None else sized.holds.by_symbol(sizes)
        call, known = Call([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], by_symbol), {}
        for question in self.captured.questions:
            if not question.same(call, known):
                raise PlanMismatch(f"{question.where} asks about the values of inputs, and the answer was {question.answer} "
                                   "when the plan was made and is another now: plan for such a batch as well, or use "
                                   "memplan.within, which does")  # fmt: skip

    def signature(self, leaves: list[Any]) -> Signature:
        """What a call with the sizes of this one must look like.

        Raises:
            PlanMismatch: the trace, or the schedule, does not serve these sizes.
        """
        known, sized = self.captured.signature, self.sized
        sizes = None if sized is None else sized.of(leaves)
        if sized is None or sizes is None:
            return known
        if sizes not in self.admitted:
            told = ", ".join(f"{name}={size}" for name, size in zip(sized.names, sizes, strict=True))
            if not sized.holds(sizes):
                raise PlanMismatch(f"the plan's trace does not serve {told}, for which the model or torch does something else: "
                                   "plan for it, or call the model itself")  # fmt: skip
            if self.admit is not None and not self.admit(sizes):
                raise PlanMismatch(f"the plan's schedule does not fit its budget with {told}: plan for it, or call the model "
                                   "itself")  # fmt: skip
            if len(self.admitted) >= KNOWN:
                self.admitted.clear()
            self.admitted.add(sizes)
        return sized.signature(known, sizes)

    def check_memory(self, leaves: list[Any], signature: Signature) -> None:
        """Refuse inputs on another device, or that share memory otherwise than the step allows.

        Raises:
            PlanMismatch: which.
        """
        device = self.captured.program.device
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != device and (leaf.dim() or leaf.device.type != "cpu"):
                name = leaf_names(self.module, signature.spec)[index]
                raise PlanMismatch(f"{name} is on {leaf.device}, and the plan's ops are {device}'s: move it")
        owners = ((name, table[key]) for name, (table, key) in self.owners)
        now = places_of(leaves, ((name, value) for name, value in owners if value is not None))
        wrong = check_places(signature.inputs, signature.places, now, lambda: leaf_names(self.module, signature.spec),
                             self.moved)  # fmt: skip
        if wrong:
            raise PlanMismatch(f"{wrong}: plan for it, or call the model itself")
        for index in self.looked_into:  # of inputs that were one tensor, what was asked of each cannot be told apart
            for other, known in enumerate(signature.places):
                was = distance(signature.places[index], known)
                if other != index and was is not None and was != distance(now[index], now[other]):
                    names = leaf_names(self.module, signature.spec)
                    raise PlanMismatch(f"{names[index]}, about whose values the model asks, lay in the memory of "
                                       f"{names[other]} when the plan was made and does not now: plan for it, or call the "
                                       "model itself")  # fmt: skip

    def check_structure(self) -> None:
        """Refuse a model that does something else by now.

        Raises:
            PlanMismatch: what has changed.
        """
        for table, children in self.children:
            for key in [*children, *table] if table != children else ():
                if table.get(key) is not children.get(key):
                    done = "added" if key not in children else "removed" if key not in table else "replaced"
                    raise PlanMismatch(f"submodule {key} has been {done} since the plan was applied: plan again")
        if "watch" not in vars(self):  # this is a copy, whose module is whole by now
            self.look_up(None, renewed=True)
        self.watch.check()
        for owner, table, known, looking in self.hooks:
            gone = [key for key, hook in known.items() if table.get(key) is not hook]
            if len(table) > len(known) - len(gone) + self.stores.added.get(id(table), 0):
                raise PlanMismatch(f"{owner} has been given a hook since the plan was applied, and a planned step calls "
                                   "none of which it was not told: plan again, or remove it")  # fmt: skip
            for hook in [known[key] for key in gone if key not in looking and not is_traced_hook(known[key])]:
                raise PlanMismatch(f"{owner} has lost a hook ({name_of(hook)}) since the plan was applied, whose work is part "
                                   "of the planned step: plan again")  # fmt: skip
        for name, (table, key), (first, other) in self.tied:
            if table.get(key) is not first.get(other):
                raise PlanMismatch(f"{name} was tied to {other} when the plan was made and is not now: plan again")

    def given(self, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """What each of the code's arguments is in a call.

        Raises:
            PlanMismatch: the call, or the model by now, is not what was captured.
        """
        return self.fetched(self.check_call(args, kwargs))

    def fetched(self, leaves: list[Any]) -> list[torch.Tensor]:
        """The same for a call that has been checked."""
        return [self.fetch(source, slot, leaves) for source, slot in zip(self.arguments, self.slots, strict=True)]

    def fetch(self, source: Source, slot: Any, leaves: list[Any]) -> torch.Tensor:
        """A resident tensor, if it still is what was planned for.

        Raises:
            PlanMismatch: the parameter has changed its type or shape, or whether it wants a gradient.
        """
        if source.kind == "input":
            return leaves[source.index]
        if source.kind == "constant":
            assert source.value is not None
            return source.value
        table, key = slot
        value = table[key]
        known = self.captured.parameters[source.name]
        if not isinstance(value, torch.Tensor) or facts_of(value) != known:
            raise PlanMismatch(f"{source.name} was {known} when the plan was made and has changed since: plan again")
        device = self.captured.program.device
        if value.device.type != device:
            raise PlanMismatch(f"{source.name} is on {value.device}, and the plan's ops are {device}'s: move the model, or "
                               "plan it where it is")  # fmt: skip
        return value


def changed_by(captured: Captured, arguments: Sequence[Source], moves: bool) -> set[int | str]:
    """What a step changes, or moves elsewhere: inputs by the index of their leaf, parameters and buffers by name."""
    changed = {source.index if source.kind == "input" else source.name for source, _ in captured.traced.mutations.values()}
    if moves:
        changed |= {source.name for source in arguments if source.kind == "parameter"}
    updates = {} if captured.traced.adds else captured.traced.updates
    return changed | {name for pairs in updates.values() for name, _ in pairs}


def facts_of(value: torch.Tensor) -> TensorFacts:
    """A parameter's facts, also of one that is away."""
    found = TensorFacts.of(value)
    known = absence_of(value)
    return found if known is None else msgspec.structs.replace(found, stride=known.stride)


def slots(module: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """Where each parameter and buffer is held: (kind, module, key, full name)."""
    found = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for kind, table in (("parameter", owner._parameters), ("buffer", owner._buffers)):
            found += [(kind, owner, key, f"{prefix}.{key}" if prefix else key) for key in table]
    return found

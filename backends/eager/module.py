"""`Plan.apply`: a module that runs a plan with eager PyTorch's own kernels.

The planned module is a shallow copy of the model: it shares every parameter, buffer and submodule, and answers to the
same names. Only its `forward` is another: it checks that the call is the one planned for, and runs generated code
inside one autograd node.
"""

import copy
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.utils._pytree as pytree
from torch import nn

from ...planner.capture.calls import autocast_state, flatten_call, leaf_names
from ...planner.capture.capture import Captured, capture
from ...planner.capture.graph import Source
from ...planner.capture.hooks import hook_tables, is_traced_hook
from ...planner.capture.inputs import TensorFacts, check_places, facts, places_of, same
from ...planner.capture.inputtext import rebuild_inputs
from ...planner.capture.reads import Watch
from ...planner.capture.standins import named_tensors
from ...planner.capture.structure import Structure
from ...planner.capture.writes import Made, WriteBack, training_set
from ...planner.cost.table import apply_costs
from ...planner.ir.errors import CaptureError, MemplanError, PlanMismatch
from .arena import generate_static
from .codegen import Generated, generate
from .fed import Fed
from .fetched import Homes, absence_of, bring_back
from .graphs import recorded
from .recast import Backward
from .stepwitness import StepWitness
from .together import Together
from .updates import Updates

if TYPE_CHECKING:
    from ...planner.ir.plan import Plan


def apply(plan: "Plan", model: nn.Module, loss: Any = None, optimizer: Any = None, cuda_graphs: bool = False) -> nn.Module:
    """The planned module: see `Plan.apply`."""
    if plan.recipe.mapped:
        raise MemplanError("this plan is a mapping onto a scratchpad, which map_model(model, ...).run(*args) carries out")
    if plan.recipe.in_backward != (optimizer is not None):
        asked = "wants" if plan.recipe.in_backward else "has no optimizer_in_backward, so does not take"
        raise MemplanError(f"this plan {asked} an optimizer: plan.apply(model{', optimizer=...' * plan.recipe.in_backward})")
    if optimizer is not None and type(optimizer).__name__.lower() != str(plan.recipe.optimizer).lower():
        raise PlanMismatch(f"the plan was made for {plan.recipe.optimizer}, not for {type(optimizer).__name__}: plan again")
    if cuda_graphs:
        check_graphs(plan)
    if not isinstance(model, nn.Module):
        raise MemplanError(f"plan.apply takes the model that was planned, an nn.Module, not a {type(model).__name__}")
    bring_back(model.parameters())
    captured = captured_of(plan, model, loss, optimizer)
    check_parameters(model, captured)
    updates = None if optimizer is None else Updates(model, optimizer, captured.traced)
    traced, schedule, machine = captured.traced, plan.schedule, plan.machine
    with device_of(model.parameters()):
        if schedule.placements:
            code = generate_static(traced, schedule, machine, updates)
        else:
            homes = Homes(model, optimizer, traced, schedule, machine) if schedule.homes else None
            code = generate(traced, schedule, machine, updates, homes)
    return planned_module(model, captured, recorded(code) if cuda_graphs else code, StepWitness.of(plan))


def check_graphs(plan: "Plan") -> None:
    """Refuse to record a step that does not run on a GPU.

    Raises:
        MemplanError: it runs elsewhere.
    """
    if plan.program.device != "cuda":
        raise MemplanError(f"cuda_graphs=True records a step on a GPU, and this plan is for {plan.machine.name}: leave it out")


def captured_of(plan: "Plan", model: nn.Module, loss: Any, optimizer: Any) -> Captured:
    """What was traced, if this is that model and nothing of it has changed; else it is traced anew.

    Raises:
        PlanMismatch: its structure is not the plan's.
    """
    known = plan.captured
    if known is None:
        return recapture(plan, model, loss, optimizer)
    if known.model() is model and known.structure == Structure.of(model) and Watch(known.reads, [model]).whole():
        return known
    check_parameters(model, known)
    return recapture(plan, model, loss or known.loss, optimizer)


def recapture(plan: "Plan", model: nn.Module, loss: Any, optimizer: Any = None) -> Captured:
    """Capture the model of a plan that was loaded from a file.

    Raises:
        PlanMismatch: its structure is not the plan's.
    """
    if plan.recipe.loss and loss is None:
        raise PlanMismatch("the plan was made with a loss function, which its file cannot hold: pass it, as in "
                           "plan.apply(model, loss=...)")  # fmt: skip
    args, kwargs = rebuild_inputs(plan.recipe, model)
    recipe = plan.recipe
    try:
        captured = capture(
            model, args, kwargs, train=recipe.train, loss=loss, optimizer=optimizer or recipe.counted or recipe.optimizer,
            in_backward=recipe.in_backward, device=plan.program.device, runs_on=plan.machine.device,
        )  # fmt: skip
    except CaptureError as error:
        raise PlanMismatch(f"this {type(model).__name__} is not the model that the plan was made for: {error}") from error
    if apply_costs(captured.program, plan.machine).digest != plan.program.digest:
        raise PlanMismatch(f"this {type(model).__name__} does not trace to the program that the plan was made for "
                           "(other layers, shapes, modes or versions): plan it again")  # fmt: skip
    return captured


def check_parameters(model: nn.Module, captured: Captured) -> None:
    """Refuse a model whose parameters are not those planned for.

    Raises:
        PlanMismatch: the first name that differs, and how.
    """
    found = {name: TensorFacts.of(value) for name, value in named_tensors(model)}
    for name in [*captured.parameters, *found]:
        was, now = captured.parameters.get(name), found.get(name)
        if was != now:
            raise PlanMismatch(f"{name} was {was or 'absent'} when the plan was made and is {now or 'absent'} now: plan again")


def planned_module(model: nn.Module, captured: Captured, code: Generated, witness: StepWitness) -> nn.Module:
    """A shallow copy of the model with a planned forward."""
    planned = copy.copy(model)
    own = vars(model).get("forward")  # of this instance alone
    runner = _Runner(planned, own or MethodType(type(model).forward, planned), captured, code, witness)
    planned.forward = runner  # type: ignore[method-assign]
    runner.look_at_gradients()
    return planned


class _Runner:
    """The planned forward of one module."""

    def __init__(
        self, module: nn.Module, original: Any, captured: Captured, code: Generated, witness: StepWitness, lays: bool = False
    ):
        self.module = module
        self.witness = witness
        self.backward = Backward(captured.traced)
        self.lays = lays  # inputs that lie in memory otherwise are laid out as planned
        self.original = original
        self.__signature__ = inspect.signature(original)  # transformers' Trainer passes the arguments that it finds there
        self.captured = captured
        self.code = code
        places = {name: (owner._parameters if kind == "parameter" else owner._buffers, key)
                  for kind, owner, key, name in slots(module)}  # fmt: skip
        self.slots = [places.get(source.name) for source in code.arguments]
        self.modules = [(name, module.get_submodule(name)) for name, _ in captured.signature.training]
        self.children = [(owner._modules, dict(owner._modules)) for owner in module.modules()]
        self.hooks = [(owner, table, dict(table)) for owner, _, table in hook_tables(module)]
        self.tied = [(name, places[name], places[names[0]]) for names in captured.structure.tied for name in names[1:]]
        self.trained = [place for place in code.gradients if code.arguments[place].kind == "parameter"]
        self.changing = {source.name for source, _ in captured.traced.mutations.values()}
        self.moved = moved_by(captured, code)
        whose = self.moved | {place.storage for place in captured.signature.places if place is not None}
        self.owners = [(name, place) for name, place in places.items() if name in whose]
        self.together = Together(captured.traced)
        self.fed = Fed(captured.traced)
        own = training_set(captured.writes)
        known = zip(self.modules, captured.signature.training, strict=True)
        self.modes = [(name, part, training) for (name, part), (_, training) in known if name not in own]
        self.look_up(captured.model())

    def look_up(self, model: nn.Module | None, renewed: bool = False) -> None:
        """Find what is watched and what is stored, in the planned module and in the model that it stands for."""
        roots = [self.module] if model is None else [self.module, model]
        self.watch = Watch(self.captured.reads, roots, renewed)
        self.stores = WriteBack(self.captured.writes, roots)

    @torch.compiler.disable(reason="memplan has planned it")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        homes = self.code.homes
        if self.captured.train and not torch.is_grad_enabled():
            if homes is not None:
                homes.restore()
            return self.original(*args, **kwargs)  # an evaluation: nothing is kept for a backward pass
        check_saving()
        leaves = self.check_call(args, kwargs)
        inputs = self.fetched(leaves)
        self.stores.let_go()
        if self.captured.train:
            alone = self.code.arena is not None or homes is not None
            self.witness.begin((inputs[place] for place in self.trained), alone)
            results = _Planned.apply(self, *inputs)
        else:
            with torch.no_grad(), torch._C._DisableAutocast(), self.code.alone(), device_of(inputs):
                if homes is not None:
                    homes.begin()
                results = self.code.forward(inputs)[0]
        if self.captured.writes:
            self.stores.store(lambda made: self.made(made, results, leaves))
        flat = [results[leaf] if isinstance(leaf, int) else leaf[0] for leaf in self.captured.outputs]
        return pytree.tree_unflatten(flat, self.captured.output_spec)

    def made(self, made: Made, results: Any, leaves: list[Any]) -> Any:
        """A tensor that forward stores."""
        if made.kind == "named":
            owner, _, key = made.name.rpartition(".")
            return getattr(self.module.get_submodule(owner), key)
        return results[made.index] if made.kind == "output" else leaves[made.index]

    def __reduce__(self) -> Any:
        raise MemplanError("a planned module cannot be pickled: save its state_dict(), and the plan with plan.save()")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Runner":
        """The runner of a copied module: on its parameters, with the same code, which names none of them.

        Raises:
            MemplanError: the code updates or moves parameters, which it has to name.
        """
        if self.code.updates is not None or self.code.homes is not None:
            raise MemplanError("a planned module that updates or moves its parameters cannot be copied: copy the model, and "
                               "apply the plan to the copy with an optimizer of its own")  # fmt: skip
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.witness = self.witness.anew()
        shared = ("captured", "code", "changing", "trained", "backward", "fed", "__signature__")
        for key, value in vars(self).items():
            if key not in ("witness", "watch", "stores"):
                setattr(made, key, value if key in shared else copy.deepcopy(value, memo))
        made.look_at_gradients()
        return made

    def look_at_gradients(self) -> None:
        """Have one parameter's gradients looked at by the witness."""
        for place in self.trained[:1]:
            table, key = self.slots[place]  # type: ignore[misc]
            self.witness.watch(self, self.code.arguments[place].name, table[key])

    def check_call(self, args: tuple, kwargs: dict) -> list[Any]:
        """The call's leaves, if it is the call that was planned for.

        Raises:
            PlanMismatch: what differs.
        """
        signature = self.captured.signature
        try:
            leaves, spec = flatten_call(self.module, args, kwargs)
        except TypeError as error:
            raise PlanMismatch(f"the arguments do not fit the model's forward: {error}") from None
        if spec != signature.spec:
            was, now = (", ".join(leaf_names(self.module, each)) or "nothing" for each in (signature.spec, spec))
            now += ", nested otherwise" * (was == now)
            raise PlanMismatch(f"the plan was made for a call with {was}, and this one has {now}: plan for it, or call the "
                               "model itself")  # fmt: skip
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
        self.check_memory(leaves)
        self.check_structure()
        for name, module, training in self.modes:
            if module.training != training:
                mode = "training" if training else "evaluation"
                raise PlanMismatch(
                    f"module {name or 'itself'} was in {mode} mode when the plan was made: switch back, or plan again"
                )
        if autocast_state(self.captured.program.device) != signature.autocast:
            raise PlanMismatch("autocast was set otherwise when the plan was made: call under the same autocast, or plan again")
        return leaves

    def check_memory(self, leaves: list[Any]) -> None:
        """Refuse inputs on another device, or that share memory otherwise than the step allows.

        Raises:
            PlanMismatch: which.
        """
        signature, device = self.captured.signature, self.captured.program.device
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
        for owner, table, known in self.hooks:
            if len(table) > len(known) + self.stores.added.get(id(table), 0):
                raise PlanMismatch(f"{owner} has been given a hook since the plan was applied, and a planned step calls "
                                   "none but the model's own: remove it, or hook the model itself")  # fmt: skip
            for hook in [hook for key, hook in known.items() if table.get(key) is not hook and not is_traced_hook(hook)]:
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise PlanMismatch(f"{owner} has lost a hook ({name}) since the plan was applied, whose work is part of the "
                                   "planned step: plan again")  # fmt: skip
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
        return [self.fetch(source, slot, leaves) for source, slot in zip(self.code.arguments, self.slots, strict=True)]

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


def checked_calls(model: nn.Module, captured: Captured) -> _Runner:
    """What holds calls of a model to what was captured, as a planned module's, for a backend that runs them otherwise.

    Its `given` is the values of the captured graph's sources. Inputs of other strides are copied, for these backends copy them
    anyway.
    """
    arguments = tuple(captured.traced.sources.values())
    nothing = Generated(source="", forward=None, backward=None, arguments=arguments, gradients=(), tangents={})
    return _Runner(model, type(model).forward, captured, nothing, StepWitness(None, 0, False, []), lays=True)


def moved_by(captured: Captured, code: Generated) -> set[int | str]:
    """What a step changes, or moves elsewhere: inputs by the index of their leaf, parameters and buffers by name."""
    changed = {source.index if source.kind == "input" else source.name for source, _ in captured.traced.mutations.values()}
    if code.homes is not None:
        changed |= {source.name for source in code.arguments if source.kind == "parameter"}
    return changed | {name for pairs in captured.traced.updates.values() for name, _ in pairs}


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


class _Planned(torch.autograd.Function):
    """The whole step as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, runner: _Runner, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        if runner.code.updates is not None:
            runner.code.updates.begin()
        ctx.tokens = [shared.claim() for shared in (runner.code.arena, runner.code.homes) if shared is not None]
        if runner.code.homes is not None:
            runner.code.homes.begin()
        # nothing is recorded below autograd, but some kernels (LSTM's on CPU) save what backward needs only if this is on
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast(), device_of(inputs):
            outputs, saved = runner.code.forward(list(inputs))
            returned = {id(value) for value in outputs}  # held as they are they would hold this node, and it them
            ctx.saved = [value.detach() if id(value) in returned else value for value in saved]
        ctx.runner = runner
        ctx.mark = runner.witness.mark()
        ctx.watched = [(source, value, value._version) for source, value in zip(runner.code.arguments, inputs, strict=True)]
        ctx.wanted = set(runner.code.tangents)
        plain = runner.captured.plain
        ctx.mark_non_differentiable(*(value for index, value in enumerate(outputs)
                                      if index in plain or not value.is_floating_point()))  # fmt: skip
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        runner, saved = ctx.runner, ctx.saved
        if torch.is_grad_enabled():
            raise MemplanError("a planned step's gradients cannot be differentiated again (create_graph=True): call the model "
                               "that was planned for that, not the planned one")  # fmt: skip
        if saved is None:
            raise MemplanError("this planned step has run backward already and freed what it read: call the model again")
        runner.backward.refuse()
        for index, tangent in enumerate(tangents):
            if tangent is not None and index not in ctx.wanted and index in runner.captured.stored:
                raise PlanMismatch(f"a gradient reaches {runner.captured.stored[index]}, which the model's forward stores, and "
                                   "the plan leaves it out: plan with loss=, a function that reads it from the model and adds "
                                   "it to the scalar you differentiate")  # fmt: skip
            if tangent is not None and index not in ctx.wanted:
                raise PlanMismatch("a gradient reaches an output of the model other than its loss, which the plan leaves out: "
                                   "plan with loss=, a function from the output to the scalar you differentiate")  # fmt: skip
        changing = runner.changing
        for source, value, version in ctx.watched:
            if value._version != version and source.name not in changing:
                raise MemplanError(f"{source.name} was changed in place between forward and backward: gradients would be wrong")
        left_out = runner.fed.left_out(tangents)
        ctx.saved = None
        ctx.watched = None
        runner.together.note()
        runner.witness.backward(ctx.mark)
        given = [laid_out(tangents[index], like) for index, like in runner.code.tangents.items()]
        updates = runner.code.updates
        try:
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                found = runner.code.backward(saved, given)
                for index in runner.code.lent:
                    name = runner.code.arguments[runner.code.gradients[index]].name
                    found[index] = runner.code.arena.lend(name, found[index])
        except Exception as error:
            if updates is None or not (updates.done or updates.begun):
                raise
            raise updates.explain(error) from error
        ctx.tokens = None
        result: list[torch.Tensor | None] = [None] * (1 + len(runner.code.arguments))
        for position, gradient, none in zip(runner.code.gradients, found, left_out, strict=True):
            result[1 + position] = None if none else gradient
        return tuple(result)


def check_saving() -> None:
    """Refuse a call inside of hooks on saved tensors, which do not see those of a planned step.

    Torch's own move or recompute what is saved, and change nothing: a plan decides that itself.

    Raises:
        MemplanError: there are such hooks, of somebody else's.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    if hooks is not None and not getattr(hooks[0], "__module__", "torch").startswith("torch."):
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise MemplanError(f"hooks on saved tensors ({name}) do not see those of a planned step: call it outside of them")


def device_of(inputs: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Makes the inputs' GPU the current one, as autograd does for the backward pass: generators and new tensors are its own."""
    found = next((value.device for value in inputs if value.is_cuda), None)
    return nullcontext() if found is None else torch.cuda.device(found)


def laid_out(tangent: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A tangent with the strides that the graph was traced with; zeros where autograd has none."""
    if tangent is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if tangent.stride() == like.stride() and tangent.dtype == like.dtype:
        return tangent
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tangent.device)
    return made.copy_(tangent)

"""`Plan.apply`: a module that runs a plan with eager PyTorch's own kernels.

The planned module is a shallow copy of the model: it shares every parameter, buffer and submodule, and answers to the
same names. Only its `forward` is another: it checks that the call is the one planned for, and runs generated code
inside one autograd node.
"""

import copy
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ...planner.capture.accumulate import added_up
from ...planner.capture.capture import Captured, capture
from ...planner.capture.inputs import TensorFacts
from ...planner.capture.inputtext import rebuild_inputs
from ...planner.capture.reads import Watch
from ...planner.capture.standins import named_tensors
from ...planner.capture.structure import Structure
from ...planner.capture.writes import Made
from ...planner.cost.table import apply_costs
from ...planner.ir.errors import CaptureError, MemplanError, MemplanWarning, PlanMismatch
from ...planner.ir.plan import dynamic_of
from .accumulation import Accumulation
from .admission import Admission
from .arena import generate_static
from .checks import Checks
from .codegen import Generated, generate
from .fed import Fed
from .fetched import Homes, bring_back
from .graphs import recorded
from .node import PlannedStep, check_untouched, device_of
from .observers import Observers
from .recast import Backward
from .sizedcode import generate_sized
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
    if plan.machine.device != plan.program.device and draws_in_16_bits(captured):
        warnings.warn(f"this plan is for {plan.machine.name}; on {plan.program.device} its dropout of 16 bits draws otherwise "
                      "than eager PyTorch's: plan with machine='local' for eager's bits here", MemplanWarning,
                      stacklevel=3)  # fmt: skip
    code = coded(plan, captured, model, optimizer)
    admit = Admission(plan, captured.sized) if plan.recipe.sizes and captured.sized is not None else None
    return planned_module(model, captured, recorded(code) if cuda_graphs else code, StepWitness.of(plan), admit)


def draws_in_16_bits(captured: Captured) -> bool:
    """Whether a step has dropout of 16 bits, which a trace for the CPU writes as the CPU's eager mode computes it
    (`planner/capture/restore.py`), and one for another device does not."""
    dropout = torch.ops.aten.native_dropout.default
    called = [node for node in captured.traced.nodes if node is not None and node.target == dropout]
    return any(node.all_input_nodes[0].meta["val"].dtype.itemsize < 4 for node in called)


def coded(plan: "Plan", captured: Captured, model: nn.Module, optimizer: Any = None) -> Generated:
    """The code that carries out a plan of what was captured of a model."""
    updates: Any = None if optimizer is None else Updates(model, optimizer, captured.traced)
    if captured.traced.adds:
        updates = Accumulation(captured.traced)
    traced, schedule, machine = captured.traced, plan.schedule, plan.machine
    if plan.recipe.sizes:
        return generate_sized(captured, schedule)
    with device_of(model.parameters()):
        if schedule.placements:
            return generate_static(traced, schedule, machine, updates)
        homes = Homes(model, optimizer, traced, schedule, machine) if schedule.homes else None
        return generate(traced, schedule, machine, updates, homes)


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
            dynamic=dynamic_of(recipe.sizes),
        )  # fmt: skip
    except CaptureError as error:
        raise PlanMismatch(f"this {type(model).__name__} is not the model that the plan was made for: {error}") from error
    captured = added_up(captured, recipe.calls > 1) if recipe.accumulate else captured
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


def planned_module(
    model: nn.Module,
    captured: Captured,
    code: Generated,
    witness: StepWitness,
    admit: Callable[[tuple[int, ...]], bool] | None = None,
) -> nn.Module:
    """A shallow copy of the model with a planned forward; `admit` is that of `Checks`."""
    planned = copy.copy(model)
    own = vars(model).get("forward")  # of this instance alone
    runner = Runner(planned, own or MethodType(type(model).forward, planned), captured, code, witness, admit)
    planned.forward = runner  # type: ignore[method-assign]
    runner.look_at_gradients()
    return planned


class Runner:
    """The planned forward of one module."""

    def __init__(
        self, module: nn.Module, original: Any, captured: Captured, code: Generated, witness: StepWitness,
        admit: Callable[[tuple[int, ...]], bool] | None = None,
    ):  # fmt: skip
        self.module = module
        self.witness = witness
        self.backward = Backward(captured.traced)
        self.original = original
        self.__signature__ = inspect.signature(original)  # transformers' Trainer passes the arguments that it finds there
        self.captured = captured
        self.code = code
        sized = captured.sized if code.sizes else None
        self.checks = Checks(module, captured, code.arguments, moves=code.homes is not None, sized=sized, admit=admit)
        self.places = {source.name: place for place, source in enumerate(code.arguments)}
        self.trained = [place for place in code.gradients if code.arguments[place].kind == "parameter"]
        self.changing = {source.name for source, _ in captured.traced.mutations.values()}
        self.together = Together(captured.traced)
        self.fed = Fed(captured.traced)
        self.observers = Observers(module, captured)

    @torch.compiler.disable(reason="memplan has planned it")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        homes = self.code.homes
        if self.captured.train and not torch.is_grad_enabled():
            if homes is not None:
                homes.restore()
            return self.original(*args, **kwargs)  # an evaluation: nothing is kept for a backward pass
        check_saving()
        leaves = self.checks.check_call(args, kwargs)
        return self.run(leaves, self.checks.fetched(leaves))

    def run(self, leaves: list[Any], inputs: list[torch.Tensor]) -> Any:
        """One step, or one inference, of a call that has been checked.

        Args:
            leaves: of the call.
            inputs: the code's arguments in it.
        """
        homes = self.code.homes
        self.checks.stores.let_go()
        if self.captured.train:
            alone = self.code.arena is not None or homes is not None
            self.witness.begin((inputs[place] for place in self.trained), alone)
            results = PlannedStep.apply(self, *inputs)
        else:
            versions = self.observers.versions(inputs)
            with torch.no_grad(), self.observers.running(), torch._C._DisableAutocast(), self.code.alone(), device_of(inputs):
                if homes is not None:
                    homes.begin()
                results = self.code.forward(inputs)[0]
            check_untouched(self, versions, inputs)
        if self.observers:
            self.checks.watch.check("before a hook was called in this step")
        if self.captured.writes:
            self.checks.stores.store(lambda made: self.made(made, results, leaves))
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runner":
        """The runner of a copied module: on its parameters, with the same code, which names none of them.

        Raises:
            MemplanError: the code updates or moves parameters, which it has to name.
        """
        if isinstance(self.code.updates, Updates) or self.code.homes is not None:
            raise MemplanError("a planned module that updates or moves its parameters cannot be copied: copy the model, and "
                               "apply the plan to the copy with an optimizer of its own")  # fmt: skip
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.witness = self.witness.anew()
        shared = ("captured", "code", "changing", "places", "trained", "backward", "fed", "__signature__")
        for key, value in vars(self).items():
            if key != "witness":
                setattr(made, key, value if key in shared else copy.deepcopy(value, memo))
        made.look_at_gradients()
        return made

    @property
    def named(self) -> list[str]:
        """The parameters whose gradients the step makes."""
        updates = self.code.updates
        added = list(updates.terms) if isinstance(updates, Accumulation) else []
        return [self.code.arguments[place].name for place in self.trained] + added

    def look_at_gradients(self) -> None:
        """Have one parameter's gradients looked at by the witness."""
        for place in self.trained[:1]:
            table, key = self.checks.slots[place]  # type: ignore[misc]
            self.witness.watch(self, self.code.arguments[place].name, table[key])


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

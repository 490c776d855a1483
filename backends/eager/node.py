"""The whole step as one node of autograd."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...planner.ir.errors import MemplanError, PlanMismatch
from .accumulation import Accumulation
from .codegen import laid_out
from .retained import copied
from .witness import keeps_graph

if TYPE_CHECKING:
    from .module import Runner


class PlannedStep(torch.autograd.Function):
    """The whole step as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, runner: "Runner", *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        if runner.code.updates is not None:
            runner.code.updates.begin()
        ctx.tokens = [shared.claim() for shared in (runner.code.arena, runner.code.homes) if shared is not None]
        if runner.code.homes is not None:
            runner.code.homes.begin()
        # nothing is recorded below autograd, but some kernels (LSTM's on CPU) save what backward needs only if this is on
        looking, versions = runner.observers, runner.observers.versions(inputs)
        below = looking.running(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast()
        with torch.enable_grad(), below[0], below[1], below[2], device_of(inputs):
            outputs, saved = runner.code.forward(list(inputs))
            returned = {id(value) for value in outputs}  # held as they are they would hold this node, and it them
            ctx.saved = [value.detach() if id(value) in returned else value for value in saved]
        ctx.runner = runner
        ctx.mark = runner.witness.mark()
        check_untouched(runner, versions, inputs)
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
        watched, retained = ctx.watched, keeps_graph()
        if retained:
            saved = copied(runner.captured.traced, runner.code, saved)
        else:
            ctx.saved = ctx.watched = None
        updates = runner.code.updates
        if isinstance(updates, Accumulation):
            values = {source.name: value for source, value, _ in watched}
            nodes = {source.name: node for source, (node, _) in zip(runner.code.arguments, ctx.next_functions, strict=True)}
            updates.listen(values, nodes, runner.fed.absent(tangents))
        runner.together.note(isinstance(updates, Accumulation) and updates.there)
        runner.witness.backward(ctx.mark, retained)
        given = [laid_out_like(tangents[index], like) for index, like in runner.code.tangents.items()]
        try:
            with runner.observers.running(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
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
        if isinstance(updates, Accumulation):
            for name, gradient in updates.taken().items():
                result[1 + runner.places[name]] = gradient
        return tuple(result)


def check_untouched(runner: "Runner", versions: list[int], inputs: Iterable[torch.Tensor]) -> None:
    """Refuse a step in which a hook that was to look on has changed what the step reads.

    Raises:
        MemplanError: which tensor.
    """
    for source, was, now in zip(runner.code.arguments, versions, runner.observers.versions(inputs), strict=False):
        if was != now and source.name not in runner.changing:
            raise MemplanError(f"a hook has changed {source.name} in place in the forward pass, as it did not when the "
                               "model was planned: change it outside, or at every call")  # fmt: skip


def device_of(inputs: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Makes the inputs' GPU the current one, as autograd does for the backward pass: generators and new tensors are its own."""
    found = next((value.device for value in inputs if value.is_cuda), None)
    return nullcontext() if found is None else torch.cuda.device(found)


def laid_out_like(tangent: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    """A tangent with the layout that the code expects, where it does not see to that itself."""
    return tangent if like is None else laid_out(tangent, like.shape, like.stride(), like.dtype, like.device)

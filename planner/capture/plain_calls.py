"""What a model arranges with autograd beside its operators, while it is traced: calls that a plan makes needless, and others.

*Checkpointing* inside a model says what to keep, which is the plan's to decide: the function is called, once. Of the reentrant
kind two things remain, for they decide values: where no argument requires a gradient, none gets one, and an argument's
gradient is summed up inside before it is added to others. `save_on_cpu` says where to keep things, and so means nothing either.

What would change a step in a way that a planned one does not repeat is refused where it is done: other hooks on saved tensors,
and `backward()` called by a forward pass. What a `Function` does in its own backward pass, such as hand-written checkpointing
that calls `backward()` there, is followed: see `gathered`.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch._guards import active_fake_mode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from .constants import Constants, Refusal

# Where the generator of checkpointing that is not reentrant is looked up when a model is called: the second took it by name.
GENERATOR = "_checkpoint_without_reentrant_generator"
GENERATORS = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")
SEEDS = ("manual_seed", "seed", "set_rng_state")


def is_traced() -> bool:
    """Whether this thread is tracing a model: others may train in the meantime."""
    return active_fake_mode() is not None


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute for a while, of a class or a module."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def plain_calls() -> Iterator[None]:
    """Checkpointing inside a model is a call of what is checkpointed."""
    reentrant = checkpointing.CheckpointFunction.apply
    with ExitStack() as stack:

        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return call_reentrant(function, args) if is_traced() else reentrant(function, preserve, *args)

        stack.enter_context(replaced(checkpointing.CheckpointFunction, "apply", staticmethod(apply)))
        for name in GENERATORS:
            module = sys.modules.get(name)
            if hasattr(module, GENERATOR):
                stack.enter_context(replaced(module, GENERATOR, around_call(getattr(module, GENERATOR))))
        yield


def call_reentrant(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What reentrant checkpointing comes to: see above. Its casts have a region of autocast of their own."""
    wanted = [isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args]
    if not torch.is_grad_enabled() or not any(wanted):
        with torch.no_grad():
            return function(*args)
    mode = active_fake_mode()
    region = mode.region if isinstance(mode, Constants) else None
    if isinstance(mode, Constants) and region is not None:
        mode.region = -1 - len(mode.casts)
    try:
        return function(*(arg.view_as(arg) if needed else arg for arg, needed in zip(args, wanted, strict=True)))
    finally:
        if isinstance(mode, Constants):
            mode.region = region


def around_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """What runs before and after a checkpointed call: the model's own context for it, but no bookkeeping of torch's."""

    def generator(function: Any, preserve: bool = True, context_fn: Any = None, *rest: Any, **options: Any) -> Iterator[None]:
        if not is_traced():
            yield from original(function, preserve, context_fn or checkpointing.noop_context_fn, *rest, **options)
            return
        context = nullcontext() if context_fn is None else context_fn()[0]
        with nullcontext() if isinstance(context, checkpointing._CachingTorchDispatchMode) else context:
            yield

    return generator


@contextmanager
def no_saving() -> Iterator[None]:
    """Hooks on saved tensors: `save_on_cpu` does nothing, torch's own checkpointing goes on, others are refused.

    Those that are set already, around the call that plans, are set aside.
    """
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def is_plain(hooks: saved_tensors_hooks) -> bool:
        return type(hooks) is save_on_cpu and is_traced()

    def entered(hooks: saved_tensors_hooks) -> None:
        if is_plain(hooks):
            return
        if is_traced() and type(hooks).__module__ != checkpointing.__name__:
            name = getattr(hooks.pack_hook, "__qualname__", type(hooks.pack_hook).__name__)
            raise Refusal(f"the model sets hooks on saved tensors ({name}), which a planned step would not call: leave them "
                          "out of forward, for the plan decides what is kept and where")  # fmt: skip
        enter(hooks)

    def left(hooks: saved_tensors_hooks, *error: object) -> None:
        if not is_plain(hooks):
            leave(hooks, *error)

    found = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:  # type: ignore[attr-defined]
        found.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()  # type: ignore[attr-defined]
    try:
        with replaced(saved_tensors_hooks, "__enter__", entered), replaced(saved_tensors_hooks, "__exit__", left):
            yield
    finally:
        for pack, unpack in reversed(found):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)  # type: ignore[attr-defined]


@contextmanager
def noted_seeds(found: list[str]) -> Iterator[None]:
    """Note where a model sets the state of the generators that others draw from; torch's own checkpointing may."""
    owners = (torch, torch.random, torch.cuda, torch.cuda.random)
    with ExitStack() as stack:
        for owner in owners:
            for name in SEEDS:
                original = getattr(owner, name)

                def noted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                    caller = sys._getframe(1)
                    if is_traced() and not called_by_checkpointing(caller):
                        found.append(caller_line(caller))
                    return original(*args, **kwargs)

                stack.enter_context(replaced(owner, name, noted))
        yield


def called_by_checkpointing(frame: Any) -> bool:
    """Whether a frame is torch's checkpointing, or was called by it through torch alone."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "contextlib"):
        if frame.f_globals["__name__"] == checkpointing.__name__:
            return True
        frame = frame.f_back
    return False


def caller_line(frame: Any) -> str:
    """`file:line (code)` of the innermost frame outside torch."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "contextlib"):
        frame = frame.f_back
    known = traceback.extract_stack(frame, 1)[-1]
    return f"{known.filename}:{known.lineno} ({(known.line or '').strip()[:120]})"


@contextmanager
def gathered(step: nn.Module) -> Iterator[None]:
    """Let a `Function` call `backward()` in its backward pass while the tracer asks for all gradients at once.

    What such a call adds to `.grad` is part of the answer: of each parameter the gradients that arrive, from inside and from
    outside, are added up in the order in which they do, as eager adds them up. Such a `Function` calls a part of the model
    again, whose parameters are then leaves over those that are traced.
    """
    run, forward = torch.autograd._engine_run_backward, step.forward  # type: ignore[attr-defined]
    traced: list[tuple[dict[str, Any], dict[str, Any]]] = []
    depth = [0]

    def called(*inputs: Any) -> Any:
        traced[:] = [(table, dict(table)) for module in step.modules() for table in (module._parameters, module._buffers)]
        depth[0] += 1
        try:
            return forward(*inputs)
        finally:
            depth[0] -= 1

    def answered(outputs: Any, gradients: Any, keep: bool, create: bool, inputs: Any, *rest: Any, **options: Any) -> Any:
        if depth[0] or not is_traced() or options.get("accumulate_grad", True):
            return run(outputs, gradients, keep, create, inputs, *rest, **options)
        leaves = {id(each): each.detach().requires_grad_() for each in inputs}
        arrived: dict[int, list[torch.Tensor]] = {key: [] for key in leaves}
        hooks = [value.register_hook(arrived[id(each)].append) for each in inputs for value in (each, leaves[id(each)])]
        before = [(table, dict(table)) for table, _ in traced]
        depth[0] += 1
        try:
            for table, values in traced:
                table.update({key: leaves.get(id(value), value) for key, value in values.items()})
            found = run(outputs, gradients, keep, create, inputs, *rest, **options)
        finally:
            depth[0] -= 1
            for table, values in before:
                table.update(values)
            for hook in hooks:
                hook.remove()
        inside = [leaves[id(each)].grad is not None for each in inputs]
        terms = [arrived[id(each)] for each in inputs]
        return tuple(sum(each[1:], each[0]) if add else value for add, each, value in zip(inside, terms, found, strict=True))

    with replaced(torch.autograd, "_engine_run_backward", answered), replaced(step, "forward", called):
        with replaced(torch.autograd, "_is_checkpoint_valid", lambda: True):
            yield

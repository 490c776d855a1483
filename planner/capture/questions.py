"""What a model asks about the values of its inputs while it is traced, and what it was told.

`if mask.all():` decides which kernel runs. So small inputs of integers and bools carry the example's values through tracing,
and what is computed of these alone is computed; a question is answered as eager PyTorch answers it, and kept with how its
answer comes from the inputs. A plan is for calls whose answers are the same: `Asker` finds them out for another call, in
microseconds and without the model. How many elements something has (`mask.nonzero()`) is no question: a plan's shapes do not
come from data.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

ELEMENTS = 1 << 20  # inputs with more are not looked into
Answer = bool | int | float | complex


@dataclass(frozen=True, eq=False)
class Value:
    """How a small tensor comes from the inputs.

    Attributes:
        func: the operator that makes it; None for an input.
        args: its arguments: values, tensors that are the same in every call, and plain ones.
        kwargs: likewise.
        part: which of its results this is.
        index: of an input, which.
    """

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    part: int = 0
    index: int = -1


@dataclass(frozen=True, eq=False)
class Question:
    """One that the model asked.

    Attributes:
        value: how the answer is computed; its operator returns a number.
        answer: in the call that was traced.
        where: the line that asked, as `file:line (code)`.
    """

    value: Value
    answer: Answer
    where: str


class Questions:
    """Which fake tensors have values that come from inputs, and what was asked of them.

    Attributes:
        asked: in order, with repetitions, for AOTAutograd calls a model more than once.
        stale: storages, by their identity, that have been written since their values were known.
    """

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.stale: dict[int, torch.UntypedStorage] = {}

    def give(self, made: torch.Tensor, index: int, real: torch.Tensor) -> None:
        """Let a fake input have its values, if it is one that can be asked about.

        Args:
            made: the fake tensor.
            index: of the input among those traced.
            real: what it stands for.
        """
        plain = real.layout is torch.strided and not isinstance(real, FakeTensor) and real.device.type != "meta"
        if plain and not real.dtype.is_floating_point and not real.dtype.is_complex and real.numel() <= ELEMENTS:
            with _disable_current_modes():
                made.constant = real.detach().clone()  # type: ignore[attr-defined]
            made.came_from = Value(None, index=index)  # type: ignore[attr-defined]

    def origin(self, tensor: FakeTensor) -> Value | None:
        """How a tensor's value comes from the inputs; None where it does not, or is not known."""
        if tensor.constant is not None and tensor.untyped_storage()._cdata in self.stale:
            tensor.constant = None
        return getattr(tensor, "came_from", None) if tensor.constant is not None else None

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run an operator on fake tensors, and on the values that come from inputs where it has nothing else to read.

        Args:
            func: the operator.
            args: of the call, its tensors fake.
            kwargs: likewise.
            run: the call, on fake tensors alone.
        """
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        from_inputs = [leaf for leaf in given if self.origin(leaf) is not None]
        if not from_inputs:
            return run()
        if func._schema.is_mutable:
            for leaf in from_inputs:  # whichever it writes: nothing is known of them any more
                storage = leaf.untyped_storage()
                self.stale[storage._cdata], leaf.constant = storage, None
            return run()
        if torch.Tag.nondeterministic_seeded in func.tags or any(leaf.constant is None for leaf in given):
            return run()
        if torch.Tag.dynamic_output_shape in func.tags:
            with hidden(from_inputs):
                return run()
        real = pytree.tree_map_only(FakeTensor, lambda leaf: leaf.constant, (args, kwargs))
        made = (func, *pytree.tree_map_only(FakeTensor, lambda leaf: self.origin(leaf) or leaf.constant, (args, kwargs)))
        with _disable_current_modes(), torch.no_grad():
            values = func(*real[0], **on(real[1], from_inputs[0].constant.device))  # type: ignore[union-attr]
        if torch.Tag.data_dependent_output in func.tags:
            self.asked.append(Question(Value(*made), values, asking_line()))
            return values
        with hidden(from_inputs):
            out = run()
        pairs = list(zip(pytree.tree_leaves(out), pytree.tree_leaves(values), strict=True))
        if all(isinstance(value, torch.Tensor) and value.numel() <= ELEMENTS for _, value in pairs):
            for part, (fake, value) in enumerate(pairs):
                fake.constant, fake.came_from = value, Value(*made, part=part)
        return out

    @property
    def different(self) -> tuple[Question, ...]:
        """What was asked, each question once."""
        found: dict[Any, Question] = {}
        for question in self.asked:
            found.setdefault((likeness(question.value), repr(question.answer)), question)
        return tuple(found.values())


@contextmanager
def hidden(tensors: list[FakeTensor]) -> Iterator[None]:
    """Let fake tensors have no values for a while: torch would make results of them that are on another device."""
    kept = [(tensor, tensor.constant) for tensor in tensors]
    for tensor in tensors:
        tensor.constant = None
    try:
        yield
    finally:
        for tensor, value in kept:
            tensor.constant = value


def on(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a call that is made on another device."""
    changed = {key: value for key, value in (("device", device), ("pin_memory", False)) if key in kwargs}
    return {**kwargs, **changed}


def likeness(value: Any) -> Any:
    """What two values have in common that are computed alike."""
    if isinstance(value, Value):
        arguments = (*value.args, *value.kwargs.items())
        return str(value.func), value.index, value.part, tuple(map(likeness, arguments))
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), repr(value.tolist())
    return tuple(map(likeness, value)) if isinstance(value, list | tuple) else repr(value)


def inputs_of(questions: Iterable[Question]) -> set[int]:
    """The inputs that questions are about."""
    found, stack = set(), [question.value for question in questions]
    while stack:
        value = stack.pop()
        if value.func is None:
            found.add(value.index)
        stack += [leaf for leaf in pytree.tree_leaves((value.args, value.kwargs)) if isinstance(leaf, Value)]
    return found


class Asker:
    """Asks the questions of a traced call about another one."""

    def __init__(self, questions: Sequence[Question]):
        self.questions = questions

    def changed(self, inputs: Sequence[torch.Tensor]) -> Question | None:
        """The first question whose answer is another than in the call that was traced.

        Args:
            inputs: the tensors of a call, in the order in which they were traced.
        """
        known: dict[Value, Any] = {}
        for question in self.questions:
            answer = compute(question.value, inputs, known)
            if answer != question.answer and not (answer != answer and question.answer != question.answer):
                return question
        return None


def compute(value: Value, inputs: Sequence[torch.Tensor], known: dict[Value, Any]) -> Any:
    """A value in a call; what has been computed of the same call is in `known`."""
    if value.func is None:
        return inputs[value.index].detach()
    if value not in known:
        device = inputs[0].device

        def given(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return compute(leaf, inputs, known)
            return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = pytree.tree_map(given, (value.args, value.kwargs))
        with torch.no_grad():
            known[value] = value.func(*args, **on(kwargs, device))
    found = known[value]
    return found[value.part] if isinstance(found, tuple | list) else found


def asking_line() -> str:
    """The line that asks: the innermost that is not torch's or memplan's own."""
    frame: Any = sys._getframe(1)
    ours = __file__.rsplit("/", 3)[0]
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith((f"{ours}/planner/", f"{ours}/backends/", "<")):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "the model"


__all__ = ["Answer", "Asker", "Question", "Questions", "Value", "inputs_of"]

"""What a model asks about values while it is traced, and what it was told.

`if mask.all():` decides which kernel runs; so does whether positions are one run of numbers, which depends on a size. How
small tensors are computed from inputs of integers and bools, from sizes that vary and from constants is remembered, so that a
question about their values can be answered as eager PyTorch answers it in the example, and asked again of another call, in
microseconds and without the model: where the answer is another one the model may go another way, and is to be traced anew. How
many elements something has (`mask.nonzero()`) is no question: a plan's shapes do not come from data.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from .symbols import Symbols

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
CONSTANT_ELEMENTS = 1 << 20  # constants larger than this are not evaluated while tracing, nor are inputs looked into
CONSTANT_ROW = 1 << 23  # but positions, which lie along one dimension, are up to this size
FACTORIES = {"arange", "ones", "zeros", "full", "scalar_tensor", "eye"}
VALUE = "_memplan_value"  # the attribute of a fake tensor that holds how it is computed
CPU = torch.device("cpu")


class Refusal(Exception):
    """What the model may not do, found at the line where it does it."""


@dataclass(frozen=True)
class Call:
    """What the answers of a call depend on.

    Attributes:
        inputs: its tensors, in the order in which they were traced; None for those that are not looked into.
        sizes: those that vary, by symbol, as numbers of sympy's.
    """

    inputs: Sequence[torch.Tensor | None] = ()
    sizes: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Given:
    """An input, by its index among those traced."""

    index: int


@dataclass(frozen=True, eq=False, repr=False)
class Number:
    """A number that is computed from sizes."""

    expr: Any
    kind: type


@dataclass(frozen=True, eq=False, repr=False)
class Constant:
    """A tensor that depends on nothing, and its version when it was read."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, eq=False, repr=False)
class Value:
    """How a tensor is computed.

    Attributes:
        func: the operator.
        leaves: of its arguments: inputs, values, numbers, constants, and what else it takes.
        spec: how they nest.
        index: which of several results; None for a single one.
    """

    func: Any
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    index: int | None = None

    def at(self, call: Call, known: dict[int, Any]) -> Any:
        """The tensor, or the answer, itself.

        Args:
            call: that it is computed for.
            known: what has been computed for it, by the identity of the value; added to.
        """
        if id(self) not in known:
            args, kwargs = pytree.tree_unflatten([real(leaf, call, known) for leaf in self.leaves], self.spec)
            if "pin_memory" in kwargs:
                kwargs = {**kwargs, "pin_memory": False}
            if is_factory(self.func):
                kwargs = {**kwargs, "device": CPU}
            with _disable_current_modes(), torch.no_grad():
                out = self.func(*args, **kwargs)
            known[id(self)] = out if self.index is None else out[self.index]
        return known[id(self)]


@dataclass(frozen=True, eq=False, repr=False)
class Question:
    """What was asked.

    Attributes:
        value: how the answer is computed.
        answer: in the example.
        where: the line that asked, as `file:line`.
    """

    value: Value
    answer: Any
    where: str

    def same(self, call: Call, known: dict[int, Any]) -> bool:
        """Whether the answer is the same in another call."""
        return repr(self.value.at(call, known)) == repr(self.answer)


def real(leaf: Any, call: Call, known: dict[int, Any]) -> Any:
    """An argument with real numbers and tensors, on the CPU."""
    if isinstance(leaf, Value):
        return leaf.at(call, known)
    if isinstance(leaf, Given):
        value = call.inputs[leaf.index]
        assert value is not None
        return value.detach().cpu()
    if isinstance(leaf, Number):
        return leaf.kind(leaf.expr.xreplace(dict(call.sizes or {})))
    if isinstance(leaf, Constant):
        if leaf.tensor._version != leaf.version:
            raise Refusal("the model asks for a value, and changes what it is made of in place")
        return leaf.tensor.cpu()
    return CPU if isinstance(leaf, torch.device) else leaf


def is_factory(func: Any) -> bool:
    """Whether an operator makes a tensor of numbers alone."""
    return getattr(func, "namespace", "") == "aten" and func._opname in FACTORIES


def written(func: Any, args: tuple) -> list[torch.Tensor]:
    """The operands that a call changes."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [value for known, value in pairs if known.is_write and isinstance(value, torch.Tensor)]


class Questions:
    """Which fake tensors are computed from inputs and sizes alone, and what was asked of their values.

    Attributes:
        symbols: the sizes that vary; None where none does.
        example: the call that is traced.
        asked: in order, with repetitions, for AOTAutograd calls a model more than once.
        valued: fake tensors with values, by the identity of their storage.
    """

    def __init__(self, symbols: "Symbols | None" = None) -> None:
        self.symbols = symbols
        self.inputs: list[torch.Tensor | None] = []
        self.asked: list[Question] = []
        self.valued: dict[int, list[weakref.ref[FakeTensor]]] = {}

    @property
    def example(self) -> Call:
        """The call that is traced."""
        return Call(self.inputs, None if self.symbols is None else self.symbols.env.backed_var_to_val)

    def meet(self, made: torch.Tensor, value: torch.Tensor) -> None:
        """Take the next input, which may be asked about if it is small and of integers or bools.

        Args:
            made: the fake tensor.
            value: what it stands for.
        """
        plain = value.layout is torch.strided and not isinstance(value, FakeTensor) and value.device.type != "meta"
        small = plain and not value.dtype.is_floating_point and not value.dtype.is_complex
        if small and value.numel() <= CONSTANT_ELEMENTS and isinstance(made, FakeTensor):
            self.give(made, Given(len(self.inputs)))
            self.inputs.append(value.detach())
        else:
            self.inputs.append(None)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run an operator on fake tensors; a question is answered and kept, of other results it is kept how they come about.

        Args:
            func: the operator.
            args: of the call, its tensors fake.
            kwargs: likewise.
            run: the call.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        taken = self.taken(func, leaves) if isinstance(func, torch._ops.OpOverload) else None
        if taken is not None and func._schema.returns and func.namespace == "aten":
            if not any("Tensor" in str(result.type) for result in func._schema.returns):
                value = Value(func, taken, spec)
                self.asked.append(Question(value, value.at(self.example, {}), asking_line()))
                return self.asked[-1].answer
        out = run()
        if isinstance(func, torch._ops.OpOverload):
            for value in written(func, args):
                self.forget(value)
        if taken is not None and not func._schema.is_mutable:
            flat = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, tuple | list) else []
            for index, made in enumerate(flat):
                if isinstance(made, FakeTensor) and self.is_small(made):
                    self.give(made, Value(func, taken, spec, None if isinstance(out, torch.Tensor) else index))
        return out

    def taken(self, func: torch._ops.OpOverload, leaves: list[Any]) -> tuple[Any, ...] | None:
        """What a result is computed from; None if that is not constants, inputs and sizes alone, or constants alone."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        varies = any(isinstance(leaf, SYMBOLIC) for leaf in leaves) or any(hasattr(each, VALUE) for each in tensors)
        if not varies or not (tensors or is_factory(func)) or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if not all(isinstance(each, FakeTensor) and (hasattr(each, VALUE) or each.constant is not None) for each in tensors):
            return None
        return tuple(self.recipe(leaf) for leaf in leaves)

    def recipe(self, leaf: Any) -> Any:
        """How one argument is computed."""
        if isinstance(leaf, SYMBOLIC):
            assert self.symbols is not None
            return Number(self.symbols.env.replace(leaf.node.expr), leaf.node.pytype)
        if isinstance(leaf, FakeTensor):
            value = getattr(leaf, VALUE, None)
            return value if value is not None else Constant(leaf.constant, leaf.constant._version)  # type: ignore[arg-type]
        return leaf

    def give(self, made: FakeTensor, value: Value | Given) -> None:
        """Remember how a tensor is computed."""
        made.constant = None
        setattr(made, VALUE, value)
        self.valued.setdefault(made.untyped_storage()._cdata, []).append(weakref.ref(made))

    def forget(self, value: torch.Tensor) -> None:
        """A tensor has been written to: what lies in its storage has other values."""
        for ref in self.valued.pop(value.untyped_storage()._cdata, ()):
            found = ref()
            if found is not None and hasattr(found, VALUE):
                delattr(found, VALUE)

    def is_small(self, made: torch.Tensor) -> bool:
        """Whether a tensor's values are worth computing, by the sizes of the example."""
        return is_small([size if self.symbols is None else self.symbols.hint(size) for size in made.shape])

    @property
    def different(self) -> tuple[Question, ...]:
        """What was asked, each question once."""
        found: dict[Any, Question] = {}
        for question in self.asked:
            found.setdefault((likeness(question.value), repr(question.answer)), question)
        return tuple(found.values())


def is_small(shape: Iterable[int]) -> bool:
    """Whether a tensor's values are worth computing."""
    count, longest = 1, 1
    for size in shape:
        count, longest = count * size, max(longest, size)
    return count <= (CONSTANT_ROW if count == longest else CONSTANT_ELEMENTS)


def likeness(value: Any) -> Any:
    """What two values have in common that are computed alike."""
    if isinstance(value, Value):
        return str(value.func), value.index, tuple(map(likeness, value.leaves)), str(value.spec)
    if isinstance(value, Constant):
        return str(value.tensor.dtype), tuple(value.tensor.shape), repr(value.tensor.tolist())
    return str(value.expr) if isinstance(value, Number) else repr(value)


def inputs_of(questions: Iterable[Question]) -> set[int]:
    """The inputs that questions are about."""
    found: set[int] = set()
    stack: list[Any] = [question.value for question in questions]
    while stack:
        leaf = stack.pop()
        if isinstance(leaf, Given):
            found.add(leaf.index)
        elif isinstance(leaf, Value):
            stack += leaf.leaves
    return found


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


__all__ = ["Call", "Question", "Questions", "Refusal", "inputs_of", "is_factory", "is_small", "written"]

"""Fake tensors with symbolic sizes, and what the model asks of values that depend on a size.

Positions, masks and the like depend on nothing but constants and sizes. How they are computed is remembered, so that a question
about their values (is this one run of numbers?) can be answered with the sizes of the example while tracing, and asked again
with other sizes: where the answer is another one, the model may take another way, and is to be traced anew.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .constants import CONSTANT_ELEMENTS, CONSTANT_ROW, Constants, Refusal, is_factory, written
from .symbols import Symbols

Sizes = Mapping[sympy.Symbol, Any]  # by symbol, as numbers of sympy's
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
EXPAND = torch.ops.aten.expand.default
VALUE = "_memplan_value"  # the attribute of a fake tensor that holds how it is computed


@dataclass(frozen=True, eq=False, repr=False)
class Value:
    """How a tensor is computed from constants and sizes.

    Attributes:
        func: the operator.
        leaves: of its arguments: values, `Number`s, constants with their version, and what else it takes.
        spec: how they nest.
        index: which of several results; None for a single one.
    """

    func: Any
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    index: int | None

    def at(self, sizes: Sizes, known: dict[int, Any]) -> torch.Tensor:
        """The tensor itself.

        Args:
            sizes: by symbol.
            known: what has been computed with these sizes, by the identity of the value; added to.
        """
        if id(self) not in known:
            out = run(self.func, self.leaves, self.spec, sizes, known)
            known[id(self)] = out if self.index is None else out[self.index]
        return known[id(self)]


@dataclass(frozen=True, eq=False, repr=False)
class Number:
    """A number that is computed from sizes."""

    expr: Any
    kind: type

    def at(self, sizes: Sizes) -> Any:
        """The number itself."""
        return self.kind(self.expr.xreplace(dict(sizes)))


@dataclass(frozen=True, eq=False, repr=False)
class Constant:
    """A tensor that depends on no size, and its version when it was read."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, eq=False, repr=False)
class Question:
    """What was asked of a value, and the answer by the example's sizes."""

    func: Any
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    answer: Any

    def same(self, sizes: Sizes, known: dict[int, Any]) -> bool:
        """Whether the answer is the same with other sizes."""
        return repr(run(self.func, self.leaves, self.spec, sizes, known)) == repr(self.answer)


def run(func: Any, leaves: tuple[Any, ...], spec: pytree.TreeSpec, sizes: Sizes, known: dict[int, Any]) -> Any:
    """An operator's result with real numbers and tensors, on the CPU."""

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.at(sizes, known)
        if isinstance(leaf, Number):
            return leaf.at(sizes)
        if isinstance(leaf, Constant):
            if leaf.tensor._version != leaf.version:
                raise Refusal("the model asks for a value that depends on a size, and changes what it is made of in place")
            return leaf.tensor
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    args, kwargs = pytree.tree_unflatten([real(leaf) for leaf in leaves], spec)
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    if is_factory(func):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with _disable_current_modes(), torch.no_grad():
        return func(*args, **kwargs)


class SizedConstants(Constants):
    """Fake tensors with symbolic sizes, which remember how they are computed where that depends on sizes alone.

    Attributes:
        symbols: the sizes.
        questions: what the model has asked.
    """

    def __init__(self, symbols: Symbols) -> None:
        super().__init__(symbols.env)
        self.symbols = symbols
        self.questions: list[Question] = []
        self.valued: dict[int, list[weakref.ref[FakeTensor]]] = {}  # by the identity of their storage

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            return self.remember(func, types, args, kwargs or {})
        return super().dispatch(func, types, args, kwargs)

    def remember(self, func: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        """A call, whose question is noted if it is one, and whose results are given values if they depend on sizes alone."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        taken = self.taken(func, leaves)
        asks = taken is not None and not any(str(result.type).startswith("Tensor") for result in func._schema.returns)
        if asks and taken is not None and func.namespace == "aten" and func._schema.returns:
            answer = run(func, taken, spec, self.symbols.env.backed_var_to_val, {})
            self.questions.append(Question(func, taken, spec, answer))
            return answer
        out = super().dispatch(func, types, args, kwargs)
        if func is EXPAND:
            out = self.expanded(types, args[0], out)
        for value in written(func, args):
            self.forget(value)
        if taken is not None and not func._schema.is_mutable:
            flat = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, tuple | list) else []
            for index, made in enumerate(flat):
                if isinstance(made, FakeTensor) and self.is_small(made):
                    self.give(made, Value(func, taken, spec, None if isinstance(out, torch.Tensor) else index))
        return out

    def expanded(self, types: Any, value: Any, out: Any) -> Any:
        """A tensor expanded as the kernel lays it out: torch's rule for symbolic sizes is another for size 1."""
        stride: list[Any] = [0] * out.dim() if value.dim() == 0 else list(out.stride())
        new = out.dim() - value.dim()
        for dim in reversed(range(out.dim() if value.dim() else 0)):
            if isinstance(out.shape[dim], int) and out.shape[dim] == 1:
                stride[dim] = value.stride(dim - new) if dim >= new else out.shape[dim + 1] * stride[dim + 1]
        if [str(step) for step in stride] == [str(step) for step in out.stride()]:
            return out
        return self.plain(
            torch.ops.aten.as_strided.default, types, (value, list(out.shape), stride, value.storage_offset()), {}
        )

    def taken(self, func: torch._ops.OpOverload, leaves: list[Any]) -> tuple[Any, ...] | None:
        """What the result is computed from; None if that is not constants and sizes alone, or no sizes."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        known = all(isinstance(each, FakeTensor) and (hasattr(each, VALUE) or each.constant is not None) for each in tensors)
        sized = any(isinstance(leaf, SYMBOLIC) for leaf in leaves) or any(hasattr(each, VALUE) for each in tensors)
        if not known or not sized or not (tensors or is_factory(func)):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        return tuple(self.recipe(leaf) for leaf in leaves)

    def recipe(self, leaf: Any) -> Any:
        """How one argument is computed."""
        if isinstance(leaf, SYMBOLIC):
            return Number(self.symbols.env.replace(leaf.node.expr), leaf.node.pytype)
        if isinstance(leaf, FakeTensor):
            value = getattr(leaf, VALUE, None)
            return value if value is not None else Constant(leaf.constant, leaf.constant._version)  # type: ignore[arg-type]
        return leaf

    def give(self, made: FakeTensor, value: Value) -> None:
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
        shape = [self.symbols.hint(size) for size in made.shape]
        count = 1
        for size in shape:
            count *= size
        return count <= (CONSTANT_ROW if count == max(shape, default=1) else CONSTANT_ELEMENTS)

    def evaluate(self, func: Any, args: Any, kwargs: Any, out: FakeTensor) -> None:
        if not any(isinstance(leaf, SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs))):
            super().evaluate(func, args, kwargs, out)

    def view_of_constant(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(leaf, SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs))):
            return self.plain(func, types, args, kwargs)
        return super().view_of_constant(func, types, args, kwargs)

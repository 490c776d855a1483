"""Sizes that vary from call to call: which dimensions of a call's tensors they are, and symbols that stand for them.

Tracing computes with a symbol for each, beside the number that it has in the example. Whatever the model, or torch, asks of a
size is answered by the number and remembered as a guard (`guards.py`): other sizes are served only where all answers are the
same. Sizes of 0 and 1 are never served, for torch takes other ways with them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from ..ir.errors import CaptureError

Dynamic = Mapping[int | str, Mapping[int, str]]  # leaf -> dimension -> name of the size; equal names are equal sizes
SMALLEST = 2


class Symbols:
    """Symbols for the sizes of one call.

    Attributes:
        names: of the sizes, in the order in which the call's leaves have them.
        places: for each name where it is found: pairs (leaf, dimension).
        hints: for each name the size in the example.
        env: torch's own book of symbols and guards.
        symbols: for each name its symbol.
        sizes: for each name the symbolic number.
        known: fake tensors by the identity of the example's tensors, which are held until `let_go`.
    """

    def __init__(self, dynamic: Dynamic, leaves: Sequence[Any], leaf_names: Sequence[str]):
        """Make the symbols.

        Args:
            dynamic: which dimensions vary, of which leaves: by their place or their name.
            leaves: of the example call.
            leaf_names: what to call them.

        Raises:
            CaptureError: a leaf or a dimension that is not there, two sizes for one name, or a size of 0 or 1.
        """
        self.places: dict[str, list[tuple[int, int]]] = {}
        self.hints: dict[str, int] = {}
        wanted = [(leaf_number(leaf, leaf_names), dims) for leaf, dims in dynamic.items()]
        for leaf, dims in sorted(wanted, key=lambda pair: pair[0]):
            for dim, name in sorted(dims.items()):
                self.place(leaf, dim, name, leaves, leaf_names)
        if not self.places:
            raise CaptureError("dynamic= names no dimension: give {leaf: {dimension: name}}, or leave it out")
        self.names = tuple(self.places)
        self.env = ShapeEnv(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.symbols: dict[str, sympy.Symbol] = {}
        self.sizes: dict[str, torch.SymInt] = {}
        for name in self.names:
            source = ConstantSource(f"size_{len(self.symbols)}")
            symbol = self.env.create_symbol(self.hints[name], source, dynamic_dim=DimDynamic.DYNAMIC)
            made: Any = self.env.create_symintnode(symbol, hint=self.hints[name], source=source)
            self.symbols[name], self.sizes[name] = symbol, made  # type: ignore[assignment]
        self.known: dict[int, torch.Tensor] = {}
        self.held: list[torch.Tensor] = []

    def place(self, leaf: int, dim: int, name: str, leaves: Sequence[Any], leaf_names: Sequence[str]) -> None:
        """Note one place of a size."""
        if not 0 <= leaf < len(leaves) or not isinstance(leaves[leaf], torch.Tensor):
            raise CaptureError(f"dynamic= names leaf {leaf} of the call, which is no tensor: the leaves are {list(leaf_names)}")
        value = leaves[leaf]
        if not -value.dim() <= dim < value.dim():
            raise CaptureError(f"dynamic= names dimension {dim} of {leaf_names[leaf]}, which has {value.dim()}")
        size = int(value.shape[dim])
        if size < SMALLEST:
            raise CaptureError(f"dynamic= names dimension {dim} of {leaf_names[leaf]}, which is {size}: torch takes other ways "
                               "with sizes of 0 and 1; trace with an example in which it is 2 or more")  # fmt: skip
        if self.hints.setdefault(name, size) != size:
            raise CaptureError(f"dynamic= calls two sizes {name!r}, and they are {self.hints[name]} and {size} in the example")
        self.places.setdefault(name, []).append((leaf, dim % value.dim()))

    def of_leaf(self, leaf: int) -> dict[int, str]:
        """The names of a leaf's dimensions that vary."""
        return {dim: name for name, rows in self.places.items() for at, dim in rows if at == leaf}

    def stand_in(self, mode: FakeTensorMode, leaf: int, value: torch.Tensor, name: str, device: str) -> torch.Tensor:
        """A fake tensor with symbolic sizes, which fills a storage of its own; one for a tensor that is given twice.

        Raises:
            CaptureError: the tensor does not fill its memory, so that its strides would be sizes of their own; or it is given
                twice, with other names.
        """
        named = self.of_leaf(leaf)
        if id(value) in self.known:
            made = self.known[id(value)]
            if [str(size) for size in made.shape] != [str(size) for size in self.shape(value, named)]:
                raise CaptureError(f"dynamic= calls the dimensions of {name} otherwise than those of the leaf that is the same "
                                   "tensor")  # fmt: skip
            return made
        shape = self.shape(value, named)
        stride = strides_like(value, shape)
        if stride is None:
            raise CaptureError(f"{name} has strides {list(value.stride())}, and what has a size that varies is to be dense: "
                               "pass .contiguous()")  # fmt: skip
        with mode, torch.no_grad():
            made = torch.empty_strided(shape, stride, dtype=value.dtype, device=device)
        if value.is_floating_point() or value.is_complex():
            made.requires_grad_(value.requires_grad)
        self.known[id(value)] = made
        self.held.append(value)
        return made

    def let_go(self) -> None:
        """Forget the example's tensors, which are the caller's."""
        self.known.clear()
        self.held.clear()

    def shape(self, value: torch.Tensor, named: dict[int, str]) -> list[Any]:
        """A tensor's shape with symbols in it."""
        return [self.sizes[named[dim]] if dim in named else int(size) for dim, size in enumerate(value.shape)]

    def hint(self, value: Any) -> Any:
        """A size, or what contains some, with the numbers of the example; asking makes no guard."""
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            number = self.env.replace(value.node.expr).xreplace(self.env.backed_var_to_val)
            return value.node.pytype(number)
        return value


def leaf_number(leaf: int | str, leaf_names: Sequence[str]) -> int:
    """The place of a leaf in the flattened call.

    Raises:
        CaptureError: the call has no leaf of this name.
    """
    if isinstance(leaf, str) and leaf not in leaf_names:
        raise CaptureError(f"dynamic= names {leaf!r}, and the call has {', '.join(leaf_names)}")
    return leaf_names.index(leaf) if isinstance(leaf, str) else leaf


def strides_like(value: torch.Tensor, shape: Sequence[Any]) -> list[Any] | None:
    """The strides of a dense tensor of another shape, whose dimensions lie in memory in the same order.

    Returns:
        None if the tensor itself is not dense.
    """
    order = sorted(range(value.dim()), key=lambda dim: (value.stride(dim), -dim))
    made: list[Any] = [0] * value.dim()
    step: Any = 1
    dense = 1
    for dim in order:
        if value.shape[dim] != 1 and value.stride(dim) != dense:
            return None
        made[dim] = step if value.stride(dim) == dense else int(value.stride(dim))  # of one element it may be anything
        step, dense = step * shape[dim], dense * value.shape[dim]
    return made


__all__ = ["Dynamic", "FakeTensor", "Symbols"]

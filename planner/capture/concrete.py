"""A graph traced with symbolic sizes -> the same graph with the numbers of the example, each of which remembers its symbol.

What follows (lowering, keys, generated code) takes graphs whose arguments are numbers and whose values have sizes. So the
arithmetic of sizes is taken out of the graph: its results become arguments, as `SizeInt` and `SizeFloat`, which are numbers and
know the expression that they come from. Each node keeps its symbolic value in `meta["sized"]`, beside the one with numbers.
"""

import operator
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

from ..ir.errors import CaptureError
from .constants import Constants
from .expressions import is_exact
from .questions import SYMBOLIC
from .symbols import Symbols

SIZED = "sized"  # the key in a node's `meta`


class SizeInt(int):
    """A whole number that is computed from sizes."""

    symbolic: torch.SymInt

    @property
    def expr(self) -> sympy.Expr:
        """How."""
        return self.symbolic.node.expr


class SizeFloat(float):
    """A number that is computed from sizes."""

    symbolic: torch.SymFloat

    @property
    def expr(self) -> sympy.Expr:
        """How."""
        return self.symbolic.node.expr


def concretise(graph: fx.GraphModule, symbols: Symbols) -> None:
    """Put the numbers of the example in the place of symbols, in a graph and its values.

    Raises:
        CaptureError: a size decides something that is no number: whether an operator does this or that.
    """
    store = _Concrete(symbols)
    numbers: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if (node.op == "call_function" and is_size(node, value)) or (node.op == "placeholder" and isinstance(value, SYMBOLIC)):
            numbers[node] = store.number(value)
            continue
        node.args = fx.map_arg(node.args, lambda arg: numbers.get(arg, arg))
        node.kwargs = fx.map_arg(node.kwargs, lambda arg: numbers.get(arg, arg))
        if node.op == "output" and any(isinstance(arg, int | float) for arg in pytree.tree_leaves(node.args)):
            raise CaptureError("the model returns a size, which varies with dynamic=: return it from outside of the model")
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            node.meta[SIZED] = value
            node.meta["val"] = pytree.tree_map(store.value, value)
    for node in reversed(numbers):
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()


def is_size(node: fx.Node, value: Any) -> bool:
    """Whether a node computes with sizes, not with tensors."""
    if isinstance(value, SYMBOLIC):
        return True
    name = getattr(node.target, "_opname", "")
    ours = getattr(node.target, "__module__", "") in (operator.__name__, "_operator", "math") or name.startswith("sym_")
    return ours and isinstance(value, bool | int | float)


class _Concrete:
    """Values with numbers for those with symbols; what shares a storage goes on sharing one."""

    def __init__(self, symbols: Symbols):
        self.symbols = symbols
        self.mode = Constants()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def number(self, value: Any) -> Any:
        """The number of a symbolic one."""
        if isinstance(value, torch.SymBool):
            raise CaptureError(
                "an operator is told yes or no by a size, which no plan for several sizes can: plan without dynamic="
            )
        found = self.symbols.hint(value)
        if isinstance(value, torch.SymInt | torch.SymFloat) and value.node.expr.free_symbols:
            if not is_exact(value.node.expr):
                raise CaptureError(f"a number is computed from sizes as {value.node.expr}, of which symbols do not keep the "
                                   "last bit: compute it with a tensor, or plan for each shape")  # fmt: skip
            made = (SizeInt if isinstance(value, torch.SymInt) else SizeFloat)(found)
            made.symbolic = value  # type: ignore[assignment]
            return made
        return found

    def value(self, value: Any) -> Any:
        """A leaf of a node's value."""
        if not isinstance(value, torch.Tensor):
            return self.symbols.hint(value)
        hint = self.symbols.hint
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            size = hint(storage.nbytes())
            with no_dispatch():
                self.storages[storage._cdata] = torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()
        with no_dispatch():
            meta = torch.empty(0, dtype=value.dtype, device="meta")
            shape, stride = [hint(size) for size in value.shape], [hint(step) for step in value.stride()]
            meta.set_(self.storages[storage._cdata], hint(value.storage_offset()), shape, stride)  # type: ignore[arg-type]
            made = FakeTensor(self.mode, meta, value.device)
        if value.is_conj():
            torch._C._set_conj(made, True)
        if value.is_neg():
            torch._C._set_neg(made, True)
        return made


__all__ = ["SIZED", "SizeFloat", "SizeInt", "concretise", "is_size"]

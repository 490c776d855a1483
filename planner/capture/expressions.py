"""Expressions of sizes -> Python functions of sizes, compiled once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import ToFloat
from torch.utils._sympy.printers import PythonPrinter

from .symbols import Symbols


class SizePrinter(PythonPrinter):
    """Prints an expression as Python that computes with plain numbers what the model computed with symbols."""

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return f"size_{expr}"

    def _print_Float(self, expr: sympy.Expr) -> str:
        return repr(float(expr))

    def _print_ToFloat(self, expr: sympy.Expr) -> str:
        return f"float({self._print(expr.args[0])})"

    def _helper_sqrt(self, expr: sympy.Expr) -> str:
        return f"math.sqrt({self._print(expr)})"


PRINTER = SizePrinter()
SPACE = {"math": math, "torch": torch}


def text(expr: Any) -> str:
    """An expression, or a number, as Python; symbols by their names."""
    return PRINTER.doprint(expr) if isinstance(expr, sympy.Basic) else repr(expr)


def expr_of(value: Any) -> Any:
    """The expression of a symbolic number, or of a number that remembers one; a number itself."""
    value = getattr(value, "symbolic", value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        found = value.node.expr
        return found if found.free_symbols else value.node.pytype(found)
    return value


def is_exact(expr: Any) -> bool:
    """Whether an expression gives the bits that the model's own arithmetic gives.

    Whole numbers are. Of sums and products of others sympy joins constants and forgets the order, which rounds otherwise.
    """
    if not isinstance(expr, sympy.Basic) or expr.is_Atom:
        return True
    if not all(is_exact(arg) for arg in expr.args):
        return False
    if isinstance(expr, sympy.Mul | sympy.Add) and not all(map(is_whole, expr.args)):
        constants = [arg for arg in expr.args if arg.is_number]
        shifts = isinstance(expr, sympy.Mul) and all(math.frexp(abs(float(each)))[0] == 0.5 for each in constants)
        return len(expr.args) == 2 and (not constants or shifts)
    return not isinstance(expr, sympy.Pow) or bool(expr.is_integer)


def is_whole(expr: Any) -> bool:
    """Whether an expression is a whole number, be it one in floating point: below 2^53 its sums and products are exact."""
    if expr.is_number:
        return float(expr).is_integer()
    if isinstance(expr, ToFloat):
        return bool(expr.args[0].is_integer)
    return bool(expr.is_integer) or (isinstance(expr, sympy.Mul | sympy.Add) and all(map(is_whole, expr.args)))


class Numbers:
    """Expressions that are computed together, each once.

    Attributes:
        lines: of the function under construction.
    """

    def __init__(self, symbols: Symbols):
        self.symbols = symbols
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []

    def name(self, value: Any) -> str:
        """What to call a number in the function: a literal, or a variable."""
        expr = expr_of(value)
        if not isinstance(expr, sympy.Basic):
            return repr(expr)
        if expr.is_Symbol:
            return text(expr)
        if expr not in self.names:
            self.names[expr] = f"n{len(self.names)}"
            self.lines.append(f"    {self.names[expr]} = {text(expr)}")
        return self.names[expr]

    def function(self, result: str) -> Callable[..., Any]:
        """The function of the sizes, in their order, that gives an expression of the variables."""
        return compiled(self.symbols, [*self.lines, f"    return {result}"])


def compiled(symbols: Symbols, lines: Iterable[str]) -> Callable[..., Any]:
    """A function of the sizes from the lines of its body."""
    head = f"def sized({', '.join(text(symbols.symbols[name]) for name in symbols.names)}):"
    space: dict[str, Any] = dict(SPACE)
    exec(compile("\n".join([head, *lines]) + "\n", "<memplan sizes>", "exec"), space)
    return space["sized"]

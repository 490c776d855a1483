"""For which sizes a trace holds: what torch and the model asked of sizes, and of values that depend on them."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import sympy

from .expressions import compiled, is_exact, text
from .questions import Call, Question, inputs_of
from .symbols import SMALLEST, Symbols

KNOWN = 4096  # sizes whose answer is kept


def named(names: dict[str, str], condition: str) -> str:
    """A condition with the names of sizes in it."""
    return re.sub(r"size_\w+", lambda found: names.get(found.group(), found.group()), condition)


class Holds:
    """Whether the answers that a trace rests on are those of other sizes too.

    Attributes:
        told: the conditions, for people; of values of tensors there is none. A size in `name == 12` is not free to vary.
    """

    def __init__(self, symbols: Symbols, questions: Iterable[Question]):
        """Compile what the book of symbols has gathered until now."""
        env = symbols.env
        conditions: dict[str, None] = {}
        for symbol in symbols.symbols.values():
            low, high = env.var_to_range[symbol].lower, env.var_to_range[symbol].upper
            least = max(SMALLEST, int(low)) if isinstance(low, sympy.Integer) else SMALLEST
            conditions[f"{text(symbol)} >= {least}"] = None
            if isinstance(high, sympy.Integer):
                conditions[f"{text(symbol)} <= {int(high)}"] = None
            found = env.replacements.get(symbol)
            if found is not None:
                conditions[f"{text(symbol)} == {text(env.replace(symbol))}"] = None
        for guard in env.guards:
            if guard.expr not in (sympy.true, True):
                conditions[text(guard.expr)] = None
            if not is_exact(guard.expr):  # the answer may be another where the model rounds otherwise
                conditions |= dict.fromkeys(f"{text(symbols.symbols[name])} == {size}" for name, size in symbols.hints.items())
        self.names = symbols.names
        self.symbols = tuple(symbols.symbols[name] for name in symbols.names)
        lines = [f"    return {' and '.join(f'({each})' for each in conditions)}"]
        self.function: Callable[..., Any] = compiled(symbols, lines)
        self.told = tuple(map(partial(named, {text(symbol): name for name, symbol in symbols.symbols.items()}), conditions))
        self.questions = tuple(question for question in questions if not inputs_of([question]))
        self.known: dict[tuple[int, ...], bool] = {}

    def __call__(self, sizes: tuple[int, ...]) -> bool:
        """Whether the trace serves these sizes."""
        if sizes not in self.known:
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[sizes] = self.ask(sizes)
        return self.known[sizes]

    def ask(self, sizes: tuple[int, ...]) -> bool:
        """The same, asked anew."""
        if len(sizes) != len(self.symbols) or min(sizes) < SMALLEST or not self.function(*sizes):
            return False
        call, known = Call(sizes=self.by_symbol(sizes)), {}
        try:
            return all(question.same(call, known) for question in self.questions)
        except Exception:  # whatever an operator says of a size that the model would not have given it
            return False

    def by_symbol(self, sizes: tuple[int, ...]) -> dict[sympy.Symbol, sympy.Integer]:
        """Sizes as what depends on them is computed from them."""
        return {symbol: sympy.Integer(size) for symbol, size in zip(self.symbols, sizes, strict=True)}

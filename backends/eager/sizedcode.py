"""Code of a schedule that takes inputs of any size that its trace serves.

The sizes are read from the inputs when the forward pass begins, and carried to the backward pass; what arguments of operators
are computed from them is computed once, at the beginning of each.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...planner.capture.capture import Captured
from ...planner.capture.concrete import SIZED, SizeFloat, SizeInt
from ...planner.capture.expressions import Numbers, text
from ...planner.capture.graph import Source, Traced
from ...planner.capture.symbols import Symbols
from ...planner.ir.errors import MemplanError
from ...planner.ir.schedule import Schedule, Start
from .accumulation import Accumulation
from .codegen import Generated, Writer


class SizedWriter(Writer):
    """Writes both functions for inputs of any size."""

    def __init__(self, traced: Traced, symbols: Symbols, schedule: Schedule, leaves: Mapping[int, fx.Node] | None = None):
        """Prepare to write.

        Args:
            traced: what is scheduled.
            symbols: the sizes.
            schedule: of its program.
            leaves: placeholders by the leaves that the sizes are read from, where these are not what its sources say.
        """
        super().__init__(traced, schedule, updates=Accumulation(traced) if traced.adds else None)
        self.symbols, self.leaves = symbols, leaves
        self.numbers = Numbers(self.symbols)

    @property
    def sizes(self) -> list[str]:
        return [text(symbol) for symbol in self.symbols.symbols.values()]

    def measured(self, placeholders: list[tuple[fx.Node, Source]]) -> list[str]:
        of_leaf = self.leaves or {source.index: node for node, source in placeholders if source.kind == "input"}
        first = [(self.symbols.symbols[name], *rows[0]) for name, rows in self.symbols.places.items()]
        return [f"    {text(symbol)} = {self.name(of_leaf[leaf])}.shape[{dim}]" for symbol, leaf, dim in first]

    def computed(self) -> list[str]:
        lines, self.numbers = self.numbers.lines, Numbers(self.symbols)
        return lines

    def layout_of(self, node: fx.Node) -> torch.Tensor | None:
        return None if varies(node) else super().layout_of(node)

    def lay_out(self, tangents: list[fx.Node]) -> None:
        for node in filter(varies, tangents):
            value, name = node.meta[SIZED], self.name(node)
            shape, stride = (f"[{', '.join(map(self.numbers.name, each))}]" for each in (value.shape, value.stride()))
            facts = f"{self.constant(value.dtype, 'dtype')}, {self.constant(value.device, 'device')}"
            self.line(f"{name} = laid_out({name}, {shape}, {stride}, {facts})")

    def argument(self, arg: Any) -> str:
        return self.numbers.name(arg) if isinstance(arg, SizeInt | SizeFloat) else super().argument(arg)


def varies(node: fx.Node) -> bool:
    """Whether a tangent's layout depends on sizes."""
    value = node.meta[SIZED]
    return any(isinstance(number, torch.SymInt) for number in (*value.shape, *value.stride()))


def generate_sized(captured: Captured, schedule: Schedule) -> Generated:
    """Write and compile the functions that carry out a schedule with inputs of any size.

    Args:
        captured: with `dynamic`.
        schedule: of its program at the sizes of the example, with costs or without.

    Raises:
        MemplanError: the capture is for one shape, or the schedule does what holds for one alone.
    """
    if captured.sized is None:
        raise MemplanError("this step was captured for one shape: capture it with dynamic=")
    if schedule.placements or schedule.homes or any(isinstance(step, Start) for step in schedule.instructions):
        raise MemplanError("an arena and offload hold for one shape: plan without them where sizes vary")
    if captured.traced.updates and not captured.traced.adds:
        raise MemplanError("optimizer_in_backward is for one shape: plan without it where sizes vary")
    return SizedWriter(captured.traced, captured.sized.symbols, schedule).write()


__all__ = ["SizedWriter", "generate_sized"]

"""Which outputs' gradients a parameter's gradient comes from: where none of those is there, eager mode has None, not zeros.

An optimizer tells the two apart: a parameter whose gradient is zero decays, and its moments do; one without is left alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from ...planner.capture.graph import Traced
from ...planner.ir.errors import PlanMismatch


class Fed:
    """For each gradient that a step makes the outputs whose gradients it is computed from.

    Attributes:
        returned: of the gradients that the step returns, in order.
        updated: of those that its updates take: the parameter's name, and the outputs.
    """

    def __init__(self, traced: Traced):
        tangents = {node: source.index for node, source in traced.sources.items() if source.kind == "tangent"}
        found: dict[fx.Node, frozenset[int]] = {}
        for node in next(iter(tangents)).graph.nodes if tangents else ():  # in order, so that operands come first
            own = frozenset({tangents[node]} if node in tangents else ())
            found[node] = own.union(*map(found.__getitem__, node.all_input_nodes))

        def outputs(node: fx.Node) -> frozenset[int]:
            return found[node]

        one = len(tangents) < 2  # then every gradient comes from it, or autograd would not have called
        self.returned = [frozenset() if one else outputs(node) for _, node in traced.gradients]
        pairs: Iterable[Any] = () if one else (pair for row in traced.updates.values() for pair in row)
        self.updated = [(name, outputs(node)) for name, node in pairs]
        self.adds = traced.adds

    def left_out(self, tangents: Sequence[Any]) -> list[bool]:
        """For each returned gradient whether eager mode has none.

        Raises:
            PlanMismatch: the step updates a parameter that has none.
        """
        for name in () if self.adds else self.absent(tangents):
            raise PlanMismatch(f"no gradient reaches {name} in this step, and the plan updates it: freeze it "
                               "(requires_grad_(False)) and plan again, or differentiate what it is used for")  # fmt: skip
        return [bool(outputs) and all(tangents[index] is None for index in outputs) for outputs in self.returned]

    def absent(self, tangents: Sequence[Any]) -> list[str]:
        """Parameters among the updated ones that no gradient reaches."""
        return [name for name, outputs in self.updated if outputs and all(tangents[index] is None for index in outputs)]

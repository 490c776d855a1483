"""Numbers that Dynamo passes to a piece as tensors: where sizes are dynamic, it takes every float that a model reads for one.

The piece takes them out again with `.item()`. A plan's operators take numbers, so each value has code of its own: a layer
norm's `eps` never changes, and what does change (a rate of dropout that is raised over time) is traced anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def wrapped(graph: fx.Graph) -> list[int]:
    """The places, among the inputs of a piece, of tensors that stand for numbers."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return [place for place, node in enumerate(inputs) if stands_for_number(node)]


def stands_for_number(node: fx.Node) -> bool:
    """Whether an input is a scalar of which nothing but its value is taken."""
    value = node.meta.get("example_value")
    scalar = isinstance(value, torch.Tensor) and value.dtype is torch.float64 and value.dim() == 0 and not value.requires_grad
    return scalar and bool(node.users) and all(is_item(user) for user in node.users)


def is_item(node: fx.Node) -> bool:
    """Whether a node takes the value of a tensor."""
    return node.op == "call_method" and node.target == "item"


def with_numbers(piece: fx.GraphModule, numbers: dict[int, float]) -> fx.GraphModule:
    """A piece with numbers written out that it would take out of its inputs.

    Args:
        piece: left as it is.
        numbers: by the places of these inputs.
    """
    if not numbers:
        return piece
    graph, inputs = fx.Graph(), 0
    known: dict[fx.Node, Any] = {}
    for node in piece.graph.nodes:
        if is_item(node) and isinstance(known[node.args[0]], float):
            known[node] = known[node.args[0]]
            continue
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.op == "placeholder":
            known[node] = numbers.get(inputs, known[node])
            inputs += 1
    return fx.GraphModule(piece, graph)


def values_of(args: Sequence[Any], places: Sequence[int]) -> dict[int, float]:
    """The numbers in a call, by their places."""
    return {place: args[place].item() for place in places}


__all__ = ["values_of", "with_numbers", "wrapped"]

"""Slices of the whole, which eager PyTorch leaves out where it sees that they are; with symbolic sizes torch does not look."""

import sys
from typing import Any

import torch
from torch import fx

from .expressions import expr_of
from .restore import pass_on

aten = torch.ops.aten


def drop_whole_slices(graph: fx.GraphModule) -> None:
    """Take slices that are all of a tensor out of a symbolic graph, and what their gradients are copied into."""
    changed: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.slice.Tensor, aten.slice_backward.default):
            continue
        whole: Any = node.args[0]
        dim, start, end, step = bounds(node.args[2:] if node.target == aten.slice_backward.default else node.args[1:])
        length, kept = whole.meta["val"].shape[dim], node.meta["val"].shape[dim]
        if expr_of(length) == expr_of(kept) and expr_of(start) in (0, None) and expr_of(step) == 1 and is_end(end, length):
            node.replace_all_uses_with(whole)
            graph.graph.erase_node(node)
            changed.add(whole)
    if changed:
        pass_on(graph, changed)
        graph.graph.lint()
        graph.recompile()


def bounds(args: tuple) -> tuple[Any, Any, Any, Any]:
    """Dimension, beginning, end and step of a slice."""
    given = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in (*args, *(0, None, None, 1)[len(args) :])]
    return given[0], given[1], given[2], given[3]


def is_end(end: Any, length: Any) -> bool:
    """Whether an end is that of the dimension, at all sizes."""
    return end is None or expr_of(end) == sys.maxsize or expr_of(end) == expr_of(length)

"""What tracing changes in a step, written back as eager PyTorch computes it, so that the bits are eager's.

*Dropout on the CPU.* Eager multiplies the input by noise: a Bernoulli tensor of the input's own type, divided by the chance
to be kept (ATen, Dropout.cpp: only fused kernels, which the CPU lacks, do otherwise). Tracing puts `native_dropout` in its
place, which multiplies by a mask first and scales the product. In 32 and 64 bits the results are equal; in 16 bits the
noise is rounded after its division, and they are not. Where everything is dropped, eager draws no numbers at all.

*Tied parameters.* A parameter with several names is an input for each, with a gradient for each. Eager's engine adds them
up in the order in which they are made, which with three or more decides the last bit, and keeps one sum.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from .nodes import is_pick, is_view

aten = torch.ops.aten


def sum_tied(graph: fx.GraphModule, parameter_name: Callable[[str], str]) -> None:
    """Add up the gradients of each tied parameter of a joint graph; the first of its names gets the sum.

    Args:
        graph: a joint graph with descriptors.
        parameter_name: from a descriptor's target to the name in the model; tied names map to the first.
    """
    ends = next(node for node in graph.graph.nodes if node.op == "output")
    values, place = list(ends.args[0]), {node: index for index, node in enumerate(graph.graph.nodes)}
    groups: dict[str, list[int]] = {}
    for index, (value, desc) in enumerate(zip(values, ends.meta["desc"], strict=True)):
        if isinstance(value, fx.Node) and type(desc).__name__ == "GradAOTOutput":
            if type(desc.grad_of).__name__ == "ParamAOTInput":
                groups.setdefault(parameter_name(desc.grad_of.target), []).append(index)
    for indices in groups.values():
        parts = sorted((values[index] for index in indices), key=place.__getitem__)
        total = parts[0]
        for part in parts[1:]:
            with graph.graph.inserting_after(part):
                total = filled_in(graph.graph.call_function(aten.add.Tensor, (total, part)), part)
        for index in indices:
            values[index] = None
        values[indices[0]] = total
    ends.args = (tuple(values),)
    graph.recompile()


def restore_dropout(graph: fx.GraphModule) -> None:
    """Write eager's operators over the dropouts of a joint graph traced for the CPU, where their bits differ."""
    changed: set[fx.Node] = set()
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        value, p, train = node.args
        half = value.meta["val"].dtype in (torch.float16, torch.bfloat16)
        if train is not False and p > 0.0 and (half or p == 1.0):
            changed |= spell_out(node)
    if changed:
        pass_on(graph, changed)
    graph.graph.lint()
    graph.recompile()


def pass_on(graph: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Bring fake results up to date with those that have changed: views share their storage, other ops follow their layout."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        if is_pick(node):
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]
            changed.add(node)
        elif isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable:
            known, found = node.meta["val"], fake_result(node)
            if is_view(node.target) or layouts(known) != layouts(found):
                node.meta["val"] = found
                changed.add(node)


def layouts(value: Any) -> list[Any]:
    """Shape and strides of each tensor."""
    return [(leaf.shape, leaf.stride()) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def spell_out(node: fx.Node) -> set[fx.Node]:
    """Replace one dropout, and its backward operators, by a product with noise. Returns the products."""
    value, p, _ = node.args
    results = {user.args[1]: user for user in node.users}
    calls = [user for user in results[1].users if user.target == aten.native_dropout_backward.default] if 1 in results else []
    noise = None if p == 1.0 else add_noise(node, value, p)  # type: ignore[arg-type]

    def times_noise(place: fx.Node, factor: Any) -> fx.Node:
        if noise is None:
            return call(place, aten.mul.Scalar, factor, 0.0)
        return call(place, aten.mul.Tensor, factor, noise)

    products = set()
    for old, factor in [(results[0], value), *((user, user.args[0]) for user in calls)]:
        product = times_noise(old, factor)
        old.replace_all_uses_with(product)
        products.add(product)
    for old in (*calls, *results.values(), node):
        node.graph.erase_node(old)
    return products


def add_noise(node: fx.Node, value: fx.Node, p: float) -> fx.Node:
    """Zeros, and for what is kept one over the chance of it, drawn in the order in which the input lies in memory."""
    strides = value.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    turned = order != list(range(len(strides)))
    like = call(node, aten.permute.default, value, order) if turned else value
    drawn = call(node, aten.bernoulli.p, like, 1 - p)
    noise = call(node, aten.div.Scalar, drawn, 1 - p)
    back = [order.index(axis) for axis in range(len(order))]
    return call(node, aten.permute.default, noise, back) if turned else noise


def call(place: fx.Node, target: Any, value: fx.Node, *rest: Any) -> fx.Node:
    """A call just before a node."""
    with place.graph.inserting_before(place):
        return filled_in(place.graph.call_function(target, (value, *rest)), place)


def filled_in(made: fx.Node, like: fx.Node) -> fx.Node:
    """A new call with its fake result, and what else is noted of a node like it."""
    made.meta = {key: kept for key, kept in like.meta.items() if key != "tensor_meta"} | {"val": fake_result(made)}
    return made


def fake_result(node: fx.Node) -> Any:
    """What a call gives for the fake values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda needed: needed.meta["val"])
    target: Any = node.target
    with node.all_input_nodes[0].meta["val"].fake_mode:
        return target(*args, **kwargs)

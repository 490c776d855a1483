"""What tracing changes in a step, written back as eager PyTorch computes it, so that the bits are eager's.

*Dropout on the CPU.* Eager multiplies the input by noise: a Bernoulli tensor of the input's own type, divided by the chance
to be kept (ATen, Dropout.cpp: only fused kernels, which the CPU lacks, do otherwise). Tracing puts `native_dropout` in its
place, which multiplies by a mask first and scales the product. In 32 and 64 bits the results are equal; in 16 bits the
noise is rounded after its division, and they are not. Where everything is dropped, eager draws no numbers at all.

*Tied parameters.* A parameter with several names is an input for each, with a gradient for each. Eager's engine adds them
up in the order in which they are made, which with three or more decides the last bit, and keeps one sum.

*Gates on the CPU.* A GRU's cell adds and takes the sigmoid in place, in pieces of a larger tensor, a row at a time. Tracing
makes dense tensors of the sums. CPU kernels compute what is left over at the end of a run of numbers otherwise than what they
take several at a time: where the hidden size is no multiple of that, last bits differ.

*Products.* The gradient of `prod` in eager mode is result / input, if it finds no zero in the input. A plan cannot look, and
tracing takes the form that is right with zeros too; last bits differ, which is said.

*Casts by autocast.* Eager's autocast keeps the cast of a parameter for its other uses, so that their gradients are added up in
16 bits and cast back once. The tracer forbids that cache: it casts at each use, and adds up in 32 bits.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..ir.errors import CaptureError
from .nodes import is_pick, is_view

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def sum_tied(graph: fx.GraphModule, parameter_name: Callable[[str], str]) -> None:
    """Add up the gradients of each tied parameter of a joint graph; the first of its names gets the sum.

    Args:
        graph: a joint graph with descriptors.
        parameter_name: from a descriptor's target to the name in the model; tied names map to the first.
    """
    ends = next(node for node in graph.graph.nodes if node.op == "output")
    values, place = list(ends.args[0]), {node: index for index, node in enumerate(graph.graph.nodes)}
    groups: dict[str, list[int]] = {}
    old: list[fx.Node] = []
    for index, (value, desc) in enumerate(zip(values, ends.meta["desc"], strict=True)):
        if isinstance(value, fx.Node) and type(desc).__name__ == "GradAOTOutput":
            if type(desc.grad_of).__name__ == "ParamAOTInput":
                groups.setdefault(parameter_name(desc.grad_of.target), []).append(index)
    for indices in groups.values():
        if len(indices) == 1:
            continue
        found = [terms_of(values[index]) for index in indices]  # of a name that is used several times it is a sum
        total = summed(sorted((term for terms, _ in found for term in terms), key=place.__getitem__))
        old += [node for _, sums in found for node in sums]
        for index in indices:
            values[index] = None
        values[indices[0]] = total
    ends.args = (tuple(values),)
    for node in old:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def merge_casts(
    graph: fx.GraphModule, parameter_name: Callable[[str], str], region_of: Callable[[fx.Node], int | None]
) -> None:
    """Cast each parameter once for all its uses under autocast, and add up their gradients before they are cast back.

    Args:
        graph: a joint graph with descriptors, each parameter's gradients already one sum.
        parameter_name: from a descriptor's target to the name in the model; tied names map to the first.
        region_of: the region of autocast whose cache holds a cast; None for a cast that is in no cache.

    Raises:
        CaptureError: a parameter has casts in several regions, or in one and in none.
    """
    casts: dict[str, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten._to_copy.default):
        desc = node.args[0].meta.get("desc")
        if type(desc).__name__ == "ParamAOTInput" and node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            casts.setdefault(parameter_name(desc.target), []).append(node)
    ends = next(node for node in graph.graph.nodes if node.op == "output")
    for value, desc in zip(list(ends.args[0]), ends.meta["desc"], strict=True):
        if isinstance(value, fx.Node) and type(desc).__name__ == "GradAOTOutput":
            if type(desc.grad_of).__name__ == "ParamAOTInput":
                name = parameter_name(desc.grad_of.target)
                cast_back_once(value, name, {region_of(node) for node in casts.get(name, ())})
    for group in casts.values():
        regions = {region_of(node) for node in group}
        for node in group[1:] if len(regions - {None}) == len(regions) == 1 else ():
            node.replace_all_uses_with(group[0])
            graph.graph.erase_node(node)
    graph.recompile()


def cast_back_once(total: fx.Node, name: str, regions: set[int | None]) -> None:
    """Rewrite a parameter's gradient: those of its casts are added up first, in their order.

    Args:
        total: the gradient, a chain of sums.
        name: of the parameter.
        regions: of all its casts.

    Raises:
        CaptureError: the casts are not all in one region.
    """
    terms, sums = terms_of(total)
    back = [term for term in terms if is_cast_back(term)]
    if len(back) < 2 or regions <= {None}:
        return
    if len(regions) > 1:
        raise CaptureError(f"{name} is cast more than once, not each time by one region of autocast: plan and call the model "
                           "under torch.autocast(..., cache_enabled=False), or under one region in which it casts nothing "
                           "itself")  # fmt: skip
    inner = summed([term.args[0] for term in back])  # type: ignore[misc]
    with total.graph.inserting_after(inner):
        once = total.graph.call_function(aten._to_copy.default, (inner,), back[-1].kwargs)
    filled_in(once, back[-1])
    rest = [once if term is back[-1] else term for term in terms if term is back[-1] or term not in back]
    total.replace_all_uses_with(summed(rest))
    for node in (*sums, *back):
        total.graph.erase_node(node)


def is_cast_back(node: fx.Node) -> bool:
    """Whether a gradient is one in 16 bits, cast."""
    return node.target == aten._to_copy.default and node.args[0].meta["val"].dtype in HALF  # type: ignore[union-attr]


def terms_of(total: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a chain of sums adds up, in its order, and the sums, outermost first."""
    terms, sums, stack = [], [], [total]
    while stack:
        node = stack.pop()
        added = node.target == aten.add.Tensor and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
        if added and (node is total or len(node.users) == 1):
            sums.append(node)
            stack += reversed(node.args)  # type: ignore[arg-type]
        else:
            terms.append(node)
    return terms, sums


def summed(terms: list[fx.Node]) -> fx.Node:
    """The sum of nodes, added up in the order given, each as soon as it is there."""
    place = {node: index for index, node in enumerate(terms[0].graph.nodes)}
    total = terms[0]
    for term in terms[1:]:
        later = max(total, term, key=place.__getitem__)
        with total.graph.inserting_after(later):
            made = filled_in(total.graph.call_function(aten.add.Tensor, (total, term)), later)
        place[made] = place[later]
        total = made
    return total


def restore_gates(graph: fx.GraphModule) -> None:
    """Take the sigmoid of sums of pieces in pieces of one sum, as eager's GRU does on the CPU."""
    wholes: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        added: Any = node.args[0]
        if added.target != aten.add.Tensor or added.kwargs or not all(is_piece(arg) for arg in added.args):
            continue
        (one, index), (two, other) = (arg.args for arg in added.args)
        if index != other or one.args[1:] != two.args[1:] or layouts(one.meta["val"]) != layouts(two.meta["val"]):
            continue
        pair = one.args[0], two.args[0]
        if pair not in wholes:
            wholes[pair] = call(added, aten.add.Tensor, *pair)
        size, axis = one.args[1], (one.args[2] if len(one.args) > 2 else 0)
        piece = call(node, aten.slice.Tensor, wholes[pair], axis, index * size, (index + 1) * size)
        node.replace_input_with(added, piece)
        if not added.users:
            graph.graph.erase_node(added)
    graph.graph.lint()
    graph.recompile()


def tell_products(graph: fx.GraphModule) -> None:
    """Warn where a gradient is a product's, for it has not eager's last bits."""
    calls = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    if calls & {"aten.prod.default", "aten.prod.dim_int"} and "aten.cumprod.default" in calls:
        warnings.warn("the model differentiates torch.prod: eager mode looks for zeros in its input and chooses by them, which "
                      "a plan cannot, so the last bits of this gradient differ; torch.exp(x.log().sum()) is the same in both, "
                      "for what is positive", stacklevel=2)  # fmt: skip


def is_piece(node: Any) -> bool:
    """Whether a node is one of the pieces that a recurrent cell splits its gates into."""
    return isinstance(node, fx.Node) and is_pick(node) and node.args[0].target == aten.unsafe_split.Tensor  # type: ignore[union-attr]


def restore_dropout(graph: fx.GraphModule) -> None:
    """Write eager's operators over the dropouts of a joint graph traced for the CPU, where their bits differ."""
    changed: set[fx.Node] = set()
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        value, p, train = node.args
        half = value.meta["val"].dtype in HALF
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

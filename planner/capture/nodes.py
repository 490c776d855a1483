"""What one node of a traced fx graph is: a call or a pick of its results, its tensors, its operations, its key."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.utils.flop_counter import flop_registry

PURE = {"aten", "prims", "torchvision", "mkldnn", "mkl", "onednn", "quantized", "quantized_decomposed"}


def closure(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes and all they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def is_call(node: fx.Node) -> bool:
    """Whether the node calls something, other than picking one of several results."""
    return node.op == "call_function" and not is_pick(node)


def is_pick(node: fx.Node) -> bool:
    """Whether the node picks one of another's results."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def is_view(func: Any) -> bool:
    """Whether an operator's results share the storage of an operand, which it does not write."""
    found = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in found)


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers. Attention without dropout has the tag of those that do, and draws none."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and argument(node, "dropout_p") != 0


def is_known(node: fx.Node) -> bool:
    """Whether an operator does nothing but compute, as far as anybody knows.

    A schema does not tell whether a custom operator draws random numbers, counts its calls, or talks to other processes, so
    only namespaces are known whose operators have been looked at.
    """
    return getattr(node.target, "namespace", "") in PURE


def in_flight(node: fx.Node) -> list[fx.Node]:
    """The tensors that a communication reads or writes until this call has waited for it."""
    if getattr(node.target, "_opname", "") != "wait_tensor":
        return []
    started = node.all_input_nodes[0]
    while is_pick(started):
        started = started.all_input_nodes[0]
    return started.all_input_nodes if is_call(started) else []


def argument(node: fx.Node, name: str) -> Any:
    """The value that a call gives an argument of its operator, or the operator's own; None where there is no such argument."""
    for index, known in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if known.name == name:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(name)
            return known.default_value if given is None and known.has_default_value() else given
    return None


def is_tensor(value: Any) -> bool:
    """Whether a node's value is a tensor or a tuple of them."""
    return isinstance(value, torch.Tensor) or isinstance(value, tuple | list)


def results(node: fx.Node) -> list[tuple[fx.Node, torch.Tensor]]:
    """The nodes that stand for a call's tensors: itself, or the picks of its results.

    A result that nobody picks still exists while the call runs: `unpicked` counts it.
    """
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [(node, value)]
    picks = [user for user in node.users if is_pick(user) and isinstance(user.meta.get("val"), torch.Tensor)]
    first: dict[int, fx.Node] = {}
    for pick in sorted(picks, key=lambda user: int(user.args[1])):  # type: ignore[arg-type]
        first.setdefault(int(pick.args[1]), pick)  # type: ignore[arg-type]
    return [(pick, pick.meta["val"]) for pick in first.values()]


def unpicked(node: fx.Node, parts: list[tuple[fx.Node, torch.Tensor]], key: str = "val") -> int:
    """Bytes of a call's results that nobody picks, where they share no storage with those that are picked, or an operand's.

    Args:
        node: the call.
        parts: its results, as `results` has them.
        key: of the values in `meta` that are measured.
    """
    known = [part.meta[key] for part, _ in parts] + [arg.meta[key] for arg in node.all_input_nodes]
    taken = {item.untyped_storage()._cdata for item in known if isinstance(item, torch.Tensor)}
    values = [item for item in pytree.tree_leaves(node.meta.get(key)) if isinstance(item, torch.Tensor)]
    left = {item.untyped_storage()._cdata: item.untyped_storage().nbytes() for item in values}
    return sum(size for storage, size in left.items() if storage not in taken)


def span(value: Any) -> int:
    """Bytes of a tensor's elements that are stored: expanded dimensions count once."""
    if not isinstance(value, torch.Tensor):
        return 0
    distinct = math.prod(size for size, step in zip(value.shape, value.stride(), strict=True) if step != 0)
    return distinct * value.element_size()


def count_flops(node: fx.Node) -> float:
    """Floating-point operations by torch's own counter; one per element written where it knows none, or fails."""
    return float(operations(node))


def operations(node: fx.Node, which: str = "val") -> Any:
    """The same as a whole number, of the values in `meta` under a key; symbolic ones give a symbolic number."""
    packet = node.target._overloadpacket  # type: ignore[union-attr]
    value = node.meta.get(which)
    name = str(packet)
    if "flash_attention_for_cpu" in name:
        query, key = (node.args[index].meta[which].shape for index in ((1, 2) if "backward" in name else (0, 1)))  # type: ignore[union-attr]
        return 2 * math.prod(query[:3]) * key[2] * query[3] * (5 if "backward" in name else 2)
    if packet in flop_registry:
        args = fx.map_arg(node.args, lambda arg: arg.meta[which])
        kwargs = fx.map_arg(node.kwargs, lambda arg: arg.meta[which])
        with suppress(Exception):  # torch's counters know the usual arguments alone
            return flop_registry[packet](*args, **kwargs, out_val=value)
    return sum(part.meta[which].numel() for part, _ in results(node))


def cost_of_graph(graph: fx.GraphModule) -> tuple[float, int, int]:
    """FLOPs, traffic and peak bytes of a graph run in order with early frees, its inputs and outputs not counted."""
    flops, traffic, peaks = graph_costs(graph)
    return float(flops), traffic, max(peaks, default=0)


def graph_costs(graph: fx.GraphModule, which: str = "val") -> tuple[Any, Any, list[Any]]:
    """FLOPs and traffic of the values in `meta` under a key, and the bytes that live at each call."""
    flops, traffic, live, peaks = 0, 0, 0, []
    last: dict[int, fx.Node] = {}
    sizes: dict[int, int] = {}
    outside: set[int] = set()
    for node in graph.graph.nodes:
        for user in [node, *node.all_input_nodes]:
            for part, _ in results(user) if is_call(user) else [(user, None)]:
                item = part.meta.get(which)
                if isinstance(item, torch.Tensor):
                    last[item.untyped_storage()._cdata] = node
        if node.op in ("placeholder", "output"):
            outside |= {arg.meta[which].untyped_storage()._cdata for arg in [node, *node.all_input_nodes]
                        if isinstance(arg.meta.get(which), torch.Tensor)}  # fmt: skip
    for node in graph.graph.nodes:
        if not is_call(node):
            continue
        parts = [part.meta[which] for part, _ in results(node)]
        flops += operations(node, which)
        traffic += sum(span(arg.meta.get(which)) for arg in node.all_input_nodes) + sum(span(item) for item in parts)
        for item in parts:
            storage = item.untyped_storage()
            if storage._cdata not in sizes and storage._cdata not in outside:
                sizes[storage._cdata] = storage.nbytes()
                live += storage.nbytes()
        peaks.append(live)
        for storage_id, reader in last.items():
            if reader is node and storage_id in sizes:
                live -= sizes.pop(storage_id)
    return flops, traffic, peaks


def encode(arg: Any, which: str = "val") -> Any:
    """An argument as JSON: see `call_key`. A node is its value in `meta` under a key; symbolic numbers stay what they are."""
    if isinstance(arg, fx.Node | torch.Tensor):
        value = arg.meta.get(which) if isinstance(arg, fx.Node) else arg
        if not isinstance(value, torch.Tensor):
            return {"x": repr(value)}
        told: dict[str, Any] = {"t": str(value.dtype)[6:], "s": list(value.shape), "st": list(value.stride())}
        if value.storage_offset():
            told["o"] = value.storage_offset()
        return told
    if isinstance(arg, list | tuple):
        return [encode(item, which) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"f": str(arg)}
    if arg is None or isinstance(arg, bool | int | float | str | torch.SymInt | torch.SymFloat):
        return arg
    for kind, type_ in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(arg, type_):
            return {kind: str(arg)[6:]}
    if isinstance(arg, torch.device):
        return {"device": arg.type}
    return {"x": repr(arg)}


def call_key(node: fx.Node) -> str:
    """A call as canonical JSON, from which it can be made again: what decides its cost, and nothing else."""
    return describe_call(node.target, node.args, node.kwargs)


def describe_call(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """The key of a call whose arguments are nodes, or tensors themselves: see `call_key`."""
    return json.dumps(structure_of(func, args, kwargs), separators=(",", ":"))


def structure_of(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any], which: str = "val") -> dict[str, Any]:
    """What a key is the text of, with the values in `meta` under a key."""
    return {
        "op": str(func),
        "args": [encode(arg, which) for arg in args],
        "kwargs": {name: encode(arg, which) for name, arg in kwargs.items()},
    }


def output_nodes(graph: fx.GraphModule, kind: str) -> list[fx.Node]:
    """The nodes that the graph returns under a descriptor of this kind, in order."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    pairs = zip(output.args[0], output.meta["desc"], strict=True)
    return [node for node, desc in pairs if type(desc).__name__ == kind and isinstance(node, fx.Node)]

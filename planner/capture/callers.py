"""Which module called each op of a traced graph.

While a model is traced, global hooks of torch's annotate the nodes with the name of the module whose forward is under way. A
node of the backward pass belongs to the module of the op that it differentiates, which autograd's sequence number names. What
autograd or memplan put in between, a sum of gradients say, belongs to the
module of the operand made last.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.traceback import annotate, preserve_node_meta
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .nodes import is_call

KEY = "memplan_module"  # in a node's `meta["custom"]`


@contextmanager
def noting_callers(model: nn.Module) -> Iterator[None]:
    """Annotate what is traced in this thread meanwhile with the name of the module of `model` that calls it."""
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    here, under_way = threading.get_ident(), []

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != here:
            return
        noted = ExitStack()
        if id(module) in names:  # one that the forward pass has just made counts as its caller
            noted.enter_context(annotate({KEY: names[id(module)]}))
        under_way.append(noted)

    def leave(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == here and under_way:
            under_way.pop().close()

    with preserve_node_meta(), ExitStack() as hooks:
        hooks.callback(lambda: [noted.close() for noted in reversed(under_way)])
        hooks.callback(register_module_forward_pre_hook(enter).remove)
        hooks.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield


def callers(graph: fx.Graph) -> dict[fx.Node, str]:
    """The name of the module that called each call node; empty for the model itself."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    forward: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if "seq_nr" in node.meta and not node.meta.get("autograd_backward"):
            forward.setdefault(node.meta["seq_nr"], node)  # later ones made no node of autograd's: they carry its number on
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        meta, number = node.meta, node.meta.get("seq_nr")
        operands = [arg for arg in node.all_input_nodes if arg in found]
        if KEY in meta.get("custom", {}):
            found[node] = meta["custom"][KEY]
        elif operands and (number is None or meta.get("is_gradient_acc")):
            found[node] = found[max(operands, key=order.__getitem__)]
        elif is_call(node):
            origin = forward[number] if number in forward and meta.get("autograd_backward") else node
            found[node] = origin.meta.get("custom", {}).get(KEY, "")
    return found

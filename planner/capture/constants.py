"""Fake tensors as a model is traced with them, except that small constants keep their values.

Code that looks at the values of positions or masks, which depend on nothing but constants, then takes eager's branch.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _disable_current_modes

from .layouts import CORRECTED, IN_32_BITS, RECURRENT, UNCACHED, real_strides, recurrent_scratch
from .nodes import is_view
from .questions import Questions, Refusal, is_factory, is_small, written

if TYPE_CHECKING:
    from .symbols import Symbols

GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}  # of a tensor written out in the code


@contextmanager
def own_results() -> Iterator[None]:
    """Let torch remember results of fake kernels for this while alone.

    Its memory belongs to the process, and what is in it has been found under whatever was in force then: a decomposition, say,
    may give a dimension of one element another stride than the kernel does. The same model is to trace to the same program.
    """
    known = FakeTensorMode.cache
    FakeTensorMode.cache = {}
    try:
        yield
    finally:
        FakeTensorMode.cache = known


class Constants(FakeTensorMode):
    """Fake tensors, except that small constants keep their values.

    Attributes:
        casts: of tensors that autocast has cast while its cache was on, by the identity of their storage: the storage, and
            which region of autocast this was in.
        region: the region that the model is called in; None where it is in none.
        asked: whether the model itself is asking for a cast.
        stores: for the storage of a tensor without values, by its identity: itself, and the fake one that stands in for it.
        known: of real tensors that the model holds, by the identity of their storage: the storage, and the fake tensor that
            was made first of those in it.
        questions: what is asked of the values of inputs, and of what depends on sizes.
    """

    def __init__(self, symbols: "Symbols | None" = None) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=None if symbols is None else symbols.env)
        self.casts: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self.region = 0 if autocast_depth() else None
        self.asked = False
        self.stores: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.known: dict[int, tuple[torch.UntypedStorage, FakeTensor]] = {}
        self.questions = Questions(symbols)

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return is_small(t.shape) and not isinstance(t, FakeTensor) and t.device.type != "meta"

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is GROUPED and args[0].dtype != torch.bfloat16:
            return self.grouped_product(*args, **(kwargs or {}))
        if any(not isinstance(value, FakeTensor) for value in written(func, args)):
            raise Refusal("the model changes a tensor that is no buffer: use register_buffer")
        if func not in LIFTS:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self.stand_in, (args, kwargs or {}))
        return self.questions.dispatch(func, args, kwargs or {}, lambda: self.run(func, types, args, kwargs))

    def run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """An operator on fake tensors, laid out as the real kernel lays its results out."""
        if args and isinstance(args[0], FakeTensor) and args[0].constant is not None and is_view(func):
            return self.view_of_constant(func, types, args, kwargs or {})
        if "fused_moving_avg_obs" in getattr(func, "_opname", ""):
            check_observed(list(args), bool((kwargs or {}).get("per_row_fake_quant")))
        with disable_fake_tensor_cache(self) if func in UNCACHED else nullcontext():
            out: Any = super().dispatch(func, types, args, kwargs or {})
        if func in CORRECTED:
            out = self.laid_out(types, out, real_strides(func, args, out if isinstance(out, tuple) else (out,)))
        if func in IN_32_BITS:
            wide = {id(item): self.empty(types, item, item.stride(), torch.float32) for item in out}
            out = tuple(wide[id(item)] for item in out)  # one of them is there twice
        if func is RECURRENT and torch.is_grad_enabled():
            with _disable_current_modes():
                shapes = tuple(tuple(value.shape) for value in args[:7])
                rest = tuple(tuple(value) if isinstance(value, list) else value for value in args[7:])
                size = recurrent_scratch(shapes, args[0].dtype, rest)
            facts = {"dtype": torch.uint8, "device": args[0].device}
            out = (*out[:3], super().dispatch(torch.ops.aten.empty.memory_format, types, ([size],), facts))
        if is_factory(func) and isinstance(out, FakeTensor):
            self.evaluate(func, args, kwargs or {}, out)
        cast = func is torch.ops.aten._to_copy.default and not self.asked
        if cast and torch.is_autocast_cache_enabled() and autocast_depth():
            storage = out.untyped_storage()  # regions inside the model cannot be told apart: each cast has its own
            self.casts[storage._cdata] = storage, len(self.casts) + 1 if self.region is None else self.region
        return out

    def evaluate(self, func: Any, args: Any, kwargs: Any, out: FakeTensor) -> None:
        """Give what a factory has made its values, if it is small."""
        plain = not any(isinstance(arg, torch.Tensor) for arg in args)
        if plain and is_small(out.shape):
            with _disable_current_modes():
                out.constant = func(*args, **{**kwargs, "device": "cpu", "pin_memory": False})

    def stand_in(self, value: torch.Tensor) -> torch.Tensor:
        """A fake tensor for a real one: tensors that share a storage have fake ones that do, else a view would pass for a copy.

        Raises:
            Refusal: a sparse or a quantized tensor.
        """
        if isinstance(value, FakeTensor):
            return value
        if value.layout is not torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else "sparse"
            raise Refusal(f"the model holds a {kind} tensor, and memplan plans dense ones: make it dense "
                          f"(.{'dequantize' if value.is_quantized else 'to_dense'}()) before planning")  # fmt: skip
        storage = value.untyped_storage()
        if storage._cdata not in self.known:
            with _disable_current_modes():
                made = self.from_tensor(value.detach(), static_shapes=True)
            self.known[storage._cdata] = storage, made
        base = self.known[storage._cdata][1]
        if facts_of_view(base) == facts_of_view(value) and base.requires_grad == value.requires_grad:
            return base
        with no_dispatch():
            meta = torch.empty(0, dtype=value.dtype, device="meta")
            meta.set_(base.untyped_storage(), value.storage_offset(), value.shape, value.stride())
            made = FakeTensor(self, meta, value.device)
        if value.is_conj():
            torch._C._set_conj(made, True)
        if value.is_neg():
            torch._C._set_neg(made, True)
        return made

    def note_values(self, graph: fx.GraphModule) -> None:
        """Give a graph's nodes of real tensors the fake ones that stood for them, whose storages their views share."""
        for node in graph.graph.find_nodes(op="get_attr"):
            value = getattr(graph, str(node.target))
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                node.meta["val"] = self.stand_in(value)

    def empty(self, types: Any, like: torch.Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A fake tensor of another's shape and device, in new memory."""
        facts = {"dtype": dtype, "device": like.device}
        return super().dispatch(torch.ops.aten.empty_strided.default, types, (like.shape, stride), facts)

    def laid_out(self, types: Any, out: Any, strides: list[tuple[int, ...] | None]) -> Any:
        """Results with other strides, where there are any."""
        if all(stride is None for stride in strides):
            return out
        flat = out if isinstance(out, tuple) else (out,)
        made = [
            value if stride is None else self.empty(types, value, stride, value.dtype)
            for value, stride in zip(flat, strides, strict=True)
        ]
        return tuple(made) if isinstance(out, tuple) else made[0]

    def region_of(self, node: fx.Node) -> int | None:
        """The region of autocast whose cache holds a cast; None for a cast that is in no cache."""
        return self.casts.get(node.meta["val"].untyped_storage()._cdata, (None, None))[1]

    def plain(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A call as torch's own mode makes it."""
        return super().dispatch(func, types, args, kwargs)

    def view_of_constant(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """A view with its value, which shares its base's storage as other views do: torch's own way makes a copy of it."""
        base, known = args[0], args[0].constant
        base.constant = None
        try:
            out = super().dispatch(func, types, args, kwargs)
        finally:
            base.constant = known
        with _disable_current_modes():
            values = func(known, *args[1:], **kwargs)
        for made, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(values), strict=True):
            made.constant = value
        return out

    def grouped_product(self, one: Any, two: Any, offsets: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        """A fake result of the experts' product, which torch's own fake kernel only knows for bfloat16."""
        from torch._meta_registrations import _create_grouped_mm_output_tensor as make

        with self:
            return make(one, two, offsets, out_dtype)


def check_observed(args: list[Any], by_row: bool = False) -> None:
    """Refuse a fake quantisation by channel that has not seen a batch: its kernel makes its buffers larger then.

    Args:
        args: of the kernel, by position: the value, two switches, the smallest value seen so far, ..., the axis of channels.
        by_row: whether it works by channel, where that is not the next of them.

    Raises:
        Refusal: its buffers are not of the channels' number yet.
    """
    if (args[11] if len(args) > 11 else by_row) and args[3].numel() != args[0].shape[args[10]]:
        raise Refusal("a fake quantisation has seen no batch yet, and its buffers take their size from the first: call the "
                      "model once before planning")  # fmt: skip


def facts_of_view(value: torch.Tensor) -> tuple:
    """What tells two tensors of one storage apart."""
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.is_conj(), value.is_neg()


def autocast_depth() -> int:
    """How many regions of autocast this is in."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()

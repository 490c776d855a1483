"""Operators that write their results where they are told: torch's own `out=` forms, and the same by hand where it has none."""

from functools import cache
from typing import Any

import torch

from ...planner.ir.program import Op


def find_operator(name: str) -> Any:
    """The operator of a name such as `aten.mm.default`; None if torch has none."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def is_half(op: Op) -> bool:
    """Whether an op has tensors of 16-bit floats."""
    return '"bfloat16"' in op.key or '"float16"' in op.key


@cache
def results_of(target: Any, device: str, half: bool) -> int:
    """How many given tensors an operator can write its results into, without memory of its own; 0 if it cannot."""
    form = out_form(target)
    if form is not None:
        return len(out_names(form))
    special = SPECIAL.get(target)
    if special is None or (special in (drop_out, drop_back) and (device != "cpu" or half or not dropout_is_a_product())):
        return 0
    return SEVERAL.get(special, 1)


def copy_to(places: list[torch.Tensor], value: torch.Tensor, **_: Any) -> None:
    """`clone` and `_to_copy`: the place decides layout and type."""
    places[0].copy_(value)


def multiply(places: list[torch.Tensor], value: torch.Tensor, number: float) -> None:
    """`mul.Scalar`, which is `mul.Tensor` with the number as a tensor of no dimensions."""
    torch.ops.aten.mul.out(value, number, out=places[0])


def divide(places: list[torch.Tensor], value: torch.Tensor, number: float) -> None:
    """`div.Scalar`, likewise."""
    torch.ops.aten.div.out(value, number, out=places[0])


def rectify(places: list[torch.Tensor], value: torch.Tensor) -> None:
    """`relu`, which is `clamp_min` at zero (ATen, Activation.cpp)."""
    torch.ops.aten.clamp_min.out(value, 0, out=places[0])


def look_up(places: list[torch.Tensor], weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> None:
    """`embedding`, which is `index_select` of rows (ATen, Embedding.cpp)."""
    rows = places[0].view(-1, weight.shape[1])
    torch.ops.aten.index_select.out(weight, 0, indices.reshape(-1), out=rows)


def safe_softmax(places: list[torch.Tensor], value: torch.Tensor, axis: int, dtype: torch.dtype | None = None) -> None:
    """`_safe_softmax`: zeros in rows that are masked throughout (ATen, SoftMax.cpp), found by their largest element."""
    value = value if dtype is None else value.to(dtype)
    torch.ops.aten._softmax.out(value, axis, False, out=places[0])
    places[0].masked_fill_(value.amax(axis, keepdim=True) == float("-inf"), 0.0)


def slice_back(places: list[torch.Tensor], grad: torch.Tensor, _: Any, *which: Any) -> None:
    """`slice_backward`: zeros around the gradient of a slice."""
    torch.ops.aten.slice.Tensor(places[0].zero_(), *which).copy_(grad)


def select_back(places: list[torch.Tensor], grad: torch.Tensor, _: Any, axis: int, index: int) -> None:
    """`select_backward`, likewise."""
    places[0].zero_().select(axis, index).copy_(grad)


def batch_norm(
    places: list[torch.Tensor], value: torch.Tensor, weight: Any, bias: Any, mean: torch.Tensor, variance: torch.Tensor,
    train: bool, momentum: float, epsilon: float,
) -> None:  # fmt: skip
    """`_native_batch_norm_legit_functional`: the statistics are copied, then changed by the operator that does so."""
    result, saved_mean, saved_invstd, new_mean, new_variance = places
    new_mean.copy_(mean)
    new_variance.copy_(variance)
    torch.ops.aten._native_batch_norm_legit.out(
        value, weight, bias, new_mean, new_variance, train, momentum, epsilon,
        out=result, save_mean=saved_mean, save_invstd=saved_invstd,
    )  # fmt: skip


def drop_out(places: list[torch.Tensor], value: torch.Tensor, p: float, train: bool | None) -> None:
    """What the CPU's `native_dropout` does with 32 and 64-bit floats, with its results in given tensors."""
    result, mask = places
    if train is False:
        mask.fill_(True)
        result.copy_(value)
        return
    mask.bernoulli_(1.0 - p)
    drop_back([result], value, mask, 0.0 if p == 1.0 else 1.0 / (1.0 - p))


def drop_back(places: list[torch.Tensor], grad: torch.Tensor, mask: torch.Tensor, scale: float) -> None:
    """What `native_dropout_backward` does with 32 and 64-bit floats."""
    places[0].copy_(mask).mul_(grad).mul_(scale)  # a product of the two would make the mask into floats beside it


SPECIAL = {
    torch.ops.aten.clone.default: copy_to,
    torch.ops.aten._to_copy.default: copy_to,
    torch.ops.aten.relu.default: rectify,
    torch.ops.aten.div.Scalar: divide,
    torch.ops.aten.embedding.default: look_up,
    torch.ops.aten._safe_softmax.default: safe_softmax,
    torch.ops.aten.slice_backward.default: slice_back,
    torch.ops.aten.select_backward.default: select_back,
    torch.ops.aten.mul.Scalar: multiply,
    torch.ops.aten.native_dropout.default: drop_out,
    torch.ops.aten.native_dropout_backward.default: drop_back,
    torch.ops.aten._native_batch_norm_legit_functional.default: batch_norm,
}
SEVERAL = {drop_out: 2, batch_norm: 5}  # results of those that have more than one


@cache
def dropout_is_a_product() -> bool:
    """Whether `drop_out` and `drop_back` give this torch's bits; tried once, with the generator left as it was."""
    state, same = torch.get_rng_state(), True
    for dtype in (torch.float32, torch.float64):
        value = torch.linspace(-3, 3, 1001, dtype=dtype)
        for p, train in ((0.3, True), (1.0, True), (0.3, False)):
            torch.manual_seed(1)
            wanted = [*torch.ops.aten.native_dropout.default(value, p, train), torch.get_rng_state()]
            places = [torch.empty_like(value), torch.empty_like(value, dtype=torch.bool)]
            torch.manual_seed(1)
            drop_out(places, value, p, train)
            found = [*places, torch.get_rng_state()]
            same &= all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
            scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
            drop_back([places[0]], value, places[1], scale)
            same &= torch.equal(places[0], torch.ops.aten.native_dropout_backward.default(value, places[1], scale))
    torch.set_rng_state(state)
    return same


def out_form(target: Any) -> Any:
    """The overload that writes its results where it is told, by the same kernel; None where torch has none of its own."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    plain = [(arg.name, str(arg.type)) for arg in target._schema.arguments]
    packet = target._overloadpacket
    for name in packet.overloads():
        form = getattr(packet, name)
        own = [(arg.name, str(arg.type)) for arg in form._schema.arguments if not arg.is_out]
        if own == plain and len(own) < len(form._schema.arguments) and torch.Tag.generated not in form.tags:
            return form
    return None


def out_names(form: Any) -> list[str]:
    """The arguments of a form that name where results go."""
    return [arg.name for arg in form._schema.arguments if arg.is_out]

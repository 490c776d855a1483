"""Layouts of results that torch's fake kernels get wrong, beside the real kernels', on operands that lie in several ways."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import memplan
import pytest
import torch
from memplan.planner.capture.constants import Constants
from memplan.planner.capture.layouts import CORRECTED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.usefixtures("hasty")

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...]]


def moved(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values with the dimensions in memory in another order."""
    back = [order.index(axis) for axis in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as made": lambda tensor: tensor,
    "last two turned": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "channels last": lambda tensor: moved(tensor, (0, *range(2, tensor.dim()), 1)) if tensor.dim() > 2 else tensor,
    "reversed": lambda tensor: moved(tensor, tuple(range(tensor.dim()))[::-1]),
    "with gaps": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
}


def uniform(*shape: int) -> torch.Tensor:
    """Numbers between 0.1 and 0.9."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def calls() -> list[Call]:
    """A call of each operator, in several shapes."""
    x, y, row = uniform(3, 4, 5), uniform(3, 4, 5) + 0.01, uniform(4, 5)
    image, grown = uniform(2, 3, 4, 5), uniform(2, 3, 6, 7)
    volume, wide = uniform(2, 3, 4, 4, 4), uniform(2, 3, 6, 6, 6)
    made: list[Call] = []
    for value in (x, image, volume):
        channels = value.shape[1]
        weight, mean, var = uniform(channels), uniform(channels), uniform(channels)
        stats = (weight, weight, mean, var)
        made += [
            (aten.native_batch_norm.default, (value, *stats, True, 0.1, 1e-5)),
            (aten._native_batch_norm_legit.default, (value, *stats, True, 0.1, 1e-5)),
            (aten._native_batch_norm_legit.no_stats, (value, weight, weight, True, 0.1, 1e-5)),
            (aten._native_batch_norm_legit_functional.default, (value, *stats, True, 0.1, 1e-5)),
            (aten._batch_norm_with_update.default, (value, *stats, 0.1, 1e-5)),
            (aten._batch_norm_with_update_functional.default, (value, *stats, 0.1, 1e-5)),
            (aten.native_batch_norm_backward.default, (value, value, weight, mean, var, mean, var, True, 1e-5, [True] * 3)),
            (aten.batch_norm_backward.default,
             (value, value, weight, mean, var, mean, var, True, 1e-5, [True] * 3, uniform(0).byte())),
            (aten._log_softmax_backward_data.default, (value, value, 1, torch.float32)),
            (aten._softmax_backward_data.default, (value, value, 1, torch.float32)),
        ]  # fmt: skip
    for one, other in ((x, y), (image, image)):
        made += [
            (aten.elu_backward.default, (one, 1.0, 1.0, 1.0, False, other)),
            (aten.hardsigmoid_backward.default, (one, other)),
            (aten.hardswish_backward.default, (one, other)),
            (aten.hardtanh_backward.default, (one, other, -1.0, 1.0)),
            (aten.logit_backward.default, (one, other, 0.1)),
            (aten.softplus_backward.default, (one, other, 1.0, 20.0)),
            (aten.native_dropout_backward.default, (one, other > 0.5, 2.0)),
            (aten.huber_loss_backward.default, (one, one, other, 1, 1.0)),
            (aten.mse_loss_backward.default, (one.mean(), one, other, 1)),
            (aten.smooth_l1_loss_backward.default, (one, one, other, 0, 1.0)),
            (aten.binary_cross_entropy_backward.default, (one, one, other, None, 0)),
            (aten.native_layer_norm_backward.default,
             (one, other, [one.shape[-1]], one[..., :1], one[..., :1], uniform(one.shape[-1]), uniform(one.shape[-1]),
              [True] * 3)),
            (aten.pow.Scalar, (2.0, one)),
            (aten.normal.Tensor_Tensor, (one, other)),
            (aten.log_sigmoid_forward.default, (one,)),
        ]  # fmt: skip
    for one, other in ((x, y), (x, row), (row, x), (x[:, :1], row), (x, uniform())):
        whole = (one * 10).long(), (other * 10).long() + 1
        made += [(func, (one, other)) for func in (
            aten.special_xlog1py.default, aten.copysign.Tensor, aten.xlogy.Tensor, aten.heaviside.default,
            aten.logaddexp.default, aten.logaddexp2.default, aten.logical_and.default, aten.logical_or.default,
            aten.logical_xor.default, aten.floor_divide.default,
        )] + [(aten.ldexp.Tensor, (one, whole[1])), (aten.floor_divide.default, whole)]  # fmt: skip
    even = uniform(2, 4, 4, 5)
    return [
        *made,
        (aten.channel_shuffle.default, (even, 2)),
        (aten.native_channel_shuffle.default, (even, 2)),  # torch refuses to trace it for layouts that have no name
        (aten.max_unpool2d.default, (image, torch.arange(20).view(4, 5).expand(2, 3, 4, 5).contiguous(), [8, 10])),
        (aten.reflection_pad3d.default, (volume, [1] * 6)),
        (aten.replication_pad3d.default, (volume, [1] * 6)),
        (aten.reflection_pad2d_backward.default, (grown, image, [1] * 4)),
        (aten.replication_pad2d_backward.default, (grown, image, [1] * 4)),
        (aten.reflection_pad3d_backward.default, (wide, volume, [1] * 6)),
        (aten.replication_pad3d_backward.default, (wide, volume, [1] * 6)),
    ] + [(aten.div.Tensor_mode, (one, other)) for one, other in ((x, y), (x, row), (row, x))]


def facts(result: Any) -> list[tuple[Any, ...]]:
    """Shapes, types, and the strides that decide where an element lies."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.numel()]
    return [
        (tuple(each.shape), each.dtype, [stride for size, stride in zip(each.shape, each.stride(), strict=True) if size > 1])
        for each in tensors
    ]


def test_every_operator_is_called():
    """One that is added to the rules is added here."""
    assert {func for func, _ in calls()} == CORRECTED


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_results_lie_as_the_kernel_lays_them(first: str, second: str):
    """The first tensor of each call lies in one way, the others in another."""
    for func, args in calls():
        kwargs = {"rounding_mode": "floor"} if func is aten.div.Tensor_mode else {}
        lie = iter([LAYOUTS[first], *[LAYOUTS[second]] * 20])
        args = pytree.tree_map_only(torch.Tensor, lambda value: next(lie)(value), args)  # noqa: B023
        mode, refused = Constants(), func is aten.native_channel_shuffle.default and first in ("last two turned", "reversed")
        with mode, torch.no_grad(), pytest.raises(ValueError, match="Cannot view") if refused else nullcontext():
            fake = func(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args), **kwargs)
        assert refused or facts(fake) == facts(func(*pytree.tree_map_only(torch.Tensor, torch.clone, args), **kwargs)), func


class Forgetful(dict):
    """Knows nothing that can be relied on."""

    def get(self, *_):
        raise AssertionError("what the process remembers was asked")


def test_what_other_code_has_traced_decides_nothing(monkeypatch: pytest.MonkeyPatch):
    """Torch remembers results of fake kernels, whatever they were found under."""
    monkeypatch.setattr(FakeTensorMode, "cache", Forgetful())
    memplan.plan(Sequence(), None, (uniform(3, 6, 8),), machine="h100-80gb", time_limit=1.0)


class Turned(nn.Module):
    """Puts dimensions in the order that a layer wants, and back."""

    def __init__(self, part: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.second, self.part = nn.Linear(8, 8), nn.Linear(8, 8), part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.part(self.first(x).transpose(1, 2)).transpose(1, 2)).square().mean()


class Sequence(nn.Module):
    """Cross entropy of a sequence as torch's documentation has it: classes in the second place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.second(self.first(x)).transpose(1, 2)
        return F.cross_entropy(logits, torch.zeros(len(x), x.shape[1], dtype=torch.long), reduction="none").mean()


@pytest.mark.parametrize(
    "make",
    [lambda: Turned(nn.BatchNorm1d(8)), lambda: Turned(nn.LogSigmoid()), lambda: Turned(nn.BatchNorm1d(8).eval()), Sequence,
     lambda: Turned(lambda x: F.smooth_l1_loss(x, x.detach() + 1, reduction="none"))],
    ids=["batch norm", "log sigmoid", "evaluated", "cross entropy", "smooth l1"],
)  # fmt: skip
@pytest.mark.parametrize("budget", [None, "floor"])
def test_turned_values_are_planned_with_eagers_bits(make: Callable[[], nn.Module], budget: str | None):
    """A view that the real layout does not allow is no part of the program."""
    torch.manual_seed(0)
    model, x = make(), uniform(3, 6, 8)
    other = make()
    other.load_state_dict(model.state_dict())
    plan = memplan.plan(model, None, (x,), machine="h100-80gb", time_limit=1.0)
    if budget is not None:
        plan = memplan.plan(model, plan.minimum, (x,), machine="h100-80gb", time_limit=1.0)
    found, wanted = plan.apply(model)(x), other(x)
    found.backward()
    wanted.backward()

    assert torch.equal(found, wanted)
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(model.parameters(), other.parameters(), strict=True))

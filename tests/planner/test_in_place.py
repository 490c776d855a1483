"""Kernels that `planner.in_place` writes over an operand give, written so, the bits of the ordinary call."""

import pytest
import torch
from memplan.planner.in_place import ROWWISE, InPlace, in_place_form, out_overload
from torch import fx

ATEN = torch.ops.aten
SHAPES = [(1, 1), (5, 1), (1, 100_000), (7, 33), (64, 1000), (1023, 4097), (8, 4, 256, 256)]
TYPES = [torch.float32, torch.bfloat16, torch.float64]


def written_over(target, args: list, operand: int) -> torch.Tensor:
    """The call with its result written over one of its operands."""
    out = out_overload(target)
    mine = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
    result = out(*mine, **{out._schema.arguments[-1].name: mine[operand]})
    assert result.data_ptr() == mine[operand].data_ptr()
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax_over_its_input(name, shape, dtype):
    """Forward: the input is read row by row before its row is written."""
    torch.manual_seed(0)
    target = getattr(ATEN, name).default
    args = [5 * torch.randn(shape).to(dtype), -1, False]

    assert torch.equal(target(*args), written_over(target, args, 0))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax_backward_over_either_operand(name, shape, dtype):
    """Backward: over the gradient or over the forward's result."""
    torch.manual_seed(0)
    value = getattr(ATEN, name).default(5 * torch.randn(shape).to(dtype), -1, False)
    target = getattr(ATEN, f"{name}_backward_data").default
    args = [torch.randn(shape).to(dtype), value, -1, dtype]
    wanted = target(*args)

    for operand in (0, 1):
        assert torch.equal(wanted, written_over(target, args, operand))


def tanh_over(operand: torch.Tensor, result: torch.Tensor, *others: torch.Tensor) -> InPlace | None:
    """How `tanh` can write a result over its operand; `others` are views of the operand's storage that it reads too."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(1 + len(others))]
    call = graph.call_function(ATEN.tanh.default, (nodes[0],))
    for node, value in zip([*nodes, call], [operand, *others, result], strict=True):
        node.meta["val"] = value
    return in_place_form(call, nodes[0], nodes, dict.fromkeys(nodes, 0))


WHOLE = torch.zeros(4, 6)
REFUSED = {
    "an offset": (torch.zeros(25)[1:].view(4, 6), WHOLE),
    "another layout": (torch.zeros(6, 4).t(), WHOLE),
    "another shape": (torch.zeros(24), WHOLE),
    "another type": (torch.zeros(4, 6, dtype=torch.int32), WHOLE),
    "a part of the storage": (torch.zeros(5, 6)[:4], WHOLE),
    "a result in a part of its storage": (WHOLE, torch.zeros(5, 6)[:4]),
    "a second view of the storage": (WHOLE, torch.zeros(4, 6), WHOLE.view(6, 4)),
    "a conjugate": (torch.zeros(4, 6, dtype=torch.complex64).conj(), torch.zeros(4, 6, dtype=torch.complex64)),
    "a negative": (torch._neg_view(torch.zeros(4, 6)), WHOLE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_written_over(case):
    """Where elements of result and operand would not lie at the same place, or somebody else reads them."""
    assert tanh_over(*REFUSED[case]) is None


def test_what_may():
    """The same layout, whole storages."""
    form = tanh_over(WHOLE, torch.zeros(4, 6))
    assert form is not None
    assert form.target == ATEN.tanh.out


def test_every_kernel_on_the_list_is_tested():
    """Whoever adds a kernel adds a test."""
    assert set(ROWWISE) == {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"}

"""Kernels that `planner.in_place` writes over an operand give, written so, the bits of the ordinary call."""

import pytest
import torch
from memplan.planner.in_place import ROWWISE, out_overload

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


def test_every_kernel_on_the_list_is_tested():
    """Whoever adds a kernel adds a test."""
    assert set(ROWWISE) == {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"}

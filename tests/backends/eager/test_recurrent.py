"""The CPU's recurrent layers: run again, and what they keep for their backward kernels."""

import copy

import msgspec
import pytest
import torch
from memplan.planner.ir.errors import BudgetError
from memplan.planner.ir.machine import load_machine
from memplan.planner.verbs.session import Session
from torch import nn

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
LAYER = "aten.mkldnn_rnn_layer.default"


class Stack(nn.Module):
    """LSTMs one after the other."""

    def __init__(self, **options):
        super().__init__()
        width = 64 * (1 + options.get("bidirectional", False))
        self.parts = nn.ModuleList(nn.LSTM(width if at else 64, 64, **options) for at in range(4))

    def forward(self, x):
        for part in self.parts:
            x = part(x)[0]
        return x


def total(output: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return output.float().sin().sum()


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_a_layer_that_is_run_again_has_eagers_bits(options, arena):
    """Where gradients are off it would keep nothing for its backward kernel, which then finds no memory to read."""
    torch.manual_seed(0)
    model, x = Stack(**options), torch.randn(20, 8, 64)
    other = copy.deepcopy(model)
    session = Session(model, (x,), None, loss=total, machine=QUICK, time_limit=2.0)
    session.planner.effort = 1000
    with pytest.raises(BudgetError) as caught:
        session.plan(1, arena)
    plan = session.plan(caught.value.minimum, arena)
    layers = [step for step in plan.schedule.instructions if hasattr(step, "op") and plan.program.ops[step.op].target == LAYER]
    assert len(layers) > len(model.parts) * (1 + options.get("bidirectional", False))
    fast = plan.apply(model)
    for _ in range(2):
        total(fast(x)).backward()
        total(other(x)).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_what_a_layer_keeps_is_counted():
    """A program has the bytes of the kernel's scratch space, which are a dozen times those of its output."""
    model, x = Stack(), torch.randn(20, 8, 64)
    program = Session(model, (x,), None, loss=total, machine=QUICK).captured.program
    first = model.parts[0]
    hidden = torch.zeros(1, 8, 64)
    weights = [value.detach() for value in first.parameters()]
    kept = torch.ops.aten.mkldnn_rnn_layer(x, *weights, hidden, hidden, False, [], 2, 64, 1, True, False, False, True)[3]
    sizes = [program.buffers[buffer].bytes for op in program.ops if op.target == LAYER for buffer in op.writes]
    assert sizes.count(kept.nbytes) == len(model.parts)
    assert kept.nbytes > 8 * x.nbytes

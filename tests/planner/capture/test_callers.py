"""Which module an op belongs to."""

import threading

import pytest
import torch
from memplan.planner.capture.capture import capture
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A layer, what its own forward does, and modules without parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.act, self.last = nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.last(torch.tanh(self.act(self.drop(self.first(x)))))


class Model(nn.Module):
    """Two blocks, one of them checkpointed and called twice; the first has a second name."""

    def __init__(self):
        super().__init__()
        self.near, self.far = Block(), Block()
        self.again = self.near

    def forward(self, x):
        return self.again(self.far(checkpoint(self.near, x, use_reentrant=False))).sum()


def places(train: bool) -> list[tuple[str, str]]:
    """Pairs (operator, module)."""
    program = capture(Model(), (torch.randn(2, 4),), train=train).program
    return [(op.target.removeprefix("aten.").partition(".")[0], op.where) for op in program.ops]


@pytest.mark.parametrize("train", [True, False])
def test_a_forward_op_belongs_to_the_module_that_called_it(train):
    """And not to the parameter that was read last, nor to a second name of the module."""
    found = places(train)
    forward = found[: [name for name, _ in found].index("sum") + 1]
    block = [("addmm", "first"), ("native_dropout", "drop"), ("relu", "act"), ("tanh", ""), ("addmm", "last"), ("add", "")]
    wanted = [(op, f"{name}.{part}".rstrip(".")) for name in ("near", "far", "near") for op, part in block]
    called = [pair for pair in forward if pair[0] in dict(block)]
    assert called == wanted
    assert forward[-1] == ("sum", "")


def test_a_backward_op_belongs_to_the_module_whose_op_it_differentiates():
    """Sums of gradients go with the gradient that completes them."""
    found = places(True)
    backward = found[[name for name, _ in found].index("loss") + 1 :]
    assert {where for name, where in backward if name == "tanh_backward"} == {"near", "far"}
    assert {where for name, where in backward if name == "threshold_backward"} == {"near.act", "far.act"}
    assert {where for name, where in backward if name == "mm"} == {f"{at}.{part}" for at in ("near", "far")
                                                                  for part in ("first", "last")}  # fmt: skip
    assert "" not in {where for name, where in backward if name == "add"}


def test_hooks_are_gone_after_a_trace_that_fails():
    """And a module that another thread calls meanwhile is nobody's caller."""

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            thread = threading.Thread(target=lambda: nn.ReLU()(torch.ones(1)))
            thread.start()
            thread.join()
            return self.inner(x[:, :3])

    before = len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)
    with pytest.raises(Exception, match="cannot trace"):
        capture(Failing(), (torch.randn(2, 4),))
    assert (len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)) == before
    assert torch.fx.traceback.current_meta.get("custom") is None

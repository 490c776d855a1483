"""Tensors that a model holds and that are no parameters: read right in every form, never written over, or refused in words."""

import copy

import memplan
import msgspec
import pytest
import torch
from memplan.planner.capture.nodes import is_view
from memplan.planner.ir.errors import BudgetError, CaptureError
from memplan.planner.ir.machine import load_machine
from memplan.planner.verbs.session import Session
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
ROWS, WIDTH = 32, 16


class Holds(nn.Module):
    """Layers, something held in between, and what is done with both."""

    def __init__(self, held, use):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.last = nn.Sequential(nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.held, self.use = held, use

    def forward(self, x):
        return self.last(self.use(self.held, self.first(x)))


def turns(rows: int) -> torch.Tensor:
    """Complex numbers of size one, as rotary positions are."""
    return torch.polar(torch.ones(rows, WIDTH // 2), torch.randn(rows, WIDTH // 2))


def rotated(t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Meta's own Llama: a run of the table, viewed to fit."""
    freqs = t[3 : 3 + ROWS].view(ROWS, WIDTH // 2)
    return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * freqs).flatten(-2)


def pieces(t, h):
    """Views of several tensors over one storage."""
    return h * t[0] + t[1] * t[2]


BASE = torch.randn(4, WIDTH)
HELD = {  # name -> what is held, what is done with it
    "sliced": (lambda: torch.randn(ROWS, 2 * WIDTH), lambda t, h: h * t[:, :WIDTH] + t[:, WIDTH:]),
    "whole, and written first": (lambda: torch.randn(ROWS, WIDTH), lambda t, h: t.view(ROWS, WIDTH) * h),
    "detached, and written first": (lambda: torch.randn(ROWS, WIDTH), lambda t, h: t.detach() * h + 1),
    "transposed, and written first": (lambda: torch.randn(WIDTH, ROWS), lambda t, h: (t.t() * h) * 2),
    "split": (lambda: torch.randn(ROWS, 2 * WIDTH), lambda t, h: h * t.split(WIDTH, 1)[0] + t.split(WIDTH, 1)[1]),
    "chunked": (lambda: torch.randn(ROWS, 2 * WIDTH), lambda t, h: h * t.chunk(2, 1)[1]),
    "unbound": (lambda: torch.randn(2, WIDTH), lambda t, h: h * t.unbind()[0] + t.unbind()[1]),
    "unbound, large": (lambda: torch.randn(2, 1100, 1000), lambda t, h: h * t.unbind()[1][:ROWS, :WIDTH]),
    "expanded": (lambda: torch.randn(1, WIDTH), lambda t, h: h * t.expand(ROWS, WIDTH)),
    "held expanded": (lambda: torch.randn(1, WIDTH).expand(ROWS, WIDTH), lambda t, h: t * h + t[:3].sum()),
    "strided": (lambda: torch.randn(1000), lambda t, h: h * t.as_strided((WIDTH,), (2,), 3) + t.unfold(0, 4, 2)[:WIDTH].sum(1)),
    "rotary": (lambda: turns(3 * ROWS), rotated),
    "conjugate": (lambda: turns(ROWS).conj(), lambda t, h: (h[:, : WIDTH // 2] * t * t[1]).real.repeat(1, 2)),
    "real and imaginary": (lambda: turns(ROWS), lambda t, h: h * t.real.repeat(1, 2) + t.imag.repeat(1, 2)),
    "two types of one memory": (
        lambda: (lambda z: [z, torch.view_as_real(z)])(turns(ROWS)),
        lambda t, h: h * t[1][..., 0].repeat(1, 2) + t[0].imag.repeat(1, 2),
    ),
    "indices, read twice": (
        lambda: torch.randint(0, ROWS, (2, ROWS)),
        lambda t, h: h[t[0]] + h.gather(0, t[1][:, None].expand(-1, WIDTH)),
    ),
    "a mask": (lambda: torch.rand(2, ROWS, WIDTH) > 0.5, lambda t, h: torch.where(t[1], h, -h).masked_fill(t[0], 0.1)),
    "a scalar": (lambda: torch.tensor(0.5), lambda t, h: t * h),
    "nothing": (lambda: torch.randn(0, WIDTH), lambda t, h: torch.cat([h, t])),
    "views of one storage": (lambda: [BASE[0], BASE[2], BASE.t()[:, 1]], pieces),
    "numpy's": (
        lambda: torch.arange(WIDTH, dtype=torch.float32).numpy(),
        lambda t, h: h * torch.from_numpy(t) + torch.tensor(t),
    ),
    "bfloat16's": (lambda: torch.randn(ROWS, WIDTH).bfloat16(), lambda t, h: h * t[0] + t.to(h)[1]),
}
REFUSED = {  # name -> what is held, what is done with it, what the refusal says
    "sparse": (lambda: torch.eye(ROWS).to_sparse(), torch.sparse.mm, r"holds a sparse tensor.*to_dense\(\)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.randn(ROWS, WIDTH), 0.1, 0, torch.quint8),
        lambda t, h: h + t.dequantize(),
        r"holds a quantized tensor.*dequantize\(\)",
    ),
    "wants a gradient": (lambda: torch.randn(WIDTH, requires_grad=True), lambda t, h: h * t, r"register it \(nn.Parameter"),
    "a number": (lambda: torch.tensor(0.5), lambda t, h: h * t.item(), "takes a number out of a tensor.*Python number"),
    "a shape": (lambda: torch.arange(ROWS) % 2 == 0, lambda t, h: h[t], "decide a shape .*masked_fill"),
    "changed": (
        lambda: torch.zeros(WIDTH),
        lambda t, h: h + t.add_(1),
        "changes a tensor that is no buffer: use register_buffer",
    ),
}


def plans(model: nn.Module, x: torch.Tensor) -> list[memplan.Plan]:
    """Without a budget, and for the smallest that is known to work."""
    session = Session(model, (x,), None, loss=loss_of, machine=QUICK, time_limit=2.0)
    session.planner.effort = 500
    with pytest.raises(BudgetError) as caught:
        session.plan(1)
    return [session.plan(None), session.plan(caught.value.minimum)]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return output.square().mean()


@pytest.mark.parametrize("name", HELD)
def test_a_held_tensor_is_read_and_never_written(name):
    """Loss and gradients of two steps are eager's, and what is held has the bits that it had."""
    torch.manual_seed(0)
    held, use = HELD[name]
    model, x = Holds(held(), use), torch.randn(ROWS, WIDTH)
    kept, other = copy.deepcopy(model.held), copy.deepcopy(model)
    for plan in plans(model, x):
        fast = plan.apply(model)
        model.zero_grad()
        other.zero_grad()
        for _ in range(2):
            found, wanted = loss_of(fast(x)), loss_of(other(x))
            found.backward()
            wanted.backward()
            assert torch.equal(found, wanted)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        for one, two in zip(*(value if isinstance(value, list) else [value] for value in (model.held, kept)), strict=True):
            assert (one == two).all()


@pytest.mark.parametrize("name", HELD)
def test_a_view_of_a_held_tensor_is_not_an_op(name):
    """It shares the memory of what it views, which is resident: a program that makes it would count it twice."""
    torch.manual_seed(0)
    held, use = HELD[name]
    traced = Session(Holds(held(), use), (torch.randn(ROWS, WIDTH),), None, loss=loss_of, machine=QUICK).captured.traced
    assert not [node for node in traced.nodes if node is not None and is_view(node.target)]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_in_one_line(name):
    """With the model's line, what is true, and what to try."""
    held, use, says = REFUSED[name]
    with pytest.raises(CaptureError, match=says) as caught:
        memplan.plan(Holds(held(), use), None, (torch.randn(ROWS, WIDTH),), loss=loss_of, machine=QUICK)
    assert "\n" not in str(caught.value)


class Buffers(nn.Module):
    """A buffer that changes, and a view of it that is read."""

    def __init__(self, changes: bool):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.ones(3, WIDTH))
        self.first, self.changes = [self.count[0]], changes

    def forward(self, x):
        y = self.layer(x)
        if self.changes:
            self.count.add_(1)
        return y * self.first[0]


def test_a_view_of_a_buffer_is_the_buffers_memory():
    """It is read where it does not change, and refused by name where it does: tracing does not see that the two are one."""
    x = torch.randn(ROWS, WIDTH)
    model = Buffers(False)
    fast = plans(model, x)[0].apply(model)
    assert torch.equal(fast(x), model(x))
    model.count.add_(1)
    assert torch.equal(fast(x), model(x))
    with pytest.raises(CaptureError, match="changes count, and reads its memory through another tensor"):
        memplan.plan(Buffers(True), None, (x,), loss=loss_of, machine=QUICK)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what will move to torchao
def test_a_fake_quantisation_is_planned_once_it_has_seen_a_batch():
    """Before, its buffers have other sizes than after; the refusal says what to do, and then the bits are eager's."""
    from torch.ao import quantization

    torch.manual_seed(0)
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 4), quantization.DeQuantStub())
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model.train())
    x = torch.randn(ROWS, WIDTH)
    with pytest.raises(CaptureError, match=r"has seen no batch yet.*call the model once before planning"):
        memplan.plan(model, None, (x,), loss=loss_of, machine=QUICK)
    model(x)
    other = copy.deepcopy(model)
    for plan in plans(model, x):
        fast = plan.apply(model)
        for _ in range(2):
            y = torch.randn(ROWS, WIDTH)
            found, wanted = loss_of(fast(y)), loss_of(other(y))
            found.backward()
            wanted.backward()
            assert torch.equal(found, wanted)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        for (key, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(one, two), key

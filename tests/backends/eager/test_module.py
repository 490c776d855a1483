"""Planned models against eager ones, bit for bit: loss, outputs, gradients, buffers and the stream of random numbers."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref

import memplan
import msgspec
import pytest
import torch
from memplan.backends.eager.codegen import drawing_from, get_state
from memplan.planner.capture.nodes import is_view
from memplan.planner.ir.errors import BudgetError, MemplanError, MemplanWarning, PlanMismatch
from memplan.planner.ir.machine import load_machine
from memplan.planner.verbs.session import Session
from torch import nn
from torch.nn import functional as F

WIDTH = 64
QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
ROWS = 128


def total(output):
    """A scalar of whatever a model returns, each leaf weighted differently."""
    leaves = torch.utils._pytree.tree_leaves(output)
    floating = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return sum((leaf.float() * (at + 1)).sin().sum() for at, leaf in enumerate(floating))


def layers(*kinds, times: int = 3) -> nn.Sequential:
    """Linear layers with something between them."""
    return nn.Sequential(*(part for _ in range(times) for part in (nn.Linear(WIDTH, WIDTH), *(kind() for kind in kinds))))


def rows(requires_grad: bool = False) -> torch.Tensor:
    """A batch."""
    return torch.randn(ROWS, WIDTH).requires_grad_(requires_grad)


class Lambda(nn.Module):
    """A model of one function over some submodules."""

    def __init__(self, function, **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(self, *args)


class Keywords(nn.Module):
    """Optional and keyword arguments, nested inputs, a dict of outputs with None and numbers in it."""

    def __init__(self):
        super().__init__()
        self.body = layers(nn.GELU)

    def forward(self, x, pair=None, *, scale=1.0, flag=True):
        y = self.body(x) * scale
        if pair is not None:
            y = y + pair["left"] - pair["right"][0]
        return {"loss": y.square().mean(), "nested": [y.sum(0), (y if flag else None, None)], "number": 3, "name": "keywords"}


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.body = layers(nn.Tanh)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, labels):
        logits = self.head(self.body(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class TiedThrice(nn.Module):
    """Two embeddings and a head of one weight, whose gradient is a sum of three."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(50, WIDTH), nn.Embedding(50, WIDTH)
        self.one, self.two = layers(nn.Tanh), layers(nn.Tanh)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.second.weight = self.head.weight = self.first.weight

    def forward(self, source, target):
        hidden = self.two(self.second(target) + self.one(self.first(source)).mean(1, keepdim=True))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten())


class TiedTwice(nn.Module):
    """Two layers of one weight, the first of them used before and after the second: gradients come in turn."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.layer(torch.tanh(self.other(torch.tanh(self.layer(torch.tanh(self.other(x))))))).square().mean()


class Attention(nn.Module):
    """SDPA over heads, with a residual and a mask made on the fly."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Views(nn.Module):
    """Splits, unbinds, expands, slices, transposes and strided pieces of one storage."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers(nn.GELU, times=2), layers(nn.SiLU, times=2)

    def forward(self, x):
        y = self.first(x)
        a, b = y.split([16, WIDTH - 16], dim=1)
        c, d = b[:, :32].unbind(0)[:2]
        e = y.t()[::2].sum(1, keepdim=True).expand(-1, 7)
        f, g = self.second(y).chunk(2, dim=1)
        h = f.reshape(-1, 2, 16).permute(1, 0, 2)
        return a.sum() + (c * d).sum() + e.sin().sum() + (h.cos() * g.reshape(-1, 2, 16).permute(1, 0, 2)).sum()


class InPlace(nn.Module):
    """Operations that overwrite their operand, directly and through views."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        y = x
        for part in self.parts:
            z = part(y)
            z += y
            z[:, :8] *= 0.5
            z.add_(1.0).clamp_(max=3.0)
            y = z.relu_()
        return y


class Checkpointed(nn.Module):
    """Uses PyTorch's own checkpointing inside."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(layers(nn.GELU, times=2) for _ in range(3))

    def forward(self, x):
        for part in self.parts:
            x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        return x


def frozen(model: nn.Module) -> nn.Module:
    """The model with every second parameter frozen."""
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def convolutions(**options) -> nn.Module:
    """A small convolutional net with BatchNorm."""
    parts = [
        (nn.Conv2d(3 if not at else 8, 8, 3, padding=1), nn.BatchNorm2d(8, **options), nn.ReLU(inplace=True)) for at in range(3)
    ]
    return nn.Sequential(*(part for row in parts for part in row), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))


def images() -> tuple:
    """A batch of images."""
    return (torch.randn(8, 3, 16, 16),)


def tokens() -> tuple:
    """Tokens and labels."""
    return torch.randint(0, 50, (4, 32)), torch.randint(0, 50, (4, 32))


def shared_block(m, x):
    """One submodule called three times, so that its gradients add up."""
    for _ in range(3):
        x = F.dropout(torch.tanh(m.body(x)), 0.2, training=m.training)
    return x


def mixed_dropout(m, x):
    """Dropout on two branches, Bernoulli noise made in the model, and a dropout on attention."""
    a, b = F.dropout(m.left(x), 0.3), F.dropout(m.right(x), 0.5)
    noise = torch.rand_like(a) * 0.1
    q = (a + noise).view(8, -1, WIDTH)
    return F.scaled_dot_product_attention(q, b.view(8, -1, WIDTH), q, dropout_p=0.1)


def turned_dropout(m, x):
    """Dropouts of tensors that lie in memory in another order than that of their axes."""
    x = F.dropout(m.body(x).view(8, -1, WIDTH).transpose(0, 1), 0.3)
    x = x.reshape(4, 2, -1, WIDTH).permute(3, 0, 2, 1)
    return F.dropout(x, 0.4) * F.dropout(x[..., :1], 0.5)


def looks_at_constants(m, x):
    """A branch on a mask of floats made in the model, and a constant that is expanded before it is used."""
    places, mask = torch.arange(WIDTH).expand(ROWS, -1), torch.ones(ROWS)
    places = places + 2
    return m.a(x) + places if mask.all() and (places[0] >= 2).all() else m.b(x)


def experts(m, x):
    """Rows in three groups, each multiplied by a matrix of its own."""
    ends = torch.tensor([10, 70, ROWS], dtype=torch.int32)
    return torch._grouped_mm(m.a(x), torch.stack([part.weight for part in m.experts]).transpose(1, 2), offs=ends)


RESIZES = (  # (dimensions, how) of every family of kernels
    (1, {"scale_factor": 2.0, "mode": "nearest"}), (1, {"size": 19, "mode": "linear"}),
    (2, {"size": (17, 19), "mode": "nearest"}), (2, {"scale_factor": 1.7, "mode": "nearest-exact"}),
    (2, {"size": (17, 19), "mode": "bilinear"}), (2, {"scale_factor": 1.7, "mode": "bilinear", "align_corners": True}),
    (2, {"size": (5, 5), "mode": "bilinear", "antialias": True}), (2, {"size": (17, 19), "mode": "bicubic"}),
    (3, {"scale_factor": 1.5, "mode": "nearest"}), (3, {"size": (7, 8, 9), "mode": "trilinear"}),
)  # fmt: skip


def resized(m, x):
    """One picture, resized in every way."""
    made = m.a(x)
    shaped = {1: made.flatten(2), 2: made, 3: made.unflatten(2, (2, -1))}
    return torch.cat([F.interpolate(shaped[dim], **how).flatten(1) for dim, how in RESIZES], 1).tanh()


def rotated(m, x):
    """Rotary positions by complex numbers, with a conjugate: views of the same bytes that read otherwise."""
    turn = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2) * 0.1)
    q, k = (torch.view_as_complex(part(x).unflatten(-1, (-1, 2))) for part in (m.a, m.b))
    return torch.view_as_real(q * turn).flatten(-2) + torch.view_as_real(k * turn.conj() * q.conj()).flatten(-2)


def windows(m, x):
    """Overlapping windows by absolute strides, as sliding attention takes them, and pieces written into a larger tensor."""
    y = m.a(x)
    parts = y.as_strided((ROWS // 16 - 1, 32, WIDTH), (16 * WIDTH, WIDTH, 1), 0)
    out = torch.zeros(ROWS, 2 * WIDTH)
    out[:, 3 : WIDTH + 3] = m.b(y)
    out[4:, -WIDTH:] += y[:-4]
    return out.sin(), (parts @ parts.transpose(1, 2)).softmax(-1) @ parts


def mixed_layouts(m, x):
    """Gradients of pointwise functions whose operands lie in memory in different orders, and views of them."""
    y = m.a(x).view(8, -1, WIDTH)
    return tuple(m.b(f(y.transpose(1, 2)).transpose(1, 2).contiguous()) for f in (F.softplus, F.elu, F.hardswish, F.hardtanh))


# name -> model, its inputs, how the scalar comes about (None: from the model itself)
MODELS = {
    "rotated by complex numbers": (
        lambda: Lambda(rotated, a=layers(nn.GELU), b=layers(nn.Tanh)),
        lambda: (rows(),),
        total,
    ),
    "windows": (lambda: Lambda(windows, a=layers(nn.GELU), b=layers(nn.Tanh)), lambda: (rows(),), total),
    "mixed layouts": (
        lambda: Lambda(mixed_layouts, a=layers(nn.GELU), b=nn.Linear(WIDTH, WIDTH)),
        lambda: (rows(),),
        total,
    ),
    "gelu": (lambda: layers(nn.GELU), lambda: (rows(),), total),
    "relu in place": (lambda: layers(nn.GELU, lambda: nn.ReLU(inplace=True)), lambda: (rows(),), total),
    "tied": (Tied, tokens, lambda out: out[0]),
    "tied three times": (TiedThrice, tokens, None),
    "tied and used twice": (TiedTwice, lambda: (rows(),), None),
    "frozen": (lambda: frozen(layers(nn.GELU)), lambda: (rows(),), total),
    "first layers frozen": (
        lambda: nn.Sequential(layers(nn.GELU).requires_grad_(False), layers(nn.GELU)),
        lambda: (rows(),),
        total,
    ),
    "batch norm": (convolutions, images, total),
    "batch norm, untracked": (lambda: convolutions(track_running_stats=False), images, total),
    "batch norm, eval": (lambda: convolutions().eval(), images, total),
    "batch norm called twice": (
        lambda: Lambda(
            lambda m, x: m.norm(m.body(m.norm(m.body(x)))), norm=nn.BatchNorm1d(WIDTH), body=layers(nn.GELU, times=1)
        ),
        lambda: (rows(),),
        total,
    ),
    "dropout": (lambda: layers(nn.GELU, lambda: nn.Dropout(0.3)), lambda: (rows(),), total),
    "dropout, bfloat16": (
        lambda: layers(nn.GELU, lambda: nn.Dropout(0.3)).bfloat16(),
        lambda: (rows().bfloat16(),),
        total,
    ),
    "dropout, float16, turned": (
        lambda: Lambda(turned_dropout, body=layers(nn.GELU).half()),
        lambda: (rows().half(),),
        total,
    ),
    "dropout of everything": (
        lambda: nn.Sequential(layers(nn.GELU), nn.Dropout(1.0), layers(nn.GELU), nn.Dropout(0.5)),
        lambda: (rows(),),
        total,
    ),
    "dropout on branches": (
        lambda: Lambda(mixed_dropout, left=layers(nn.GELU), right=layers(nn.Tanh)),
        lambda: (rows(),),
        total,
    ),
    "shared block": (lambda: Lambda(shared_block, body=nn.Linear(WIDTH, WIDTH)), lambda: (rows(),), total),
    "in place": (InPlace, lambda: (rows(),), total),
    "views": (Views, lambda: (rows(),), None),
    "attention": (lambda: nn.Sequential(Attention(), Attention()), lambda: (torch.randn(2, 32, WIDTH),), total),
    "keywords": (Keywords, lambda: (rows(), {"left": rows(), "right": [rows()]}), None),
    "checkpointed": (Checkpointed, lambda: (rows(),), total),
    "several outputs": (
        lambda: Lambda(lambda m, x, y: (m.a(x), [m.b(y), m.a(y).detach()]), a=layers(nn.GELU), b=layers(nn.SiLU)),
        lambda: (rows(), rows()),
        total,
    ),
    "input requires grad": (lambda: layers(nn.GELU), lambda: (rows(True),), total),
    "layer norm is the output": (lambda: nn.Sequential(layers(nn.GELU), nn.LayerNorm(WIDTH)), lambda: (rows(),), total),
    "double": (lambda: layers(nn.GELU).double(), lambda: (rows().double(),), total),
    "bfloat16": (lambda: layers(nn.GELU).bfloat16(), lambda: (rows().bfloat16(),), total),
    "lstm": (lambda: Lambda(lambda m, x: m.cell(x)[0], cell=nn.LSTM(16, 16, 2)), lambda: (torch.randn(6, 4, 16),), total),
    "pooling and cat": (
        lambda: Lambda(
            lambda m, x: F.max_pool2d(torch.cat([m.a(x), m.b(x)], 1), 2).amax((2, 3)),
            a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(3, 8, 3),
        ),
        images,
        total,
    ),
    "resizes": (lambda: Lambda(resized, a=nn.Conv2d(3, 4, 3, padding=1)), images, total),
    "constants looked at": (
        lambda: Lambda(looks_at_constants, a=layers(nn.GELU), b=nn.Linear(WIDTH, WIDTH)),
        lambda: (rows(),),
        total,
    ),
    "experts": (
        lambda: Lambda(experts, a=layers(nn.GELU), experts=nn.ModuleList(nn.Linear(WIDTH, 32, bias=False) for _ in range(3))),
        lambda: (rows(),),
        total,
    ),
    "unused parameter": (lambda: Lambda(lambda m, x: m.a(x), a=layers(nn.GELU), b=nn.Linear(3, 3)), lambda: (rows(),), total),
    "parameter itself": (
        lambda: Lambda(lambda m, x: m.a(x) @ m.a[0].weight * m.a[0].bias, a=layers(nn.GELU)),
        lambda: (rows(),),
        total,
    ),
    "complex-free fft-like trig": (
        lambda: Lambda(lambda m, x: (m.a(x).sin() * m.a(x).cos()).cumsum(1), a=layers(nn.Tanh)),
        lambda: (rows(),),
        total,
    ),
    "sort and gather": (lambda: Lambda(lambda m, x: m.a(x).sort(1)[0].topk(8)[0], a=layers(nn.GELU)), lambda: (rows(),), total),
    "prelu and bilinear": (
        lambda: Lambda(
            lambda m, x: m.b(m.a(x), x), a=nn.Sequential(layers(nn.GELU), nn.PReLU()), b=nn.Bilinear(WIDTH, WIDTH, 4)
        ),
        lambda: (rows(),),
        total,
    ),
}


def build(name: str) -> tuple:
    """A model, a copy of it, its inputs, and its loss."""
    torch.manual_seed(0)
    make, inputs, loss = MODELS[name]
    model = make()
    return model, copy.deepcopy(model), inputs(), loss


def scalar(output, loss):
    """The scalar that is differentiated."""
    if loss is not None:
        return loss(output)
    return output["loss"] if isinstance(output, dict) else output


def session_of(model: nn.Module, args: tuple, loss, kwargs: dict | None = None, lend: bool = False) -> Session:
    """What `memplan.plan` does before it looks at the budget, with a short search."""
    session = Session(model, args, kwargs, loss=loss, machine=QUICK, time_limit=2.0, lend_gradients=lend)
    session.planner.effort = 1500
    return session


def tight(
    model: nn.Module, args: tuple, loss, kwargs: dict | None = None, arena: bool = False, lend: bool = False
) -> memplan.Plan:
    """The plan for the smallest budget known to work, asked for as a user would find it."""
    session = session_of(model, args, loss, kwargs, lend)
    with pytest.raises(BudgetError) as caught:
        session.plan(1, arena)
    assert caught.value.minimum is not None
    return session.plan(caught.value.minimum, arena)


def planned(model: nn.Module, args: tuple, loss, budget: str, kwargs: dict | None = None) -> memplan.Plan:
    """A plan without a budget, the tightest, the tightest with addresses, or with gradients in the arena as well."""
    if budget in ("placed", "lent"):
        return tight(model, args, loss, kwargs, arena=True, lend=budget == "lent")
    if budget == "tight":
        return tight(model, args, loss, kwargs)
    return session_of(model, args, loss, kwargs).plan(None)


def step(model: nn.Module, args: tuple, loss, seed: int = 7) -> dict:
    """One step, and everything that a user can see of it."""
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)
    torch.manual_seed(seed)
    output = model(*args)
    value = scalar(output, loss)
    between = torch.get_rng_state()
    value.backward()
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((output, value)) if isinstance(leaf, torch.Tensor)]
    inputs = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return {
        "outputs": [leaf.detach() for leaf in leaves],
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "input grads": [leaf.grad for leaf in inputs],
        "buffers": dict(model.named_buffers()),
        "rng": [between, torch.get_rng_state()],
        "structure": torch.utils._pytree.tree_structure(output),
    }


def same(found, wanted, path: str = "") -> None:
    """Bitwise equality of two results."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for key in wanted:
            same(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{path}/{at}")
    elif isinstance(wanted, torch.Tensor):
        assert found is not None, path
        assert found.dtype == wanted.dtype, path
        assert found.shape == wanted.shape, path
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), f"{path}: {(found - wanted).abs().max()}"
    else:
        assert found == wanted, path


@pytest.mark.parametrize("name", MODELS)
def test_no_op_of_a_program_is_a_view(name):
    """A view has its operand's buffer, also where tracing's dropout was written back; else it outlives what it views."""
    model, _, args, loss = build(name)
    traced = session_of(model, args, loss).captured.traced
    assert not [node for node in traced.nodes if node is not None and is_view(node.target)]


@pytest.mark.parametrize("budget", ["free", "tight", "placed", "lent"])
@pytest.mark.parametrize("name", MODELS)
def test_a_planned_step_is_the_eager_step(name, budget):
    """Loss, outputs, gradients, buffers and random numbers are eager's bit for bit, with and without recomputation."""
    model, other, args, loss = build(name)
    plan = planned(model, args, loss, budget)
    fast = plan.apply(model)

    for seed in (7, 8):  # twice: gradients accumulate, buffers move on
        same(step(fast, args, loss, seed), step(other, args, loss, seed))
        if budget == "lent":  # they are to be gone before the next step
            fast.zero_grad()
            other.zero_grad()


def test_most_tight_plans_do_recompute():
    """The comparisons above would prove little otherwise."""
    repeated = {}
    for name in ("gelu", "tied", "batch norm", "dropout", "attention", "in place", "dropout on branches", "checkpointed"):
        model, _, args, loss = build(name)
        repeated[name] = tight(model, args, loss).planned.report.repeated

    assert all(repeated.values()), repeated


@pytest.mark.parametrize("budget", ["free", "tight", "placed"])
def test_several_optimizer_steps_end_at_the_same_parameters(budget):
    """Five steps of AdamW, dropout and BatchNorm included, leave eager's very parameters and buffers."""
    torch.manual_seed(0)
    model = layers(nn.GELU, lambda: nn.BatchNorm1d(WIDTH), lambda: nn.Dropout(0.2))
    other = copy.deepcopy(model)
    args = (rows(),)
    fast = planned(model, args, total, budget).apply(model)
    for net in (fast, other):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(5):
            total(net(torch.randn(ROWS, WIDTH))).backward()
            optimizer.step()
            optimizer.zero_grad()

    same(dict(fast.state_dict()), dict(other.state_dict()))
    assert list(fast.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("budget", ["free", "tight", "placed"])
def test_a_planned_model_under_autocast(budget):
    """Planned under bf16 autocast it gives autocast's numbers under it, and refuses a call without."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    other = copy.deepcopy(model)
    args = (rows(),)
    with torch.autocast("cpu", torch.bfloat16):
        fast = planned(model, args, total, budget).apply(model)
        found, wanted = step(fast, args, total), step(other, args, total)
    same(found, wanted)
    assert found["outputs"][0].dtype == torch.bfloat16

    with pytest.raises(PlanMismatch, match="autocast"):
        fast(*args)


@pytest.mark.parametrize("budget", ["free", "tight", "placed"])
def test_the_step_leaves_nothing_behind(budget):
    """After backward no tensor of the step is alive except gradients and what the caller holds."""
    torch.manual_seed(0)
    model = layers(nn.GELU, lambda: nn.Dropout(0.1))
    args = (rows(),)
    fast = planned(model, args, total, budget).apply(model)
    step(fast, args, total)
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for _ in range(3):
        step(fast, args, total)
    gc.collect()

    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= before


def test_the_planned_model_is_the_model():
    """Same class, same parameters, same names; an evaluation without gradients runs the original."""
    model = Tied()
    args = tokens()
    fast = planned(model, args, lambda out: out[0], "free").apply(model)

    assert isinstance(fast, Tied)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        same([fast(*args)[1]], [model(*args)[1]])
        assert fast(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))[1].shape == (1, 3, 50)


def test_a_cumulative_batch_norm_is_refused():
    """momentum=None takes a number out of a buffer that changes with every step, which no one program can."""
    with pytest.raises(memplan.CaptureError, match=r"(?i)data"):
        planned(convolutions(momentum=None), images(), total, "free")


def test_inference_is_planned_too():
    """train=False: the forward pass alone, within a budget, gives the same outputs and no graph."""
    torch.manual_seed(0)
    model = layers(nn.GELU, times=4).eval()
    args = (rows(),)
    plan = memplan.plan(model, None, args, train=False, machine="h100-80gb")
    output = plan.apply(model)(*args)

    same([output], [model(*args).detach()])
    assert not output.requires_grad


def test_keyword_and_positional_arguments_are_one_call():
    """However the caller splits them, and refused when their values are others."""
    torch.manual_seed(0)
    model = Keywords()
    x = rows()
    fast = planned(model, (x,), None, "free", {"scale": 2.0}).apply(model)

    wanted = model(x, scale=2.0)["loss"]
    same([fast(x, scale=2.0)["loss"].detach(), fast(x=x, scale=2.0)["loss"].detach()], [wanted.detach()] * 2)
    with pytest.raises(PlanMismatch, match=r"^scale was 2\.0 .* is 3\.0 now"):
        fast(x, scale=3.0)
    with pytest.raises(PlanMismatch, match="a call with x, scale, and this one has x: "):
        fast(x)
    with pytest.raises(PlanMismatch, match=r"this one has x, pair\['left'\], pair\['right'\]\[0\], scale: "):
        fast(x, {"left": x, "right": [x]}, scale=2.0)
    with pytest.raises(PlanMismatch, match="arguments do not fit"):
        fast(x, nonsense=1)


def test_a_planned_forward_shows_the_models_arguments():
    """transformers' Trainer drops what of a batch is not among them."""
    model = Keywords()
    fast = planned(model, (rows(),), None, "free").apply(model)

    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert inspect.signature(copy.deepcopy(fast).forward) == inspect.signature(model.forward)


def gelu_net() -> tuple:
    """A planned model and its batch."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    args = (rows(),)
    return model, planned(model, args, total, "free").apply(model), args[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[:-1],
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: x[None],
        lambda x: x.clone().requires_grad_(),
        lambda x: None,
        lambda x: 3.0,
    ],
    ids=["rows", "dtype", "strides", "rank", "requires grad", "None", "number"],
)
def test_a_call_that_was_not_planned_for_is_refused(call):
    """Shapes, types, strides and gradients of inputs are part of the plan."""
    _, fast, x = gelu_net()

    with pytest.raises(PlanMismatch):
        fast(call(x))


def unfreeze(model):
    """Freeze a parameter."""
    model[0].weight.requires_grad_(False)


def reshape(model):
    """Give a layer another width."""
    model[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH + 1))


def retype(model):
    """Turn the model into another type."""
    model.double()


def evaluate(model):
    """Leave training mode in one place."""
    model[1].eval()


def lose(model):
    """Remove a bias."""
    model[2].bias = None


def append(model):
    """Add a layer."""
    model.append(nn.Linear(WIDTH, WIDTH))


def set_again(model):
    """Change a number that a module computes with."""
    model[1].approximate = "tanh"


def hook(model):
    """Change what a module returns."""
    model[1].register_forward_hook(lambda module, args, out: out * 0)


@pytest.mark.parametrize("change", [unfreeze, reshape, retype, evaluate, lose, append, set_again, hook])
@pytest.mark.parametrize("when", ["before apply", "after apply"])
def test_a_model_that_has_changed_is_refused(change, when):
    """A plan does not survive other layers, settings, shapes, types, modes, hooks, or other wishes for gradients."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    x = rows()
    plan = planned(model, (x,), total, "free")
    if when == "before apply":
        change(model)
        with pytest.raises(PlanMismatch):
            plan.apply(model)(x)
    else:
        fast = plan.apply(model)
        change(model)
        with pytest.raises(PlanMismatch):
            fast(x)


def test_another_model_of_the_same_parameters_is_traced_anew():
    """It does something else, by its classes or by a function that it holds, and is refused; an equal one is not."""
    x = rows()
    model = layers(nn.GELU)
    plan = planned(model, (x,), total, "free")
    with pytest.raises(PlanMismatch, match="does not trace"):
        plan.apply(layers(nn.Tanh))
    same([plan.apply(layers(nn.GELU))(x).sum().detach() * 0], [x.sum() * 0])
    squares, cubes = (Lambda(lambda m, x, power=power: m.a(x).pow(power), a=layers(nn.GELU)) for power in (2, 3))
    plan = planned(squares, (x,), total, "free")
    with pytest.raises(PlanMismatch, match="does not trace"):
        plan.apply(cubes)
    with pytest.raises(MemplanError, match=r"an nn\.Module, not a str"):
        plan.apply("model")


def test_weights_that_are_no_longer_tied_are_noticed():
    """Before the plan is applied and after it; the head has weights of its own then, which the plan would pass by."""
    model, _, args, loss = build("tied")
    plan = planned(model, args, loss, "free")
    fast = plan.apply(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(PlanMismatch, match=r"head\.weight was tied"):
        fast(*args)
    with pytest.raises(PlanMismatch, match="does not trace"):
        plan.apply(model)


def test_gradients_that_shall_be_differentiated_again_are_refused():
    """A penalty on gradients would count for nothing, without a word."""
    model, fast, x = gelu_net()
    with pytest.raises(MemplanError, match="create_graph=True"):
        torch.autograd.grad(total(fast(x)), list(model.parameters()), create_graph=True)


def test_a_forward_of_the_instance_alone_is_called_in_evaluations_too():
    """Some libraries wrap a model so."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    inner = model.forward
    model.forward = lambda x: inner(x) * 2
    x = rows()
    fast = planned(model, (x,), total, "free").apply(model)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(fast(x), wanted)
    assert torch.equal(fast(x).detach(), wanted)


def test_a_planned_model_says_what_to_save_instead():
    """Generated code names functions that cannot be pickled."""
    with pytest.raises(MemplanError, match=r"save its state_dict\(\)"):
        pickle.dumps(gelu_net()[1])


def test_a_random_op_that_fails_when_it_is_repeated_leaves_the_generator_as_it_was():
    """Whoever catches the error draws the numbers that come next."""

    def repeated():
        with drawing_from(saved):
            assert torch.equal(torch.rand(3), drawn)
            raise MemoryError

    torch.manual_seed(3)
    saved = get_state()
    drawn = torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(MemoryError):
        repeated()
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_dropout_draws_nothing():
    """So its repetition needs no generator's state, and its step can be recorded."""
    model, _, args, loss = build("attention")
    code = tight(model, args, loss).apply(model).forward.code
    assert code.states == 0


def test_a_submodule_replaced_after_planning_is_never_ignored():
    """Either the new module's parameters are used, or the call is refused; the old ones are wrong."""
    model, fast, x = gelu_net()
    model[0] = nn.Linear(WIDTH, WIDTH)
    try:
        found = fast(x)
    except PlanMismatch:
        return

    same([found.detach()], [model(x).detach()])


@pytest.mark.parametrize("arena", [False, True])
def test_an_output_that_is_dropped_is_gone(arena):
    """At once, although its own backward pass would have read it: no cycle waits for the garbage collector."""
    model, _, args, loss = build("gelu")
    model.append(nn.Tanh())
    planned = session_of(model, args, loss).plan(None, arena).apply(model)
    gc.collect()
    gc.disable()
    try:
        output = planned(*args)
        known = weakref.ref(output)
        del output
        assert known() is None
    finally:
        gc.enable()


def test_a_hook_of_the_model_runs_once():
    """A forward hook on the root, which was traced, is not applied to the traced result again."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    model.register_forward_hook(lambda module, args, out: out * 2)
    x = rows()
    fast = planned(model, (x,), total, "free").apply(model)

    same([fast(x).detach()], [model(x).detach()])


def test_a_parameter_changed_in_place_between_forward_and_backward_is_an_error():
    """Eager says so too; a wrong gradient would be worse."""
    model, fast, x = gelu_net()
    loss = total(fast(x))
    with torch.no_grad():
        model[0].weight.mul_(2.0)

    with pytest.raises(MemplanError, match="changed in place"):
        loss.backward()


def test_backward_twice_is_an_error():
    """What the first one read is gone."""
    _, fast, x = gelu_net()
    output = fast(x)
    total(output).backward()

    with pytest.raises(MemplanError, match="backward already"):
        total(output).backward()


@pytest.mark.filterwarnings("ignore::memplan.planner.ir.errors.BudgetWarning")
@pytest.mark.parametrize("budget", [None, "tight"])
def test_a_retained_graph_has_eagers_bits_again(budget):
    """Backward as often as one likes, with other losses of the same outputs; then the graph is given up."""
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())
    twin, x = copy.deepcopy(model), torch.randn(5, 8)
    fast = (tight(model, (x,), total) if budget else session_of(model, (x,), total).plan(None)).apply(model)
    for each in (fast, twin):
        torch.manual_seed(1)
        output = each(x)
        total(output).backward(retain_graph=True)
        (output.square().mean() * 3).backward(retain_graph=True)
        total(output * 2).backward()

    same([value.grad for value in model.parameters()], [value.grad for value in twin.parameters()])


def test_a_graph_that_cannot_be_retained_is_refused():
    """Its memory is used again."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(5, 8)
    fast = tight(model, (x,), total, {}, arena=True).apply(model)
    with pytest.raises(MemplanError, match=r"retain_graph=True\) of a step that was planned with arena=True"):
        total(fast(x)).backward(retain_graph=True)


def test_a_gradient_through_another_output_is_an_error():
    """With the loss in the model, the other outputs are planned as results, not as ways for gradients."""
    torch.manual_seed(0)
    model = Keywords()
    x = rows()
    fast = planned(model, (x,), None, "free").apply(model)
    output = fast(x)

    with pytest.raises((PlanMismatch, RuntimeError)):
        (output["loss"] + output["nested"][0].sum()).backward()


@pytest.mark.filterwarnings("ignore:a forward pass began before")
def test_two_forward_passes_before_their_backward_passes():
    """Two calls in flight do not disturb each other, even with recomputed dropout."""
    torch.manual_seed(0)
    model = layers(nn.GELU, lambda: nn.Dropout(0.3))
    other = copy.deepcopy(model)
    x, y = rows(), rows()
    fast = tight(model, (x,), total).apply(model)
    for net in (fast, other):
        torch.manual_seed(3)
        first, second = total(net(x)), total(net(y))
        first.backward()
        second.backward()

    same({n: p.grad for n, p in fast.named_parameters()}, {n: p.grad for n, p in other.named_parameters()})


def test_a_gradient_hook_and_a_frozen_loss_weight():
    """Hooks on parameters see the gradient; autograd.grad works as in eager."""
    torch.manual_seed(0)
    model = layers(nn.GELU)
    other = copy.deepcopy(model)
    x = rows()
    fast = tight(model, (x,), total).apply(model)
    seen = []
    fast[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    total(fast(x)).backward()
    wanted = torch.autograd.grad(total(other(x)), other[0].weight)[0]

    same(seen, [wanted])
    same([torch.autograd.grad(total(fast(x)), fast[0].weight)[0]], [wanted])


def test_models_that_return_their_input_or_a_view_of_it():
    """Either planned right or refused in words."""
    for function in (lambda m, x: (m.a(x), x), lambda m, x: (m.a(x), x[:2]), lambda m, x: (y := m.a(x), y.t())):
        torch.manual_seed(0)
        model = Lambda(function, a=layers(nn.GELU))
        x = rows()
        try:
            fast = planned(model, (x,), lambda out: total(out[0]), "free").apply(model)
        except memplan.CaptureError:
            continue
        same([leaf.detach() for leaf in fast(x)], [leaf.detach() for leaf in model(x)])


def test_a_deep_copy_of_a_planned_model_stands_on_its_own():
    """A copy computes with its own parameters, not with the original's, or copying is refused."""
    model, fast, x = gelu_net()
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    reference = copy.deepcopy(model)
    reference.load_state_dict(twin.state_dict())

    same([twin(x).detach()], [reference(x).detach()])
    same([fast(x).detach()], [model(x).detach()])


def test_the_peak_of_real_tensors_is_the_one_predicted():
    """Bytes of live storages, counted while the planned step runs, never exceed the prediction, and tight is tighter."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.storages = WeakIdKeyDictionary()
            self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.storages[leaf.untyped_storage()] = None
            sizes = {s.data_ptr(): s.nbytes() for s in self.storages if s.data_ptr() not in resident}
            self.peak = max(self.peak, sum(sizes.values()))
            return out

    torch.manual_seed(0)
    model = layers(nn.GELU, times=5)
    args = (rows(),)
    resident = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *args)}
    peaks = {}
    for budget in ("free", "tight"):
        plan = planned(model, args, lambda out: out.sum(), budget)
        fast = plan.apply(model)
        with Watch() as watch:
            fast(*args).sum().backward()
        model.zero_grad(set_to_none=True)
        peaks[budget] = watch.peak
        assert watch.peak + plan.program.resident_bytes <= plan.peak * 1.02 + 4096

    assert peaks["tight"] < 0.8 * peaks["free"]


@pytest.mark.parametrize(("kind", "told"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_a_plan_for_another_machine_says_whose_dropout_it_has(kind, told):
    """With 16 bits the CPU's eager mode draws otherwise than a GPU's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).to(kind)
    plan = memplan.plan(model, None, (torch.randn(8, 4, dtype=kind),), loss=torch.sum, machine="h100-80gb")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan.apply(model)
    assert [each.category for each in seen] == [MemplanWarning] * told

"""Blocks with the habits of real models: what forward reads, writes, draws, hooks, shares and repeats.

Each is a module from (batch, time, width) to the same. `poke` is what a user's script may change between two steps; `extra` is
what it may add to the loss. A block is built from a random generator, so that the same seed builds the same block twice.
"""

import functools
import random
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME, WIDTH = 6, 8
GLOBAL_TABLE = torch.linspace(0.5, 1.5, WIDTH)


class Quirk(nn.Module):
    """A block; most have one Linear."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def poke(self, rng: random.Random) -> None:
        """What a user changes between steps."""

    def extra(self) -> Tensor | None:
        """What a user's script reads after the call and adds to the loss."""
        return None


class Plain(Quirk):
    def forward(self, x):
        return x + F.gelu(self.lin(x))


class Twice(Quirk):
    def forward(self, x):
        return self.lin(torch.tanh(self.lin(x)))


class Loop(Quirk):
    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        out = []
        for step in range(x.shape[1]):
            h = torch.tanh(self.lin(x[:, step]) + self.lin(h))
            out.append(h)
        return torch.stack(out, 1)


class Norms(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.norm = nn.LayerNorm(WIDTH)
        self.batch = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.batch(self.norm(self.lin(x)).transpose(1, 2)).transpose(1, 2)


class Dropout(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.drop = nn.Dropout(rng.choice([0.0, 0.1, 0.5]))

    def forward(self, x):
        return self.drop(F.relu(self.lin(self.drop(x))))

    def poke(self, rng):
        if rng.random() < 0.3:
            self.drop.p = 0.3


class Tied(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.lin.weight
        if rng.random() < 0.5:
            self.other.bias = self.lin.bias

    def forward(self, x):
        return self.other(F.silu(self.lin(x)))


class OwnGetattr(Quirk):
    """As diffusers' models and peft's wrappers have it."""

    def __init__(self, rng):
        super().__init__(rng)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.inner.scale = 0.5

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x) * self.scale + self.lin(x)

    def poke(self, rng):
        if rng.random() < 0.5:
            self.inner.scale = 0.25


class OwnGetattribute(Quirk):
    def __getattribute__(self, name):
        return super().__getattribute__("_modules")["lin"] if name == "other" else super().__getattribute__(name)

    def forward(self, x):
        return self.other(x) * 0.5 + x


class Containers(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.parts = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b_c": nn.Linear(WIDTH, WIDTH)})
        self.many = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(3)])
        self.named = nn.ParameterDict({"x": nn.Parameter(torch.ones(WIDTH)), "y": nn.Parameter(torch.zeros(WIDTH))})

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        for each in self.many:
            x = x * each
        return x * self.named["x"] + self.named["y"]


class SharedModule(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.list = nn.ModuleList([self.lin, nn.ReLU(), self.lin])

    def forward(self, x):
        for part in self.list:
            x = part(x)
        return x


class PlainTable(Quirk):
    """A tensor that is no buffer, read through views."""

    def __init__(self, rng):
        super().__init__(rng)
        self.table = torch.linspace(0.1, 1.0, 2 * TIME * WIDTH).view(2 * TIME, WIDTH)
        self.how = rng.choice(["slice", "split", "unbind", "chunk", "whole", "transpose"])

    def forward(self, x):
        t = self.table
        if self.how == "slice":
            t = t[: x.shape[1]]
        elif self.how == "split":
            t = t.split(x.shape[1])[1]
        elif self.how == "chunk":
            t = t.chunk(2)[0]
        elif self.how == "unbind":
            t = torch.stack(t.unbind(0)[: x.shape[1]])
        elif self.how == "transpose":
            t = t.t()[:, : x.shape[1]].t()
        else:
            t = t.mean(0)
        return self.lin(x) * t


class LazyTable(Quirk):
    """Rotary positions, say: built on first use, and again for longer inputs."""

    def __init__(self, rng):
        super().__init__(rng)
        self.n, self.t = 0, None
        self.own = rng.random() < 0.5

    def forward(self, x):
        if self.n < x.shape[1]:
            steps = torch.arange(x.shape[1], dtype=torch.float32)
            self.t, self.n = torch.cos(steps)[:, None].expand(-1, WIDTH), x.shape[1]
        return self.lin(x) * self.t[: x.shape[1]]


class LazyBuffer(Quirk):
    def forward(self, x):
        if "table" not in self._buffers:
            self.register_buffer("table", torch.arange(x.shape[1], dtype=torch.float32)[:, None] / 10)
        return self.lin(x) + self.table


class RegistersEachCall(Quirk):
    def forward(self, x):
        y = self.lin(x)
        self.register_buffer("last_mean", y.detach().mean(), persistent=False)
        return y


class BufferRebound(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.register_buffer("n", torch.tensor(1.0))
        self.register_buffer("running", torch.zeros(WIDTH))
        self.how = rng.choice(["rebind", "inplace", "data", "copy"])

    def forward(self, x):
        y = self.lin(x) * (1 + 0.1 * self.n)
        with torch.no_grad():
            mean = y.mean((0, 1))
            if self.how == "rebind":
                self.n = self.n + 1
                self.running = 0.9 * self.running + 0.1 * mean
            elif self.how == "inplace":
                self.n += 1
                self.running.mul_(0.9).add_(mean, alpha=0.1)
            elif self.how == "data":
                self.n.data = self.n.data + 1
                self.running.data.copy_(0.9 * self.running + 0.1 * mean)
            else:
                self.n.copy_(self.n + 1)
                self.running[:] = mean
        return y + self.running


class Momentum(Quirk):
    """A key encoder that follows the query encoder, as MoCo and BYOL have it."""

    def __init__(self, rng):
        super().__init__(rng)
        self.key = nn.Linear(WIDTH, WIDTH)
        for own, other in zip(self.key.parameters(), self.lin.parameters(), strict=True):
            own.data.copy_(other.data)
            own.requires_grad = False
        self.how = rng.choice(["data", "inplace", "data_mul"])

    def forward(self, x):
        with torch.no_grad():
            for own, other in zip(self.key.parameters(), self.lin.parameters(), strict=True):
                if self.how == "data":
                    own.data = own.data * 0.9 + other.data * 0.1
                elif self.how == "inplace":
                    own.mul_(0.9).add_(other, alpha=0.1)
                else:
                    own.data.mul_(0.9).add_(other.data * 0.1)
            k = self.key(x)
        return self.lin(x) * k


class ChangesItsWeight(Quirk):
    def forward(self, x):
        with torch.no_grad():
            self.lin.weight.data = self.lin.weight.data.clamp(-0.3, 0.3)
        return self.lin(x)


class StoresAux(Quirk):
    """A router's loss: stored by forward, added by the script."""

    def __init__(self, rng):
        super().__init__(rng)
        self.where = rng.choice(["attribute", "dict", "list", "object"])
        self.box: Any = {"dict": {}, "list": [], "object": types.SimpleNamespace(aux=None)}.get(self.where)
        self.reads = rng.random() < 0.5

    def forward(self, x):
        y = self.lin(x)
        aux = y.float().pow(2).mean()
        if self.where == "attribute":
            self.aux = aux
        elif self.where == "dict":
            self.box["aux"] = aux
        elif self.where == "list":
            self.box[:] = [aux]
        else:
            self.box.aux = aux
        return F.relu(y)

    def extra(self):
        if not self.reads:
            return None
        if self.where == "attribute":
            return self.aux
        return {"dict": lambda: self.box["aux"], "list": lambda: self.box[0], "object": lambda: self.box.aux}[self.where]()


class KeepsActivation(Quirk):
    """Detached values for a script that looks at them."""

    def __init__(self, rng):
        super().__init__(rng)
        self.seen: list[Tensor] = []
        self.last = {"x": None}

    def forward(self, x):
        y = self.lin(x)
        self.seen.append(y.detach().mean())
        self.last["x"] = y.detach()
        return y


class Counts(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.calls = 0
        self.decides = rng.random() < 0.5

    def forward(self, x):
        self.calls += 1
        y = self.lin(x)
        return y * 2 if self.decides and self.calls > 1 else y


class RemembersShape(Quirk):
    def forward(self, x):
        self.last_shape = tuple(x.shape)
        self.size = x.shape[1]
        return self.lin(x)


class HoldsObject(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.state = types.SimpleNamespace(t=torch.ones(WIDTH), k=0, log=[])
        self.writes = rng.random() < 0.5

    def forward(self, x):
        y = self.lin(x) * self.state.t
        if self.writes:
            self.state.t = y.detach().mean((0, 1))
        return y


class NewParameter(Quirk):
    def forward(self, x):
        y = self.lin(x)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        return y * self.scale


class ReadsFlag(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.flag, self.tau = rng.random() < 0.5, 0.7
        self.config = types.SimpleNamespace(scale=1.5, names=["a"], inner=types.SimpleNamespace(on=True))
        self.settings = {"gain": 2.0, "list": [1, 2]}
        self.what = rng.choice(["flag", "tau", "config", "inner", "settings", "list", "class", "none"])

    gain_of_class = 1.25

    def forward(self, x):
        y = self.lin(x) / self.tau * self.config.scale * self.settings["gain"] * self.gain_of_class
        y = y * sum(self.settings["list"])
        if self.flag:
            y = F.relu(y)
        return y if self.config.inner.on else -y

    def poke(self, rng):
        if self.what == "flag":
            self.flag = not self.flag
        elif self.what == "tau":
            self.tau = 0.9
        elif self.what == "config":
            self.config.scale = 0.5
        elif self.what == "inner":
            self.config.inner.on = False
        elif self.what == "settings":
            self.settings["gain"] = 3.0
        elif self.what == "list":
            self.settings["list"].append(3)
        elif self.what == "class":
            self.gain_of_class = 0.75


class ReadsTraining(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.part = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
        self.when = rng.random() < 0.5

    def forward(self, x):
        return self.part(x) + (self.lin(x) if self.part.training else x)

    def poke(self, rng):
        if self.when:
            self.part.eval()


class Freezes(Quirk):
    """A parameter is frozen, or thawed, between two steps."""

    def __init__(self, rng):
        super().__init__(rng)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.when = rng.random() < 0.5
        if rng.random() < 0.5:
            self.other.weight.requires_grad_(False)

    def forward(self, x):
        return self.other(torch.tanh(self.lin(x)))

    def poke(self, rng):
        if self.when:
            self.other.weight.requires_grad_(not self.other.weight.requires_grad)


class ReplacesLayer(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.when = rng.choice(["layer", "parameter", "value", "no"])

    def forward(self, x):
        return self.lin(x)

    def poke(self, rng):
        torch.manual_seed(7)
        if self.when == "layer":
            self.lin = nn.Linear(WIDTH, WIDTH)
        elif self.when == "parameter":
            self.lin.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        elif self.when == "value":
            with torch.no_grad():
                self.lin.weight.mul_(1.5)


class LayerDrop(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.by = rng.choice(["random", "numpy", "torch", "generator"])
        self.generator = np.random.default_rng(3)

    def forward(self, x):
        draw = {"random": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(()).item(),
                "generator": self.generator.random}[self.by]()  # fmt: skip
        return x if draw < 0.5 else self.lin(x)


class Checkpointed(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(rng.choice([0.0, 0.2])), nn.Linear(WIDTH, WIDTH)
        )
        self.reentrant = rng.random() < 0.5
        self.how = rng.choice(["function", "module", "sequential"])

    def forward(self, x):
        if self.how == "sequential":
            return torch.utils.checkpoint.checkpoint_sequential(self.mlp, 2, x, use_reentrant=self.reentrant)
        call = checkpoint if self.how == "function" else torch.utils.checkpoint.checkpoint
        return call(self.mlp, x, use_reentrant=self.reentrant) + self.lin(x)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor * 2, None


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * torch.sigmoid(x * w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        s = torch.sigmoid(x * w)
        to_x = grad * (s + x * w * s * (1 - s)) if ctx.needs_input_grad[0] else None
        to_w = (grad * x * x * s * (1 - s)).sum((0, 1)) if ctx.needs_input_grad[1] else None
        return to_x, to_w


class HandCheckpoint(torch.autograd.Function):
    """As frameworks wrote it before torch had it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            out = ctx.run(inner)
        torch.autograd.backward(out, grad)
        return None, inner.grad


class Functions(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.w = nn.Parameter(torch.ones(WIDTH))
        self.how = rng.choice(["scale", "swish", "frozen", "hand"])
        if self.how == "frozen":
            self.w.requires_grad_(False)

    def forward(self, x):
        if self.how == "scale":
            return Scale.apply(self.lin(x), 0.7) * self.w
        if self.how == "hand":
            return HandCheckpoint.apply(self.lin, x) * self.w
        return Swish.apply(self.lin(x), self.w)


@torch.library.custom_op("fuzzing::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) + 0.5)


@noisy.register_fake
def _(x):
    return torch.empty_like(x)


noisy.register_autograd(lambda ctx, grad: grad * 0.5, setup_context=lambda ctx, inputs, output: None)


@torch.library.custom_op("fuzzing::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x * x * x


@cube.register_fake
def _(x):
    return torch.empty_like(x)


cube.register_autograd(
    lambda ctx, grad: 3 * grad * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class CustomOps(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.op = rng.choice([noisy, cube])

    def forward(self, x):
        return torch.tanh(self.op(self.lin(x)))


class Hooked(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.kept: dict[str, Tensor] = {}
        self.seen: list[float] = []
        ways = ["observe", "change", "pre", "backward", "tensor", "parameter", "accumulated"]
        self.how = rng.choice([*ways, "look", "look back", "look at a tensor"])
        if self.how == "observe":
            self.lin.register_forward_hook(self.observe)
        elif self.how == "change":
            self.lin.register_forward_hook(lambda module, args, out: out * 2)
        elif self.how == "pre":
            self.lin.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        elif self.how == "backward":
            self.lin.register_full_backward_hook(lambda module, given, taken: (given[0] * 0.5,))
        elif self.how == "look":
            self.lin.register_forward_hook(lambda module, args, out: self.seen.append(out.sum().item()))
        elif self.how == "look back":
            self.lin.register_full_backward_hook(lambda module, given, taken: self.seen.append(taken[0].sum().item()))
        elif self.how == "parameter":
            self.lin.weight.register_hook(lambda grad: grad * 3)
        elif self.how == "accumulated":
            self.lin.weight.register_post_accumulate_grad_hook(self.halve)

    @staticmethod
    def halve(parameter):
        parameter.grad.mul_(0.5)

    def observe(self, module, args, out):
        self.kept["out"] = out

    def forward(self, x):
        y = self.lin(x)
        if self.how == "tensor" and y.requires_grad:
            y.register_hook(lambda grad: grad * 0.5)
        if self.how == "look at a tensor" and y.requires_grad:
            y.register_hook(lambda grad: self.seen.append(grad.sum().item()))
        return torch.tanh(y)


class SavedHooks(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.how = rng.choice(["half", "cpu"])

    def forward(self, x):
        if self.how == "cpu":
            context = torch.autograd.graph.save_on_cpu()
        else:
            context = torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float())
        with context:
            return torch.tanh(self.lin(x)).exp()


class PartlyNoGrad(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.teacher = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.how = rng.choice(["no_grad", "detach", "set"])

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                t = self.teacher(x)
        elif self.how == "detach":
            t = self.teacher(x).detach()
        else:
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            t = self.teacher(x)
            torch.set_grad_enabled(before)
        return self.lin(x) * torch.sigmoid(t)


class Attention(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.p, self.causal = rng.choice([0.0, 0.3]), rng.random() < 0.5

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=self.causal)
        return self.lin(y.transpose(1, 2).flatten(2))


class MultiHead(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=rng.choice([0.0, 0.2]), batch_first=True)
        self.weights = rng.random() < 0.5

    def forward(self, x):
        return self.lin(self.attention(x, x, x, need_weights=self.weights)[0])


class Recurrent(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        kind = rng.choice([nn.LSTM, nn.RNN])
        self.rnn = kind(WIDTH, WIDTH, num_layers=rng.choice([1, 2]), batch_first=True)

    def forward(self, x):
        return self.lin(self.rnn(x)[0])


class Conv(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=rng.choice([1, 2, WIDTH]))

    def forward(self, x):
        return self.lin(self.conv(x.transpose(1, 2)).transpose(1, 2))


class InPlace(Quirk):
    def forward(self, x):
        y = self.lin(x)
        y = F.relu_(y) * 2
        y += 1
        y[:, 0] = 0.5
        return y.mul_(0.5)


class ChangesInput(Quirk):
    def forward(self, x):
        y = x.clone()
        y[..., 0].add_(1.0)
        return self.lin(y)


class Normed(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.how = rng.choice(["spectral", "old_spectral", "weight", "old_weight", "orthogonal"])
        if self.how == "spectral":
            self.lin = nn.utils.parametrizations.spectral_norm(self.lin)
        elif self.how == "old_spectral":
            self.lin = nn.utils.spectral_norm(self.lin)
        elif self.how == "weight":
            self.lin = nn.utils.parametrizations.weight_norm(self.lin)
        elif self.how == "old_weight":
            self.lin = nn.utils.weight_norm(self.lin)
        else:
            self.lin = nn.utils.parametrizations.orthogonal(self.lin)

    def forward(self, x):
        return self.lin(torch.tanh(self.lin(x)))


class OwnGenerator(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator)
        return torch.tanh(self.lin(x)) * noise


class Noise(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.how = rng.choice(["randn", "bernoulli", "uniform_", "normal_", "gumbel", "multinomial", "rrelu", "alpha"])

    def forward(self, x):
        y = self.lin(x)
        if self.how == "randn":
            return y + torch.randn_like(y)
        if self.how == "bernoulli":
            return y * torch.bernoulli(torch.sigmoid(y.detach()))
        if self.how == "uniform_":
            return y * torch.empty_like(y).uniform_(0.5, 1.5)
        if self.how == "normal_":
            return y + torch.zeros_like(y).normal_()
        if self.how == "gumbel":
            return F.gumbel_softmax(y, hard=True)
        if self.how == "multinomial":
            return y * torch.multinomial(torch.softmax(y.detach().flatten(0, 1), -1), 1).view(*y.shape[:2], 1)
        if self.how == "rrelu":
            return F.rrelu(y, training=self.training)
        return F.alpha_dropout(y, 0.2, self.training)


class AsksForANumber(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.how = rng.choice(["item", "branch", "nonzero"])

    def forward(self, x):
        y = self.lin(x)
        if self.how == "item":
            return y * y.detach().abs().max().item()
        if self.how == "branch":
            return y if y.sum() > 0 else -y
        return y + x[x > 0].sum()


class HiddenModule(Quirk):
    """Layers in a plain list are none of the model's."""

    def __init__(self, rng):
        super().__init__(rng)
        self.hidden = [nn.Linear(WIDTH, WIDTH)]
        self.trains = rng.random() < 0.5
        self.hidden[0].requires_grad_(self.trains)

    def forward(self, x):
        return self.lin(self.hidden[0](x))


class ViewOfParameter(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.where = rng.choice(["forward", "data", "detached"])
        self.held = self.lin.weight.data[:4] if self.where == "data" else self.lin.weight.detach()

    def forward(self, x):
        w = self.lin.weight[:4] if self.where == "forward" else self.held[:4]
        return self.lin(x) + (x @ w.t()).repeat(1, 1, 2)


class Callables(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.act = rng.choice([F.relu, torch.tanh, functools.partial(F.gelu, approximate="tanh"), lambda x: x * 0.5])
        self.call = self.lin.forward

    def forward(self, x):
        return self.act(self.call(x)) + GLOBAL_TABLE

    def poke(self, rng):
        if rng.random() < 0.3:
            self.act = torch.sigmoid


class ReplacedForward(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        inner = self.lin.forward
        self.lin.forward = lambda x: inner(x) * 2

    def forward(self, x):
        return self.lin(x)


class Autocast(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.cache = rng.random() < 0.7

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=self.cache):
            y = self.lin(F.relu(self.lin(x)))
        return y.float()


class Shapes(Quirk):
    def __init__(self, rng):
        super().__init__(rng)
        self.how = rng.choice(
            ["einsum", "fft", "topk", "cumsum", "gather", "put", "unbind", "pad", "complex", "roll", "scatter"]
        )

    def forward(self, x):
        y = self.lin(x)
        if self.how == "einsum":
            return torch.einsum("btd,bsd,bsk->btk", y, y, x) / 10
        if self.how == "fft":
            return torch.fft.irfft(torch.fft.rfft(y), n=WIDTH)
        if self.how == "topk":
            return y.topk(4, -1)[0].repeat(1, 1, 2)
        if self.how == "cumsum":
            return y.cumsum(1) + y.sort(-1)[0]
        if self.how == "gather":
            return y.gather(1, torch.zeros(y.shape, dtype=torch.long)) + y
        if self.how == "put":
            z = torch.zeros_like(y)
            z[:, torch.tensor([0, 2, 2])] = y[:, :3]
            return z + y
        if self.how == "unbind":
            return torch.stack([part * index for index, part in enumerate(y.unbind(1))], 1)
        if self.how == "pad":
            return F.pad(y, (0, 0, 1, 0))[:, :-1] + y
        if self.how == "complex":
            pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2))
            turn = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2).float())
            return torch.view_as_real(pairs * turn).flatten(2)
        if self.how == "roll":
            return y.roll(1, 1).flip(2)
        return torch.zeros_like(y).scatter_add(2, torch.zeros(y.shape, dtype=torch.long), y) + y


class ManyUses(Quirk):
    """A weight used by ops of several kinds, with a penalty on it."""

    def forward(self, x):
        y = self.lin(x) + x @ self.lin.weight + x * self.lin.bias
        return y + self.lin.weight.pow(2).sum() * 0.01


QUIRKS = [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, Quirk) and kind is not Quirk]

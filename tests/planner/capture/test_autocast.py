"""Under autocast a planned model has eager's bits where a weight is used several times, or is refused in words."""

import copy
from contextlib import nullcontext

import memplan
import pytest
import torch
from memplan.planner.ir.errors import CaptureError
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM

pytestmark = pytest.mark.usefixtures("hasty")


class Says(nn.Module):
    """A model whose forward is a function of itself and its input."""

    def __init__(self, function, **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def thrice(model, x):
    """One layer used three times."""
    for _ in range(3):
        x = torch.tanh(model.layer(x))
    return x


def checkpointed(model, x):
    """The same, recomputed by torch."""
    for _ in range(3):
        x = checkpoint(lambda value: torch.tanh(model.layer(value)), x, use_reentrant=False)
    return x


def tied(model, tokens):
    """A weight read in 32 bits by an embedding, twice, and whole, in part and again in 16."""
    weight = model.embed.weight
    x = model.embed(tokens)
    for _ in range(3):
        x = torch.tanh(F.linear(x, weight[:16])) + torch.tanh(F.linear(x, weight))[..., :16]
    return F.linear(x, weight) + F.linear(model.embed(tokens), weight)


def two_names(model, x):
    """A weight that two modules share."""
    return model.layer(torch.tanh(model.other(torch.tanh(model.layer(x)))))


def mixed(model, x):
    """A part in 32 bits, whose gradients are too: `backward()` is called outside of autocast."""
    x = torch.tanh(model.layer(x))
    with torch.autocast("cpu", enabled=False):
        return model.layer(torch.tanh(model.layer(x.float())))


def recurrent(model, x):
    """An LSTM called twice."""
    return model.lstm(model.lstm(x)[0])[0]


def itself(model, x):
    """A model that casts its weight beside autocast."""
    weight = model.layer.weight
    x = x.bfloat16() @ weight.to(torch.bfloat16)
    return model.layer(model.layer(x @ weight.bfloat16()))


def regions(model, x):
    """Autocast of the model's own."""
    with torch.autocast("cpu", torch.bfloat16):
        x = thrice(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        return thrice(model, x)


def layer() -> nn.Module:
    """Of the width of `X`."""
    return nn.Linear(32, 32)


X = torch.randn(8, 32, generator=(SEED := torch.Generator().manual_seed(0)))
X = X * torch.exp(2 * torch.randn(8, 32, generator=SEED))  # of many magnitudes, so that the order of sums is seen
CASES = {
    "thrice": (lambda: Says(thrice, layer=layer()), X),
    "checkpointed": (lambda: Says(checkpointed, layer=layer()), X),
    "tied": (lambda: Says(tied, embed=nn.Embedding(50, 16)), torch.arange(32).view(4, 8)),
    "two names": (lambda: Says(two_names, layer=layer(), other=layer()), X),
    "mixed": (lambda: Says(mixed, layer=layer()), X),
    "recurrent": (lambda: Says(recurrent, lstm=nn.LSTM(32, 32, 2)), X.view(2, 4, 32)),
    "itself": (lambda: Says(itself, layer=layer()), X),
    "regions": (lambda: Says(regions, layer=layer()), X),
}


def total(output):
    """A loss."""
    return output.float().sin().sum()


def compare(name: str, cache: bool, around: bool = True) -> None:
    """Plan a case, run it beside the eager model, and hold the two together bit for bit."""
    make, x = CASES[name]
    torch.manual_seed(0)
    one = make()
    if name == "two names":
        one.other.weight = one.layer.weight
    other = copy.deepcopy(one)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache) if around else nullcontext():
        fast = memplan.plan(one, None, (x,), loss=total, machine="h100-80gb", allow=()).apply(one)
        outputs = fast(x), other(x)
    assert torch.equal(*outputs)
    for output in outputs:
        total(output).backward()
    for parameter, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["thrice", "checkpointed", "tied", "two names", "recurrent"])
def test_a_weight_used_several_times(name, cache):
    """With autocast's cache its gradients are added up in 16 bits and cast once; without, cast and added up in 32."""
    compare(name, cache)


@pytest.mark.parametrize("name", ["mixed", "itself"])
def test_casts_of_another_kind_without_the_cache(name):
    """Nothing is kept, so nothing is merged."""
    compare(name, cache=False)


@pytest.mark.parametrize(("name", "around"), [("itself", True), ("regions", False)])
def test_what_cannot_be_told_apart_is_refused(name, around):
    """The message says how to plan it."""
    with pytest.raises(CaptureError, match="cache_enabled=False"):
        compare(name, cache=True, around=around)


def test_albert():
    """All its layers are one."""
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=50, hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=2,
                          intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    one = AlbertForMaskedLM(config)
    other, ids = copy.deepcopy(one), torch.randint(0, 50, (2, 8))
    call = {"input_ids": ids, "labels": ids}
    with torch.autocast("cpu", torch.bfloat16):
        fast = memplan.plan(one, None, kwargs=call, machine="h100-80gb", allow=()).apply(one)
        losses = fast(**call).loss, other(**call).loss
    for loss in losses:
        loss.backward()
    grads = [[value.grad for value in model.parameters() if value.grad is not None] for model in (one, other)]
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

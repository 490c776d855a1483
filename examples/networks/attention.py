"""The base Transformer, and ViT-B/16.

Attention is written out, with its scores and their softmax as tensors of their own, since a fused one hides them from a
planner that maps a network onto a machine without such a kernel.
"""

import math

import torch
from blocks import Built, image, ready
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, or to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """Width taken apart into heads: batch, heads, length, width of a head."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(other)), self.split(self.value(other))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def feed_forward(width: int, act: nn.Module) -> nn.Sequential:
    """Two layers with four times the width between them."""
    return nn.Sequential(nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width))


class Layer(nn.Module):
    """A layer of the Transformer: normalised after each addition; a decoder's also attends to the encoder's output."""

    def __init__(self, width: int, heads: int, decoder: bool):
        super().__init__()
        self.own, self.own_norm = Attention(width, heads), nn.LayerNorm(width)
        self.cross, self.cross_norm = (Attention(width, heads), nn.LayerNorm(width)) if decoder else (None, None)
        self.wide, self.wide_norm = feed_forward(width, nn.ReLU()), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.own_norm(x + self.own(x, x, mask))
        if self.cross is not None:
            x = self.cross_norm(x + self.cross(x, memory))
        return self.wide_norm(x + self.wide(x))


class Transformer(nn.Module):
    """Encoder and decoder, with one embedding for both and for the output."""

    def __init__(self, layers: int, width: int, heads: int, words: int, length: int):
        super().__init__()
        self.width = width
        self.words = nn.Parameter(torch.randn(words, width) / math.sqrt(width))
        self.encoder = nn.ModuleList(Layer(width, heads, decoder=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, decoder=True) for _ in range(layers))
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        self.register_buffer("future", torch.full((length, length), -math.inf).triu(1))

    def embed(self, ids: Tensor) -> Tensor:
        """Words and where they are."""
        return nn.functional.embedding(ids, self.words) * math.sqrt(self.width) + self.positions

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.embed(source), self.embed(target)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, memory, self.future)
        return nn.functional.linear(x, self.words)


def transformer() -> Built:
    """The base model: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), table 3.

    Takes token ids, 128 of the source and 128 of the target, from a vocabulary of 37 000, and gives the logits of the
    words that follow. Its projections have biases, of which the paper does not speak.
    """
    words, length = 37_000, 128
    source, target = (torch.randint(words, (1, length)) for _ in range(2))
    return ready(Transformer(6, 512, 8, words, length), source, target)


class PreNormLayer(nn.Module):
    """A layer of the vision transformer: normalised before each branch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.wide = nn.Sequential(nn.LayerNorm(width), feed_forward(width, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal)
        return x + self.wide(x)


class VisionTransformer(nn.Module):
    """Patches of an image and one token for its class, through a transformer's encoder."""

    def __init__(self, layers: int, width: int, heads: int, patch: int, size: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) / 50)
        self.layers = nn.Sequential(*(PreNormLayer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


def vit_b_16() -> Built:
    """ViT-B/16: Dosovitskiy et al., An Image Is Worth 16x16 Words (arXiv 2010.11929), table 1."""
    return ready(VisionTransformer(12, 768, 12, 16, 224), image())

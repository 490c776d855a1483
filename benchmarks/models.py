"""The models that are measured: real architectures built from configurations, so nothing is downloaded.

A factory returns `(model, args)`, and `model(*args)` is a scalar loss. Those for the CPU are sized so that an unplanned
step needs a few hundred MiB and takes a second or so on two cores; each has a tiny version, for smoke tests. Shapes
are on the meta device and take no memory at all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Made = tuple[nn.Module, tuple[Tensor, ...]]
PLAIN_BLOCKS = ("ResNetBottleNeckLayer", "ConvNextLayer", "UNetBlock")  # where transformers has no switch


class Scalar(nn.Module):
    """A transformers model as a function from tensors to its loss."""

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).loss


# Language


def gpt2(layers: int = 12, width: int = 256, heads: int = 4, vocab: int = 4096, batch: int = 8, seq: int = 256) -> Made:
    """GPT-2, dropout on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=max(seq, 1024), use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return causal(GPT2LMHeadModel(config), vocab, batch, seq)


def llama(layers: int = 8, width: int = 512, inner: int | None = None, batch: int = 2, seq: int = 512) -> Made:
    """Llama with four query heads to a key's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner or 4 * width, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=16384, use_cache=False,
    )  # fmt: skip
    return causal(LlamaForCausalLM(config), 16384, batch, seq)


def qwen2(layers: int = 12, width: int = 384, batch: int = 4, seq: int = 256) -> Made:
    """Qwen2: grouped queries, SwiGLU, biases on queries, keys and values, tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=3 * width, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=8192, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return causal(Qwen2ForCausalLM(config), 8192, batch, seq)


def causal(model: nn.Module, vocab: int, batch: int, seq: int) -> Made:
    """A causal language model with random tokens that are their own labels."""
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    ids = torch.randint(vocab, (batch, seq))
    return Scalar(model.train(), "input_ids", "labels"), (ids, ids.clone())


def bert(layers: int = 8, width: int = 256, batch: int = 16, seq: int = 128) -> Made:
    """BERT, masked language model."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=4, intermediate_size=4 * width, vocab_size=8192
    )
    ids = torch.randint(8192, (batch, seq))
    return Scalar(BertForMaskedLM(config).train(), "input_ids", "labels"), (ids, ids.clone())


def t5(layers: int = 6, width: int = 256, batch: int = 8, seq: int = 128) -> Made:
    """T5: an encoder and a decoder, attention with learned biases."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=layers, num_decoder_layers=layers, d_model=width, d_kv=64, d_ff=4 * width, num_heads=4,
        vocab_size=8192, decoder_start_token_id=0, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    ids, labels = torch.randint(1, 8192, (batch, seq)), torch.randint(1, 8192, (batch, seq))
    return Scalar(T5ForConditionalGeneration(config).train(), "input_ids", "labels"), (ids, labels)


# Images


def images(model: nn.Module, batch: int, size: int, classes: int = 100) -> Made:
    """An image classifier with random images."""
    pixels, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    return Scalar(model.train(), "pixel_values", "labels"), (pixels, labels)


def vit(layers: int = 8, width: int = 256, heads: int = 4, batch: int = 16, classes: int = 100) -> Made:
    """ViT with patches of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        num_labels=classes,
    )  # fmt: skip
    return images(ViTForImageClassification(config), batch, 224, classes)


def resnet50(batch: int = 8, size: int = 160, classes: int = 100, depths: tuple[int, ...] = (3, 4, 6, 3)) -> Made:
    """ResNet-50, whose BatchNorm changes its buffers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_labels=classes, depths=list(depths))
    return images(ResNetForImageClassification(config), batch, size, classes)


def convnext(batch: int = 8, size: int = 160, width: int = 64, depths: tuple[int, ...] = (3, 3, 9, 3)) -> Made:
    """ConvNeXt: depthwise convolutions, layers of wide products, drop path."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = [width * scale for scale in (1, 2, 4, 8)]
    config = ConvNextConfig(num_labels=100, hidden_sizes=sizes, depths=list(depths), drop_path_rate=0.1)
    return images(ConvNextForImageClassification(config), batch, size)


class UNetBlock(nn.Module):
    """Two convolutions with group norm and SiLU, and a residual connection."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.second = nn.Sequential(
            nn.GroupNorm(8, outside), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outside, outside, 3, padding=1)
        )
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x))


class UNet(nn.Module):
    """A U-Net that denoises images: activations of the way down are needed on the way up."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.enter = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(UNetBlock(a, b) for a, b in pairwise((widths[0], *widths)))
        self.middle = UNetBlock(widths[-1], widths[-1])
        self.up = nn.ModuleList(UNetBlock(2 * a, b) for a, b in pairwise((*reversed(widths), widths[0])))
        self.leave = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        x, kept = self.enter(noisy), []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return F.mse_loss(self.leave(x), noise)


def unet(widths: tuple[int, ...] = (32, 64, 128, 256), batch: int = 4, size: int = 128) -> Made:
    """A U-Net in plain torch."""
    return UNet(widths).train(), (torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size))


FIVE: dict[str, Callable[..., Made]] = {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit, "resnet50": resnet50}
MODELS = FIVE | {"qwen2": qwen2, "t5": t5, "convnext": convnext, "unet": unet}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 3, "width": 64, "batch": 4, "seq": 128},
    "llama": {"layers": 2, "width": 128, "batch": 2, "seq": 64},
    "bert": {"layers": 2, "width": 64, "batch": 4, "seq": 64},
    "vit": {"layers": 2, "width": 64, "batch": 2},
    "resnet50": {"batch": 2, "size": 64, "depths": (1, 1, 1, 1)},
    "qwen2": {"layers": 2, "width": 96, "batch": 2, "seq": 64},
    "t5": {"layers": 2, "width": 64, "batch": 2, "seq": 32},
    "convnext": {"batch": 2, "size": 64, "width": 16, "depths": (1, 1, 2, 1)},
    "unet": {"widths": (16, 32), "batch": 2, "size": 32},
}


def build(name: str) -> Made:
    """A model of `MODELS` by name, with weights and inputs from seed 0; `gpt2:tiny` for the tiny version."""
    base, _, version = name.partition(":")
    torch.manual_seed(0)
    return MODELS[base](**(TINY[base] if version == "tiny" else {}))


# Models for one GPU


def gpu_gpt2(layers: int, width: int, heads: int, batch: int) -> Made:
    """GPT-2 of a published size at its full context."""
    return gpt2(layers=layers, width=width, heads=heads, vocab=50257, batch=batch, seq=1024)


def gpu_llama(batch: int) -> Made:
    """The shape of Llama 3.2 1B, with a vocabulary of 32000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=8192, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return causal(LlamaForCausalLM(config), 32000, batch, 2048)


# name -> (factory, batch, element type)
GPU: dict[str, tuple[Callable[[int], Made], int, str]] = {
    "gpt2-124m": (partial(gpu_gpt2, 12, 768, 12), 16, "bfloat16"),
    "gpt2-355m": (partial(gpu_gpt2, 24, 1024, 16), 8, "bfloat16"),
    "llama-1b": (gpu_llama, 4, "bfloat16"),
    "vit-b": (lambda batch: vit(layers=12, width=768, heads=12, batch=batch, classes=1000), 128, "bfloat16"),
    "resnet50": (lambda batch: resnet50(batch=batch, size=224, classes=1000), 128, "float32"),
}


def build_gpu(name: str, device: str, scale: float = 1.0) -> Made:
    """A model of `GPU` on its device; `scale` multiplies the batch. `gpt2:tiny`, of `MODELS`, is for smoke tests."""
    if name in GPU:
        factory, batch, element = GPU[name]
        torch.manual_seed(0)
        model, args = factory(max(1, int(batch * scale)))
    else:
        (model, args), element = build(name), "float32"
    dtype = getattr(torch, element)
    args = tuple((value.to(dtype) if value.is_floating_point() else value).to(device) for value in args)
    return model.to(device=device, dtype=dtype), args


# Shapes of any length, and without storage

# name -> layers, width, heads, key heads, inner width
SHAPES = {
    "llama-tiny": (2, 128, 4, 2, 512),
    "llama-1b": (16, 2048, 32, 8, 8192),
    "llama-7b": (32, 4096, 32, 32, 11008),
}


def llama_shape(layers: int, width: int, heads: int, key_heads: int, inner: int, seq: int = 8192, device: str = "meta") -> Made:
    """A Llama in bfloat16, one sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=32000, max_position_embeddings=seq, use_cache=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    known = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # made so, not converted: twice the bytes may not fit
    try:
        with torch.device(device):
            return causal(LlamaForCausalLM(config), 32000, 1, seq)
    finally:
        torch.set_default_dtype(known)


class GPTBlock(nn.Module):
    """A block as Megatron-LM has it: norm, attention, norm, two linear layers with GeLU between; no dropout."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.after, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class LongGPT(nn.Module):
    """MEMO's GPT (arXiv 2407.12117, section 5): the loss is taken in pieces of the sequence, for the logits are large."""

    def __init__(self, layers: int, width: int, heads: int, vocab: int, pieces: int):
        super().__init__()
        self.pieces = pieces
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(ids)))
        parts = zip(x.chunk(self.pieces, dim=1), labels.chunk(self.pieces, dim=1), strict=True)
        losses = [F.cross_entropy(self.head(part).flatten(0, 1), label.flatten(), reduction="sum") for part, label in parts]
        return torch.stack(losses).sum() / labels.numel()


def gpt_7b(seq: int, layers: int = 32) -> Made:
    """MEMO's 7B shape on meta, bfloat16, one sequence."""
    with torch.device("meta"):
        model = LongGPT(layers, 4096, 32, 50257, pieces=32).to(torch.bfloat16)
        return model, (torch.zeros(1, seq, dtype=torch.int64), torch.zeros(1, seq, dtype=torch.int64))


def llama_7b(layers: int = 32) -> Made:
    """Llama-2-7B's shape, or the same with more or fewer layers."""
    return llama_shape(layers, 4096, 32, 32, 11008)


def llama_70b(layers: int = 80) -> Made:
    """Llama-2-70B's shape."""
    return llama_shape(layers, 8192, 64, 8, 28672)


# Checkpointing, as its users write it


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model for which transformers has no switch."""
    return [module for module in model.modules() if type(module).__name__ in PLAIN_BLOCKS]


def checkpointing(model: nn.Module, on: bool) -> None:
    """Switch checkpointing of each block on or off: transformers' own switch where there is one, else around blocks."""
    inner = getattr(model, "model", None)
    if getattr(inner, "supports_gradient_checkpointing", False):
        if on:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            inner.gradient_checkpointing_disable()
            inner.disable_input_require_grads()  # the hook that transformers leaves on the embedding
        return
    for block in blocks(model):
        block.__dict__.pop("forward", None)
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def on_cpu(enabled: bool) -> Iterator[None]:
    """Saved activations in pinned host memory, as `torch.autograd.graph.save_on_cpu` does it."""
    if not enabled:
        yield
        return
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        yield

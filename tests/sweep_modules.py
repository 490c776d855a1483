"""A table of torch.nn's modules for `test_sweep.py`: name -> (shape of what the module reads, module, use)."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

ROW, SIGNAL, IMAGE, VOLUME = (8, 12), (4, 6, 16), (4, 6, 8, 8), (2, 4, 4, 4, 4)
TOKENS = (2, 6, 16)  # batch, length, width, or length, batch, width
TABLE: dict[str, tuple] = {}


def put(name: str, shape: tuple, make, use=None) -> None:
    """An entry; `use(module, value)` where the module is not just called with the value."""
    assert name not in TABLE
    TABLE[name] = shape, make, use


def targets() -> torch.Tensor:
    """A class for each row."""
    return torch.arange(8) % 12


def padded() -> torch.Tensor:
    """Which tokens are padding."""
    return torch.arange(6)[None].expand(2, 6) > 4


def later() -> torch.Tensor:
    """Which tokens come later."""
    return torch.ones(6, 6).triu(1).bool()


for kind in (
    nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.PReLU, nn.ReLU, nn.ReLU6,
    nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.GLU, nn.Identity, nn.Flatten,
):  # fmt: skip
    put(kind.__name__, ROW, kind)
for kind in (nn.ELU, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU,
             nn.SiLU, nn.Mish):  # fmt: skip
    put(f"{kind.__name__}, in place", ROW, lambda kind=kind: kind(inplace=True), lambda m, y: m(y * 1))
put("Threshold", ROW, lambda: nn.Threshold(0.1, 0.2))
put("GELU, tanh", ROW, lambda: nn.GELU("tanh"))
put("Softmin", ROW, lambda: nn.Softmin(1))
put("Softmax", ROW, lambda: nn.Softmax(1))
put("Softmax, first dimension", ROW, lambda: nn.Softmax(0))
put("Softmax2d", IMAGE, nn.Softmax2d)
put("LogSoftmax", ROW, lambda: nn.LogSoftmax(1))
put(
    "AdaptiveLogSoftmaxWithLoss", ROW, lambda: nn.AdaptiveLogSoftmaxWithLoss(12, 20, [5, 10]), lambda m, y: m(y, targets()).loss
)

for axes, shape in ((1, SIGNAL), (2, IMAGE), (3, VOLUME)):

    def of(name: str, axes: int = axes):
        return getattr(nn, f"{name}{axes}d")

    channels = shape[1]
    conv, transposed, batch, instance = of("Conv"), of("ConvTranspose"), of("BatchNorm"), of("InstanceNorm")
    put(f"Conv{axes}d", shape, lambda c=channels, k=conv: k(c, 4, 3, padding=1))
    put(f"Conv{axes}d, groups", shape, lambda c=channels, k=conv: k(c, 4, 3, 2, 2, 2, 2, bias=False))
    put(f"Conv{axes}d, circular", shape, lambda c=channels, k=conv: k(c, 4, 3, padding=1, padding_mode="circular"))
    put(f"Conv{axes}d, reflected", shape, lambda c=channels, k=conv: k(c, 4, 3, padding=1, padding_mode="reflect"))
    put(f"Conv{axes}d, same", shape, lambda c=channels, k=conv: k(c, 4, 2, padding="same"))
    put(f"ConvTranspose{axes}d", shape, lambda c=channels, k=transposed: k(c, 4, 3, stride=2, output_padding=1))
    put(f"MaxPool{axes}d", shape, partial(of("MaxPool"), 2))
    put(f"MaxPool{axes}d, indices", shape, partial(of("MaxPool"), 3, 2, 1, return_indices=True))
    pool = getattr(F, f"max_pool{axes}d")
    put(f"MaxUnpool{axes}d", shape, partial(of("MaxUnpool"), 2), lambda m, y, p=pool: m(*p(y, 2, return_indices=True)))
    put(f"AvgPool{axes}d", shape, partial(of("AvgPool"), 2))
    put(f"LPPool{axes}d", shape, partial(of("LPPool"), 2, 2))
    put(f"AdaptiveAvgPool{axes}d", shape, partial(of("AdaptiveAvgPool"), 3))
    put(f"AdaptiveAvgPool{axes}d, one", shape, partial(of("AdaptiveAvgPool"), 1))
    put(f"AdaptiveMaxPool{axes}d", shape, partial(of("AdaptiveMaxPool"), 3))
    put(f"BatchNorm{axes}d", shape, lambda c=channels, k=batch: k(c))
    put(f"BatchNorm{axes}d, not affine", shape, lambda c=channels, k=batch: k(c, affine=False))
    put(f"BatchNorm{axes}d, untracked", shape, lambda c=channels, k=batch: k(c, track_running_stats=False))
    put(f"BatchNorm{axes}d, evaluated", shape, lambda c=channels, k=batch: k(c).eval())
    put(f"InstanceNorm{axes}d", shape, lambda c=channels, k=instance: k(c))
    put(f"InstanceNorm{axes}d, tracked", shape, lambda c=channels, k=instance: k(c, affine=True, track_running_stats=True))
    put(f"InstanceNorm{axes}d, evaluated", shape, lambda c=channels, k=instance: k(c, track_running_stats=True).eval())
    put(f"Dropout{axes}d", shape, partial(of("Dropout"), 0.4))
    for pad in ("Reflection", "Replication", "Zero", "Circular"):
        put(f"{pad}Pad{axes}d", shape, partial(of(f"{pad}Pad"), 1))
    put(f"ConstantPad{axes}d", shape, partial(of("ConstantPad"), 1, 0.5))

put("SyncBatchNorm, evaluated", IMAGE, lambda: nn.SyncBatchNorm(6).eval())
put("LocalResponseNorm", IMAGE, lambda: nn.LocalResponseNorm(2))
put("GroupNorm", IMAGE, lambda: nn.GroupNorm(3, 6))
put("LayerNorm", ROW, lambda: nn.LayerNorm(12))
put("LayerNorm, not affine", ROW, lambda: nn.LayerNorm(12, elementwise_affine=False))
put("LayerNorm, no bias", ROW, lambda: nn.LayerNorm(12, bias=False))
put("RMSNorm", ROW, lambda: nn.RMSNorm(12))
put("FractionalMaxPool2d", IMAGE, lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5))
put("FractionalMaxPool3d", VOLUME, lambda: nn.FractionalMaxPool3d(2, output_ratio=0.5))
put("Dropout", ROW, lambda: nn.Dropout(0.3))
put("Dropout, in place", ROW, lambda: nn.Dropout(0.3, inplace=True), lambda m, y: m(y * 1))
put("AlphaDropout", ROW, lambda: nn.AlphaDropout(0.3))
put("FeatureAlphaDropout", IMAGE, lambda: nn.FeatureAlphaDropout(0.3))
put("Fold", (4, 8, 9), lambda: nn.Fold((4, 4), 2))
put("Unfold", IMAGE, lambda: nn.Unfold(3, padding=1))
put("PixelShuffle", (4, 8, 4, 4), lambda: nn.PixelShuffle(2))
put("PixelUnshuffle", IMAGE, lambda: nn.PixelUnshuffle(2))
put("ChannelShuffle", IMAGE, lambda: nn.ChannelShuffle(3))
put("Upsample", IMAGE, lambda: nn.Upsample(scale_factor=2))
put("UpsamplingBilinear2d", IMAGE, lambda: nn.UpsamplingBilinear2d(scale_factor=2))
put("UpsamplingNearest2d", IMAGE, lambda: nn.UpsamplingNearest2d(size=(11, 7)))
put("Unflatten", ROW, lambda: nn.Unflatten(1, (3, 4)))
put("Bilinear", ROW, lambda: nn.Bilinear(12, 12, 3), lambda m, y: m(y, y.sin()))
put("CosineSimilarity", ROW, nn.CosineSimilarity, lambda m, y: m(y, y.flip(0)))
put("PairwiseDistance", ROW, nn.PairwiseDistance, lambda m, y: m(y, y.flip(0)))
put("Embedding", ROW, lambda: nn.Embedding(20, 12), lambda m, y: m(targets()) * y)
put("Embedding, padded", ROW, lambda: nn.Embedding(20, 12, 2, scale_grad_by_freq=True), lambda m, y: m(targets() % 4) * y)
for mode in ("sum", "mean", "max"):
    starts = [0, 3, 5, 6, 8, 10, 11, 15]
    put(f"EmbeddingBag, {mode}", ROW, lambda k=mode: nn.EmbeddingBag(20, 12, mode=k),
        lambda m, y, at=starts: m(torch.arange(16), torch.tensor(at)) * y)  # fmt: skip
    put(f"EmbeddingBag, {mode}, rows", ROW, lambda k=mode: nn.EmbeddingBag(20, 12, mode=k),
        lambda m, y: m(torch.arange(16).view(8, 2)) * y)  # fmt: skip
put("EmbeddingBag, weighted", ROW, lambda: nn.EmbeddingBag(20, 12, mode="sum"),
    lambda m, y: m(torch.arange(16).view(8, 2), per_sample_weights=y[:, :2].contiguous()) * y)  # fmt: skip


def attention(**options):
    """Attention of four heads."""
    return lambda: nn.MultiheadAttention(16, 4, **options)


def layer(kind=nn.TransformerEncoderLayer, **options):
    """A layer of a transformer."""
    return lambda: kind(16, 4, 32, 0.1, **options)


def encoder(**options):
    """Two layers."""
    return lambda: nn.TransformerEncoder(layer(batch_first=True)(), 2, **options)


put("MultiheadAttention", TOKENS, attention(dropout=0.1), lambda m, y: m(y, y, y, need_weights=False)[0])
put("MultiheadAttention, weights", TOKENS, attention(dropout=0.1), lambda m, y: m(y, y, y))
put("MultiheadAttention, all weights", TOKENS, attention(), lambda m, y: m(y, y.sin(), y.cos(), average_attn_weights=False))
put("MultiheadAttention, masks", TOKENS, attention(batch_first=True),
    lambda m, y: m(y, y, y, key_padding_mask=padded(), attn_mask=later()))  # fmt: skip
put("MultiheadAttention, causal", TOKENS, attention(batch_first=True),
    lambda m, y: m(y, y, y, attn_mask=later(), is_causal=True, need_weights=False)[0])  # fmt: skip
put("MultiheadAttention, biases", TOKENS, attention(add_bias_kv=True, add_zero_attn=True), lambda m, y: m(y, y, y)[0])
put("MultiheadAttention, widths", TOKENS, attention(kdim=8, vdim=4), lambda m, y: m(y, y[..., :8], y[..., :4])[0])
put("MultiheadAttention, evaluated", TOKENS, lambda: attention(batch_first=True)().eval(), lambda m, y: m(y, y, y)[0])
put("TransformerEncoderLayer", TOKENS, layer(batch_first=True))
put("TransformerEncoderLayer, norm first", TOKENS, layer(activation="gelu", norm_first=True))
put("TransformerEncoderLayer, evaluated", TOKENS, lambda: layer(batch_first=True)().eval())
put("TransformerEncoder", TOKENS, encoder())
put("TransformerEncoder, padded", TOKENS, encoder(enable_nested_tensor=False), lambda m, y: m(y, src_key_padding_mask=padded()))
put("TransformerEncoder, causal", TOKENS, encoder(),
    lambda m, y: m(y, mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True))  # fmt: skip
put("TransformerEncoder, evaluated", TOKENS, lambda: encoder()().eval(), lambda m, y: m(y, src_key_padding_mask=padded()))
put("TransformerDecoderLayer", TOKENS, layer(nn.TransformerDecoderLayer), lambda m, y: m(y, y.sin()))
put("Transformer", TOKENS, lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True), lambda m, y: m(y, y.sin()))
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    put(kind.__name__, TOKENS, lambda k=kind: k(16, 16))
    put(f"{kind.__name__}, two layers, both ways", TOKENS,
        lambda k=kind: k(16, 16, 2, bidirectional=True, batch_first=True, dropout=0.2))  # fmt: skip
    put(f"{kind.__name__}, no bias", TOKENS, lambda k=kind: k(16, 16, bias=False))
put("LSTM, projected", TOKENS, lambda: nn.LSTM(16, 16, proj_size=4))
for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    put(kind.__name__, (4, 16), lambda k=kind: k(16, 16))

SIGNS = {"HingeEmbeddingLoss": nn.HingeEmbeddingLoss, "SoftMarginLoss": nn.SoftMarginLoss}
PAIRS = {"L1Loss": nn.L1Loss, "MSELoss": nn.MSELoss, "SmoothL1Loss": nn.SmoothL1Loss, "HuberLoss": nn.HuberLoss}
THREE = {"TripletMarginLoss": nn.TripletMarginLoss, "TripletMarginWithDistanceLoss": nn.TripletMarginWithDistanceLoss}
for name, kind in SIGNS.items():
    put(name, ROW, kind, lambda m, y: m(y, y.detach().sign()))
for name, kind in PAIRS.items():
    put(name, ROW, kind, lambda m, y: m(y, y.flip(0)))
for name, kind in THREE.items():
    put(name, ROW, kind, lambda m, y: m(y, y.flip(0), y.sin()))
put("BCELoss", ROW, nn.BCELoss, lambda m, y: m(y.sigmoid(), (y > 0).float()))
put("BCEWithLogitsLoss", ROW, nn.BCEWithLogitsLoss, lambda m, y: m(y, (y > 0).float()))
put("KLDivLoss", ROW, lambda: nn.KLDivLoss(reduction="batchmean"), lambda m, y: m(y.log_softmax(1), y.flip(0).softmax(1)))
put("CrossEntropyLoss", ROW, nn.CrossEntropyLoss, lambda m, y: m(y, targets()))
put("CrossEntropyLoss, smoothed", ROW, lambda: nn.CrossEntropyLoss(torch.rand(12), ignore_index=3, label_smoothing=0.1),
    lambda m, y: m(y, targets()))  # fmt: skip
put("CrossEntropyLoss, probabilities", ROW, nn.CrossEntropyLoss, lambda m, y: m(y, y.flip(0).softmax(1)))
put("CrossEntropyLoss, images", IMAGE, lambda: nn.CrossEntropyLoss(reduction="none"),
    lambda m, y: m(y, torch.zeros(4, 8, 8, dtype=torch.long)))  # fmt: skip
put("NLLLoss", ROW, nn.NLLLoss, lambda m, y: m(y.log_softmax(1), targets()))
put("PoissonNLLLoss", ROW, nn.PoissonNLLLoss, lambda m, y: m(y, y.detach().abs()))
put("MarginRankingLoss", ROW, nn.MarginRankingLoss, lambda m, y: m(y[0], y[1], torch.ones(12)))
put("MultiLabelMarginLoss", ROW, nn.MultiLabelMarginLoss, lambda m, y: m(y, torch.tensor([[1, 3, -1] + [0] * 9] * 8)))
put("MultiLabelSoftMarginLoss", ROW, nn.MultiLabelSoftMarginLoss, lambda m, y: m(y, (y > 0).float()))
put("MultiMarginLoss", ROW, nn.MultiMarginLoss, lambda m, y: m(y, targets()))
put("CosineEmbeddingLoss", ROW, nn.CosineEmbeddingLoss, lambda m, y: m(y, y.flip(0), torch.ones(8)))
put("CTCLoss", (6, 2, 5), nn.CTCLoss,
    lambda m, y: m(y.log_softmax(2), torch.tensor([[1, 2, 3], [2, 3, 1]]), (6, 6), (3, 2)))  # fmt: skip

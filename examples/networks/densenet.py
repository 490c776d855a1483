"""DenseNet-121, for ImageNet."""

import torch
from blocks import Built, GlobalMean, image, ready
from torch import Tensor, nn

GROWTH = 32


def norm_relu_conv(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """A convolution after its normalisation and activation."""
    return nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False))


class DenseBlock(nn.Module):
    """Layers each of which sees the concatenation of the block's input and of all layers before it.

    Each layer makes its own concatenation, as in the paper, and none is kept for the next: the naive form that uses memory
    quadratic in the depth unless somebody plans it. The first layer needs none.
    """

    def __init__(self, c_in: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(norm_relu_conv(c_in + layer * GROWTH, 4 * GROWTH, 1), norm_relu_conv(4 * GROWTH, GROWTH, 3))
            for layer in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1) if len(parts) > 1 else x))
        return torch.cat(parts, 1)


def densenet121() -> Built:
    """DenseNet-121: Huang et al., Densely Connected Convolutional Networks (arXiv 1608.06993), table 1."""
    channels = 2 * GROWTH
    stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for block in (6, 12, 24, 16):
        if len(layers) > 4:
            layers += [norm_relu_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        layers.append(DenseBlock(channels, block))
        channels += block * GROWTH
    return ready(nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), GlobalMean(), nn.Linear(channels, 1000)), image())

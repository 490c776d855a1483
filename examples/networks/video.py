"""R(2+1)D-18 and S3D, for clips of 16 frames in the 400 classes of Kinetics."""

import torch
import torch.nn.functional as F
from blocks import Built, GlobalMean, conv_bn, ready
from torch import Tensor, nn

CLASSES = 400


def clip() -> Tensor:
    """A batch of one clip: channels, frames, height, width."""
    return torch.randn(1, 3, 16, 224, 224)


def space_time(
    c_in: int, middle: int, c_out: int, kernel: int, stride: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """A cubic convolution taken apart into one over space and one over time."""
    space = conv_bn(c_in, middle, (1, kernel, kernel), (1, stride, stride))
    return nn.Sequential(space, conv_bn(middle, c_out, (kernel, 1, 1), (stride, 1, 1), act=act))


class Residual(nn.Module):
    """Two convolutions, each taken apart, around which the input is added."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        # As many channels in the middle as give the first convolution the parameters of an undivided one; the second
        # has no more, in the authors' and torchvision's networks.
        middle = (c_in * c_out * 27) // (c_in * 9 + c_out * 3)
        self.body = nn.Sequential(space_time(c_in, middle, c_out, 3, stride), space_time(c_out, middle, c_out, 3, act=None))
        self.shortcut = nn.Identity() if c_in == c_out else conv_bn(c_in, c_out, (1, 1, 1), stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def r2plus1d_18() -> Built:
    """R(2+1)D-18: Tran et al., A Closer Look at Spatiotemporal Convolutions (arXiv 1711.11248), table 1 and section 3.5."""
    layers: list[nn.Module] = [conv_bn(3, 45, (1, 7, 7), (1, 2, 2)), conv_bn(45, 64, (3, 1, 1))]
    channels = 64
    for c_out in (64, 128, 256, 512):
        layers += [Residual(channels, c_out, 1 if c_out == 64 else 2), Residual(c_out, c_out, 1)]
        channels = c_out
    return ready(nn.Sequential(*layers, GlobalMean(), nn.Linear(512, CLASSES)), clip())


class Inception(nn.Module):
    """Four branches of one input, concatenated."""

    def __init__(self, c_in: int, one: int, two: tuple[int, int], three: tuple[int, int], pooled: int):
        super().__init__()
        pointwise = (1, 1, 1)
        self.branches = nn.ModuleList(
            [
                conv_bn(c_in, one, pointwise),
                nn.Sequential(conv_bn(c_in, two[0], pointwise), space_time(two[0], two[1], two[1], 3)),
                nn.Sequential(conv_bn(c_in, three[0], pointwise), space_time(three[0], three[1], three[1], 3)),
                nn.Sequential(nn.MaxPool3d(3, 1, 1), conv_bn(c_in, pooled, pointwise)),
            ]
        )
        self.channels = one + two[1] + three[1] + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


# The widths of GoogLeNet's inception blocks (Szegedy et al., arXiv 1409.4842, table 1), by resolution.
INCEPTIONS = (
    ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64)),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128)),
)


def s3d() -> Built:
    """S3D: Xie et al., Rethinking Spatiotemporal Feature Learning (arXiv 1712.04851), figure 5; without gating."""
    layers = [
        space_time(3, 64, 64, 7, 2),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        conv_bn(64, 64, (1, 1, 1)),
        space_time(64, 192, 192, 3),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ]
    shrink = [[], [nn.MaxPool3d(3, 2, 1)], [nn.MaxPool3d(2, 2)]]
    channels = 192
    for pool, blocks in zip(shrink, INCEPTIONS, strict=True):
        layers += pool
        for widths in blocks:
            layers.append(Inception(channels, *widths))
            channels = layers[-1].channels
    head = [nn.AvgPool3d((2, 7, 7), 1), nn.Conv3d(channels, CLASSES, 1), GlobalMean()]
    return ready(nn.Sequential(*layers, *head), clip())

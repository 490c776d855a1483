"""ResNet-50 and ResNeXt-50 (32x4d), for ImageNet."""

import torch.nn.functional as F
from blocks import Built, GlobalMean, conv_bn, image, ready
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1, the middle one strided, around which the input is added."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int, groups: int, dilation: int):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(c_in, width, 1),
            conv_bn(width, width, 3, stride, groups=groups, dilation=dilation),
            conv_bn(width, c_out, 1, act=None),
        )
        self.shortcut = nn.Identity() if c_in == c_out else conv_bn(c_in, c_out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def features(groups: int = 1, group_width: int = 64, *, dilated: bool = False) -> nn.Sequential:
    """The four stages of 3, 4, 6 and 3 blocks, up to 2048 channels.

    `dilated` stops at an eighth of the input's size: the last two stages dilate instead of striding, each from its second
    block on, as in torchvision's segmentation models.
    """
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    c_in, dilation = 64, 1
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width, c_out = groups * group_width << stage, 256 << stage
        stride, first = 1 if stage == 0 else 2, dilation
        if dilated and stage >= 2:
            stride, dilation = 1, 2 * dilation
        for block in range(blocks):
            shape = (stride, groups, first) if block == 0 else (1, groups, dilation)
            layers.append(Bottleneck(c_in, width, c_out, *shape))
            c_in = c_out
    return nn.Sequential(*layers)


def resnet50() -> Built:
    """ResNet-50: He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385), table 1.

    The stride is in the 3x3 convolution, as in torchvision, not in the first 1x1.
    """
    return ready(nn.Sequential(features(), GlobalMean(), nn.Linear(2048, 1000)), image())


def resnext50() -> Built:
    """ResNeXt-50 (32x4d): Xie et al., Aggregated Residual Transformations (arXiv 1611.05431), table 1."""
    return ready(nn.Sequential(features(32, 4), GlobalMean(), nn.Linear(2048, 1000)), image())

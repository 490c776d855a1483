"""FCN, DeepLabv3 and LR-ASPP, for the 21 classes of Pascal VOC, in torchvision's variants without auxiliary heads."""

import torch
import torch.nn.functional as F
from blocks import Built, GlobalMean, conv_bn, image, ready
from mobilenet import features as mobilenet_features
from resnet import features as resnet_features
from torch import Tensor, nn

CLASSES = 21


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the height and width of `like`, bilinearly."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class Segmentation(nn.Module):
    """A backbone and a head, whose classes are brought back to the size of the image."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return resized(self.head(self.backbone(x)), x)


def fcn_head(channels: int) -> nn.Sequential:
    """A quarter of the channels, then classes."""
    return nn.Sequential(conv_bn(channels, channels // 4, 3), nn.Conv2d(channels // 4, CLASSES, 1))


def fcn() -> Built:
    """FCN with a dilated ResNet-50: Long et al., Fully Convolutional Networks (arXiv 1411.4038).

    Torchvision's: one prediction at an eighth of the size, not the paper's sum of three.
    """
    return ready(Segmentation(resnet_features(dilated=True), fcn_head(2048)), image())


class PyramidPooling(nn.Module):
    """The same features seen at several dilations and as a whole, concatenated and projected."""

    def __init__(self, c_in: int, c_out: int, dilations: tuple[int, ...]):
        super().__init__()
        self.local = nn.ModuleList(
            [conv_bn(c_in, c_out, 1), *(conv_bn(c_in, c_out, 3, dilation=dilation) for dilation in dilations)]
        )
        self.whole = nn.Sequential(GlobalMean(keepdim=True), conv_bn(c_in, c_out, 1))
        self.project = conv_bn((len(dilations) + 2) * c_out, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([*(branch(x) for branch in self.local), resized(self.whole(x), x)], 1))


def deeplabv3() -> Built:
    """DeepLabv3 with a dilated ResNet-50: Chen et al., Rethinking Atrous Convolution (arXiv 1706.05587), section 3.3.

    Output stride 8, hence the dilations 12, 24 and 36.
    """
    head = nn.Sequential(PyramidPooling(2048, 256, (12, 24, 36)), conv_bn(256, 256, 3), nn.Conv2d(256, CLASSES, 1))
    return ready(Segmentation(resnet_features(dilated=True), head), image())


class LiteReduced(nn.Module):
    """Deep features gated by their mean, added as classes to those of shallower features at twice the size."""

    def __init__(self, low: nn.Module, high: nn.Module, c_low: int, c_high: int, width: int):
        super().__init__()
        self.low, self.high = low, high
        self.project = conv_bn(c_high, width, 1)
        self.gate = nn.Sequential(GlobalMean(keepdim=True), nn.Conv2d(c_high, width, 1, bias=False), nn.Sigmoid())
        self.low_classes, self.high_classes = nn.Conv2d(c_low, CLASSES, 1), nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        gated = resized(self.project(high) * self.gate(high), low)
        return resized(self.low_classes(low) + self.high_classes(gated), x)


def lraspp() -> Built:
    """LR-ASPP with MobileNetV3-Large: Howard et al., Searching for MobileNetV3 (arXiv 1905.02244), section 6.4.

    Torchvision's: the gate averages the whole image, and its backbone dilates from a sixteenth of the size on.
    """
    low, high = mobilenet_features(cut=4)
    return ready(LiteReduced(low, high, c_low=40, c_high=960, width=128), image())

"""The backbone of `segmentation.lraspp`: MobileNetV3-Large."""

from blocks import GlobalMean, conv_bn
from torch import Tensor, nn


class Excite(nn.Module):
    """Channels scaled by what two layers make of their means."""

    def __init__(self, channels: int):
        super().__init__()
        narrow = -(-channels // 32) * 8  # a quarter, rounded up to a multiple of 8
        self.scale = nn.Sequential(
            GlobalMean(keepdim=True),
            nn.Conv2d(channels, narrow, 1),
            nn.ReLU(),
            nn.Conv2d(narrow, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class Inverted(nn.Module):
    """A depthwise convolution of expanded channels, around which the input is added where its shape allows."""

    def __init__(
        self, c_in: int, kernel: int, wide: int, c_out: int, excite: bool, act: type[nn.Module], stride: int, dilation: int
    ):
        super().__init__()
        layers = [] if wide == c_in else [conv_bn(c_in, wide, 1, act=act)]
        layers.append(conv_bn(wide, wide, kernel, stride, groups=wide, dilation=dilation, act=act))
        if excite:
            layers.append(Excite(wide))
        self.body = nn.Sequential(*layers, conv_bn(wide, c_out, 1, act=None))
        # The block that would have strided, and dilates instead, changes the channels: this never adds where it must not.
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


R, H = nn.ReLU, nn.Hardswish
# Table 1 of the paper: kernel, expanded channels, channels, squeeze-and-excite, activation, stride; and the dilation that
# takes the place of the last stride.
BLOCKS = (
    (3, 16, 16, False, R, 1, 1),
    (3, 64, 24, False, R, 2, 1),
    (3, 72, 24, False, R, 1, 1),
    (5, 72, 40, True, R, 2, 1),
    (5, 120, 40, True, R, 1, 1),
    (5, 120, 40, True, R, 1, 1),
    (3, 240, 80, False, H, 2, 1),
    (3, 200, 80, False, H, 1, 1),
    (3, 184, 80, False, H, 1, 1),
    (3, 184, 80, False, H, 1, 1),
    (3, 480, 112, True, H, 1, 1),
    (3, 672, 112, True, H, 1, 1),
    (5, 672, 160, True, H, 1, 2),
    (5, 960, 160, True, H, 1, 2),
    (5, 960, 160, True, H, 1, 2),
)


def features(cut: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The dilated backbone in two parts, the first with `cut` blocks, up to 960 channels at a sixteenth of the size."""
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=H)]
    channels = 16
    for kernel, wide, c_out, excite, act, stride, dilation in BLOCKS:
        layers.append(Inverted(channels, kernel, wide, c_out, excite, act, stride, dilation))
        channels = c_out
    layers.append(conv_bn(channels, 6 * channels, 1, act=H))
    return nn.Sequential(*layers[: cut + 1]), nn.Sequential(*layers[cut + 1 :])

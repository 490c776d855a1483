"""What several of the reference networks share.

The networks have random weights and torch's default epsilons, which change no shape and no parameter count. They leave
out dropout, auxiliary heads and stochastic depth, which inference does not have. No module works in place.
"""

import math

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


def conv_bn(
    c_in: int,
    c_out: int,
    kernel: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, its normalisation and activation; 3-D for a kernel of three."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    conv, norm = (nn.Conv3d, nn.BatchNorm3d) if len(kernel) == 3 else (nn.Conv2d, nn.BatchNorm2d)
    padding = tuple(dilation * (size - 1) // 2 for size in kernel)
    layers = [conv(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False), norm(c_out)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class GlobalMean(nn.Module):
    """The mean over all positions: (batch, channels), or with ones for the positions."""

    def __init__(self, keepdim: bool = False):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())), keepdim=self.keepdim)


def ready(model: nn.Module, *args: Tensor) -> Built:
    """What a factory returns: the model, to be run for inference, and example arguments.

    Torch's own initial weights shrink the activations from layer to layer, until the output no longer depends on the input:
    two runs would then agree whatever one of them did to the activations. Hence He's variance, which is six times theirs.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(math.sqrt(6))
    return model.eval(), args


def image() -> Tensor:
    """A batch of one ImageNet-sized image."""
    return torch.randn(1, 3, 224, 224)

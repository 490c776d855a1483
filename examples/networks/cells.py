"""Networks of cells that an architecture search found: operations, a cell from its genotype, and a chain of cells."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from blocks import GlobalMean, conv_bn
from torch import Tensor, nn


@dataclass(frozen=True)
class Genotype:
    """A cell: sums of pairs of operations on earlier states, some of which are concatenated.

    Attributes:
        pairs: for each sum two operations with the states they read. State 0 is the output of the cell before the last,
            state 1 that of the last, and state 2 the first sum.
        concat: the states that make the output.
    """

    pairs: tuple[tuple[tuple[str, int], tuple[str, int]], ...]
    concat: tuple[int, ...]


# --- operations, each from its channels before and after and its stride


def relu_conv_bn(c_in: int, c_out: int, kernel: int | tuple[int, int] = 1, stride: int | tuple[int, int] = 1) -> nn.Module:
    """A convolution with the activation before it, as the searched cells have them."""
    return nn.Sequential(nn.ReLU(), *conv_bn(c_in, c_out, kernel, stride, act=None))


def depthwise(c_in: int, c_out: int, kernel: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    """Activation, convolution of each channel, mix of the channels, normalisation."""
    spread = nn.Conv2d(c_in, c_in, kernel, stride, dilation * (kernel // 2), dilation, c_in, bias=False)
    return [nn.ReLU(), spread, nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]


def separable(kernel: int) -> Callable[[int, int, int], nn.Module]:
    """Two depthwise convolutions, the first strided."""
    return lambda c_in, c_out, stride: nn.Sequential(
        *depthwise(c_in, c_out, kernel, stride), *depthwise(c_out, c_out, kernel, 1)
    )


def dilated(c_in: int, c_out: int, stride: int) -> nn.Module:
    """One depthwise convolution of every other pixel."""
    return nn.Sequential(*depthwise(c_in, c_out, 3, stride, dilation=2))


def pooling(make: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    """A pooling, and a projection where the number of channels changes."""
    return lambda c_in, c_out, stride: (
        make(stride) if c_in == c_out else nn.Sequential(make(stride), *conv_bn(c_in, c_out, 1, act=None))
    )


def bottleneck(*kernels: tuple[int, int]) -> Callable[[int, int, int], nn.Module]:
    """Convolutions in a quarter of the channels; each strides where it is wide."""

    def make(c_in: int, c_out: int, stride: int) -> nn.Module:
        narrow = c_out // 4
        layers = [relu_conv_bn(c_in, narrow)]
        for kernel in kernels:
            strides = (stride if kernel[0] > 1 else 1, stride if kernel[1] > 1 else 1)
            layers.append(relu_conv_bn(narrow, narrow, kernel, strides))
        return nn.Sequential(*layers, relu_conv_bn(narrow, c_out))

    return make


def skip(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Nothing, unless the shape changes."""
    return nn.Identity() if stride == 1 and c_in == c_out else relu_conv_bn(c_in, c_out, 1, stride)


OPERATIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "skip": skip,
    "avg_3": pooling(lambda stride: nn.AvgPool2d(3, stride, 1, count_include_pad=False)),
    "max_3": pooling(lambda stride: nn.MaxPool2d(3, stride, 1)),
    "max_2": pooling(lambda stride: nn.MaxPool2d(2, stride, ceil_mode=True)),
    "sep_3": separable(3),
    "sep_5": separable(5),
    "sep_7": separable(7),
    "dil_3": dilated,
    "conv_1": lambda c_in, c_out, stride: relu_conv_bn(c_in, c_out, 1, stride),
    "conv_3": bottleneck((3, 3)),
    "conv_1_7": bottleneck((1, 7), (7, 1)),
}


# --- cells


class Halve(nn.Module):
    """Half the height and width without losing a pixel's parity: even pixels make half the channels, odd pixels the rest."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        # An odd size has one odd pixel fewer: a zero stands for the one past the edge.
        shifted = F.pad(x, (-1, 1, -1, 1)) if x.shape[-1] % 2 else x[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))


ENTRIES: dict[str, Callable[[int, int], nn.Module]] = {
    "project": relu_conv_bn,
    "halve": Halve,
    "raw": lambda c_in, c_out: nn.Identity(),
}


class Cell(nn.Module):
    """A cell by its genotype, fed by the two cells before it; with a stride, what reads those two strides."""

    def __init__(self, genotype: Genotype, before: int, last: int, width: int, stride: int, entry: str):
        super().__init__()
        self.genotype, self.channels = genotype, width * len(genotype.concat)
        self.before, self.last = ENTRIES[entry](before, width), relu_conv_bn(last, width)
        self.operations = nn.ModuleList()
        for name, state in (choice for pair in genotype.pairs for choice in pair):
            c_in = before if entry == "raw" and state == 0 else width
            self.operations.append(OPERATIONS[name](c_in, width, stride if state < 2 else 1))

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.before(before), self.last(last)]
        operations = iter(self.operations)
        for (_, one), (_, other) in self.genotype.pairs:
            states.append(next(operations)(states[one]) + next(operations)(states[other]))
        return torch.cat([states[state] for state in self.genotype.concat], 1)


class CellNetwork(nn.Module):
    """A stem, cells each fed by the two things before it, and a classifier.

    Args:
        stem: makes what the first cell finds before the last.
        second: makes from that what it finds last.
        channels: of the two.
        cells: genotype, channels of a state, and stride of each cell.
        entry: how the first cell takes in what comes before the last; the others know.
        head: what comes before the mean of all pixels.
    """

    def __init__(
        self,
        stem: nn.Module,
        second: nn.Module,
        channels: int,
        cells: Iterable[tuple[Genotype, int, int]],
        entry: str,
        head: nn.Module,
    ):
        super().__init__()
        self.stem, self.second, self.cells = stem, second, nn.ModuleList()
        before = last = channels
        for genotype, width, stride in cells:
            cell = Cell(genotype, before, last, width, stride, entry)
            self.cells.append(cell)
            before, last, entry = last, cell.channels, "halve" if stride == 2 else "project"
        self.head = nn.Sequential(head, GlobalMean(), nn.Linear(last, 1000))

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem(x)
        last = self.second(before)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last)

"""NASNet-A, AmoebaNet-D, PNASNet-5 and DARTS, for ImageNet, in their mobile sizes: a genotype table and a chain each.

Strided layers pad both sides alike, where the TensorFlow code of the authors pads the end more: shapes are the same.
"""

from blocks import Built, conv_bn, image, ready
from cells import CellNetwork, Genotype
from torch import nn

NASNET_NORMAL = Genotype(
    (
        (("sep_5", 1), ("sep_3", 0)),
        (("sep_5", 0), ("sep_3", 0)),
        (("avg_3", 1), ("skip", 0)),
        (("avg_3", 0), ("avg_3", 0)),
        (("sep_3", 1), ("skip", 1)),
    ),
    concat=(0, 2, 3, 4, 5, 6),
)
NASNET_REDUCTION = Genotype(
    (
        (("sep_5", 1), ("sep_7", 0)),
        (("max_3", 1), ("sep_7", 0)),
        (("avg_3", 1), ("sep_5", 0)),
        (("skip", 3), ("avg_3", 2)),
        (("sep_3", 2), ("max_3", 1)),
    ),
    concat=(3, 4, 5, 6),
)
AMOEBANET_NORMAL = Genotype(
    (
        (("conv_1", 0), ("max_3", 0)),
        (("skip", 0), ("conv_1_7", 1)),
        (("conv_1", 1), ("conv_1_7", 1)),
        (("max_3", 2), ("skip", 2)),
        (("avg_3", 0), ("conv_1", 5)),
    ),
    concat=(1, 3, 4, 6),
)
AMOEBANET_REDUCTION = Genotype(
    (
        (("max_2", 1), ("max_3", 1)),
        (("skip", 2), ("conv_3", 0)),
        (("conv_1_7", 2), ("max_3", 2)),
        (("skip", 3), ("max_2", 0)),
        (("avg_3", 2), ("conv_1", 3)),
    ),
    concat=(4, 5, 6),
)
PNASNET = Genotype(
    (
        (("sep_5", 0), ("max_3", 0)),
        (("sep_7", 1), ("max_3", 1)),
        (("sep_5", 1), ("sep_3", 1)),
        (("sep_3", 4), ("max_3", 1)),
        (("sep_3", 0), ("skip", 1)),
    ),
    concat=(2, 3, 4, 5, 6),
)
DARTS_NORMAL = Genotype(
    (
        (("sep_3", 0), ("sep_3", 1)),
        (("sep_3", 0), ("sep_3", 1)),
        (("sep_3", 1), ("skip", 0)),
        (("skip", 0), ("dil_3", 2)),
    ),
    concat=(2, 3, 4, 5),
)
DARTS_REDUCTION = Genotype(
    (
        (("max_3", 0), ("max_3", 1)),
        (("skip", 2), ("max_3", 1)),
        (("max_3", 0), ("skip", 2)),
        (("skip", 2), ("max_3", 1)),
    ),
    concat=(2, 3, 4, 5),
)


def google(normal: Genotype, reduction: Genotype, repeats: tuple[int, int, int], filters: int) -> CellNetwork:
    """Two strided cells after one convolution, then cells at each of three sizes with a strided one between them."""
    cells = [(reduction, filters // 4, 2), (reduction, filters // 2, 2)]
    for stage, repeat in enumerate(repeats):
        if stage:
            cells.append((reduction, filters << stage, 2))
        cells += [(normal, filters << stage, 1)] * repeat
    # The one convolution does not pad: 111 pixels, which the first cell takes in as they are.
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32))
    return CellNetwork(stem, nn.Identity(), 32, cells, "raw", nn.ReLU())


def nasnet_a() -> Built:
    """NASNet-A (4 @ 1056): Zoph et al., Learning Transferable Architectures (arXiv 1707.07012), figure 4 and table 2."""
    return ready(google(NASNET_NORMAL, NASNET_REDUCTION, (4, 4, 4), filters=44), image())


def amoebanet_d(repeats: int = 4, filters: int = 64) -> Built:
    """AmoebaNet-D: Real et al., Regularized Evolution for Image Classifier Architecture Search (arXiv 1802.01548).

    The paper has no mobile AmoebaNet-D: this one has four cells at each size, as its mobile AmoebaNet-A, and filters for
    about six million parameters, which is about what that has. The normal cell concatenates the four states that the
    authors' code does (github.com/tensorflow/tpu, models/official/amoeba_net), with which GPipe (arXiv 1811.06965, table 1)
    counts parameters; the paper draws another set.
    """
    return ready(google(AMOEBANET_NORMAL, AMOEBANET_REDUCTION, (repeats,) * 3, filters), image())


def pnasnet_5() -> Built:
    """PNASNet-5 mobile (N=3, F=54): Liu et al., Progressive Neural Architecture Search (arXiv 1712.00559), figure 1, table 5.

    The strided cells have the same genotype, and count among the three at their size.
    """
    return ready(google(PNASNET, PNASNET, (3, 2, 2), filters=54), image())


def darts() -> Built:
    """DARTS (second order), 14 cells, 48 channels: Liu et al., DARTS (arXiv 1806.09055), figures 4 and 5, table 3."""
    cells = [(DARTS_REDUCTION if place in (4, 9) else DARTS_NORMAL, place) for place in range(14)]
    chain = [(cell, 48 << sum(place >= at for at in (4, 9)), 2 if cell is DARTS_REDUCTION else 1) for cell, place in cells]
    stem = nn.Sequential(conv_bn(3, 24, 3, 2), conv_bn(24, 48, 3, 2, act=None))
    second = nn.Sequential(nn.ReLU(), conv_bn(48, 48, 3, 2, act=None))
    return ready(CellNetwork(stem, second, 48, chain, "halve", nn.Identity()), image())

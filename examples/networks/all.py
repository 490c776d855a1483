"""All reference networks by name: the workloads of COSMA (arXiv 2311.18246), in its order."""

from collections.abc import Callable

from attention import transformer, vit_b_16
from blocks import Built
from densenet import densenet121
from nas import amoebanet_d, darts, nasnet_a, pnasnet_5
from resnet import resnet50, resnext50
from segmentation import deeplabv3, fcn, lraspp
from video import r2plus1d_18, s3d

NETWORKS: dict[str, Callable[[], Built]] = {
    factory.__name__: factory
    for factory in (
        resnet50,
        densenet121,
        resnext50,
        r2plus1d_18,
        s3d,
        fcn,
        lraspp,
        deeplabv3,
        transformer,
        vit_b_16,
        nasnet_a,
        amoebanet_d,
        pnasnet_5,
        darts,
    )
}

"""The reference networks are the published ones: parameters, shapes, and numbers that a run can be checked by."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from memplan.planner.models.byname import first_on_path, load_model
from torch import nn

FOLDER = Path(__file__).parents[1] / "examples" / "networks"
FILES = {
    "attention": ("transformer", "vit_b_16"),
    "densenet": ("densenet121",),
    "nas": ("nasnet_a", "amoebanet_d", "pnasnet_5", "darts"),
    "resnet": ("resnet50", "resnext50"),
    "segmentation": ("fcn", "lraspp", "deeplabv3"),
    "video": ("r2plus1d_18", "s3d"),
}
SPECS = [(file, name) for file, names in FILES.items() for name in names]

# Torchvision's, but for: nasnet_a, which is that of Keras' NASNetMobile without the moving averages it counts, and in the
# paper 5.3 million; darts, which is that of the authors' code, and in the paper 4.7 million.
EXACT = {
    "resnet50": 25_557_032,
    "resnext50": 25_028_904,
    "densenet121": 7_978_856,
    "r2plus1d_18": 31_505_325,
    "s3d": 8_320_048,
    "lraspp": 3_221_538,
    "vit_b_16": 86_567_656,
    "nasnet_a": 5_289_978,
    "darts": 4_718_752,
}
# Torchvision's, with the auxiliary heads that ours leave out.
WITH_AUXILIARY = {"fcn": 35_322_218, "deeplabv3": 42_004_074}
# What the papers say. The transformer's count depends on a vocabulary of "about 37000" and on biases they do not mention.
ROUNDED = {"transformer": 65e6, "nasnet_a": 5.3e6, "pnasnet_5": 5.1e6, "darts": 4.7e6}

SHAPES = {
    "r2plus1d_18": (1, 400),
    "s3d": (1, 400),
    "fcn": (1, 21, 224, 224),
    "lraspp": (1, 21, 224, 224),
    "deeplabv3": (1, 21, 224, 224),
    "transformer": (1, 128, 37_000),
}


def neighbour(name: str) -> ModuleType:
    """A file of the folder as a module."""
    with first_on_path(FOLDER):
        return importlib.import_module(name)


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def on_meta(name: str, **options: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What the factory of this name gives where nothing takes memory."""
    with torch.device("meta"):
        return neighbour("all").NETWORKS[name](**options)


def test_the_table_has_every_network():
    assert sorted(neighbour("all").NETWORKS) == sorted(name for _, name in SPECS)


@pytest.mark.parametrize(("name", "published"), EXACT.items())
def test_parameters_are_exactly_the_published(name: str, published: int):
    model, _ = on_meta(name)

    assert count(model) == published


@pytest.mark.parametrize(("name", "published"), WITH_AUXILIARY.items())
def test_parameters_with_the_auxiliary_head_are_exactly_the_published(name: str, published: int):
    model, _ = on_meta(name)
    auxiliary = neighbour("segmentation").fcn_head(1024)

    assert count(model) + count(auxiliary) == published


@pytest.mark.parametrize(("name", "published"), ROUNDED.items())
def test_parameters_are_about_what_the_paper_says(name: str, published: float):
    model, _ = on_meta(name)

    assert count(model) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("repeats", "filters", "published"), [(6, 208, 82e6), (6, 544, 542e6)])
def test_amoebanet_has_the_parameters_that_gpipe_gives_for_its_sizes(repeats: int, filters: int, published: float):
    """Nothing is published of the small one that the factory gives by itself; these are in GPipe's table 1."""
    model, _ = on_meta("amoebanet_d", repeats=repeats, filters=filters)

    assert count(model) == pytest.approx(published, rel=0.03)


def test_what_nobody_published_exactly_stays_as_it_is():
    counts = {name: count(on_meta(name)[0]) for name in ("transformer", "pnasnet_5", "amoebanet_d")}

    assert counts == {"transformer": 63_082_496, "pnasnet_5": 5_064_487, "amoebanet_d": 6_048_528}


@pytest.mark.parametrize(("file", "name"), SPECS)
def test_a_network_built_on_meta_gives_the_shape_of_its_classes(file: str, name: str):
    model, args = on_meta(name)

    with torch.inference_mode():
        out = model(*args)

    assert not model.training
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers(), *args, out)} == {"meta"}
    assert tuple(out.shape) == SHAPES.get(name, (1, 1000))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), SPECS)
def test_a_network_by_path_computes_finite_numbers_that_depend_on_its_input(file: str, name: str):
    model, args, _ = load_model(f"{FOLDER / file}.py:{name}", meta=False)
    others = tuple(tensor.flip(-1) for tensor in args)

    with torch.inference_mode():
        out, other = model(*args), model(*others)

    assert torch.isfinite(out).all()
    assert (out - other).std() > 0.001 * out.std()

"""Models with inputs of every kind, each planned in one process and applied in another: `python input_cases.py FOLDER`."""

import json
import math
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import memplan
import torch
from torch import nn
from torch.utils import _pytree as pytree

Pair = namedtuple("Pair", "first second")


class Mode(Enum):
    """A setting."""

    SUM = "sum"
    MEAN = "mean"


@dataclass
class Batch:
    """Tensors under names, registered as a pytree node."""

    x: torch.Tensor
    more: "Batch | None" = None


class Box:
    """A node whose class says something of its parts."""

    def __init__(self, parts: list[Any], scale: float):
        self.parts, self.scale = parts, scale


pytree.register_dataclass(Batch)
pytree.register_pytree_node(Box, lambda box: (box.parts, ("scale", box.scale)), lambda parts, said: Box(list(parts), said[1]))


class Net(nn.Module):
    """Takes whatever it is given: every tensor in it counts once by itself and once beside the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.embed = nn.Linear(8, 16), nn.Linear(16, 8), nn.Embedding(40, 8)

    def forward(self, x: Any = None, *rest: Any, **options: Any) -> torch.Tensor:
        total = self.first.weight.sum() * 0
        for each in pytree.tree_leaves((x, rest, options)):
            if not isinstance(each, torch.Tensor):
                continue
            if each.is_complex():
                each = torch.view_as_real(each).flatten(-2)
            if each.dtype is torch.bool:
                each = each.float()
            each = self.embed(each) if not each.is_floating_point() else each
            total = total + self.second(torch.tanh(self.first(each.float().reshape(-1, 8)))).square().mean()
        if isinstance(x, Box):
            total = total * x.scale
        return total * options.get("scale", 1.0) if math.isfinite(options.get("scale", 1.0)) else total.sin()


class Product(nn.Module):
    """Reads its one weight once, so that a gradient that comes through an input as well is a sum of two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) @ other).sin().sum()


class Typed(nn.Module):
    """Plain values of every kind decide what it does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *, dtype=torch.float32, device=None, size=None, mode=Mode.SUM, word="", turn=1j, raw=b"", rows=None):
        y = self.linear(x[rows] if rows is not None else x).to(dtype).to(device)
        y = y * turn.imag * (2 if word == "größe \U0001f600" else 1) * (1 + len(raw))
        y = y.reshape(size) if size is not None else y
        return (y.mean() if mode is Mode.MEAN else y.sum()).float()


def floats(*shape: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def turned() -> torch.Tensor:
    """Random complex numbers."""
    return torch.complex(floats(4, 4), floats(4, 4))


def ids() -> torch.Tensor:
    """Tokens."""
    return torch.arange(32).view(4, 8)


def twice(value: Any) -> tuple[Any, Any]:
    """One thing as two arguments."""
    return value, value


def grads(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Leaves that want gradients."""
    return tuple(value.requires_grad_() for value in tensors)


def weights(model: Net, how: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A view of a parameter beside an input of its own."""
    return floats(4, 8), how(model.first.weight.detach())


# name -> (model, its arguments and keyword arguments, made for a model)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], tuple[tuple, dict]]]] = {
    "one tensor twice": (Net, lambda _: (twice(ids()), {})),
    "one tensor twice by name": (Net, lambda _: ((), dict(zip(("x", "labels"), twice(ids()), strict=True)))),
    "a view of another": (Net, lambda _: ((base := ids(), base.view(8, 4)), {})),
    "halves": (Net, lambda _: (((base := floats(8, 8))[:4], base[4:]), {})),
    "overlapping": (Net, lambda _: (((base := floats(8, 8))[:6], base[2:]), {})),
    "shifted tokens": (Net, lambda _: (((base := torch.arange(36).view(4, 9))[:, :-1], base[:, 1:]), {})),
    "a part of more": (Net, lambda _: ((floats(100, 8)[40:44],), {})),
    "expanded": (Net, lambda _: ((floats(1, 8).expand(6, 8),), {})),
    "expanded beside its base": (Net, lambda _: ((base := floats(1, 8), base.expand(6, 8)), {})),
    "transposed": (Net, lambda _: ((base := floats(8, 8), base.t()), {})),
    "reinterpreted": (Net, lambda _: ((base := floats(4, 8), base.view(torch.int32).view(torch.float32)), {})),
    "wanting gradients twice": (Net, lambda _: (twice(*grads(floats(4, 8))), {})),
    "a parameter": (Product, lambda model: ((floats(4, 8), model.linear.weight), {})),
    "a view of a parameter": (Net, lambda model: (weights(model, lambda weight: weight.t()[:, 2:10]), {})),
    "complex": (Net, lambda _: ((turned(),), {})),
    "complex and its parts": (
        Net,
        lambda _: ((base := torch.complex(floats(4, 4), floats(4, 4)), torch.view_as_real(base)), {}),
    ),
    "bool": (Net, lambda _: ((floats(4, 8) > 0,), {})),
    "bfloat16": (Net, lambda _: ((floats(4, 8).bfloat16(),), {})),
    "empty": (Net, lambda _: ((floats(4, 8), [], {}, ()), {})),
    "nested": (Net, lambda _: (({"a": [floats(4, 8), (floats(2, 8), None)], 3: OrderedDict(b=floats(1, 8))},), {})),
    "named tuple": (Net, lambda _: ((Pair(*twice(floats(4, 8))),), {})),
    "dataclass": (Net, lambda _: ((Batch(floats(4, 8), Batch(floats(2, 8))),), {})),
    "node of one's own": (Net, lambda _: ((Box([floats(4, 8), floats(2, 8)], 0.5),), {})),
    "infinite": (Net, lambda _: ((floats(4, 8),), {"scale": math.inf})),
    "not a number": (Net, lambda _: ((floats(4, 8),), {"scale": math.nan})),
    "types": (Typed, lambda _: ((floats(4, 8),), {"dtype": torch.float64, "device": torch.device("cpu"), "turn": 2 + 3j})),
    "words": (Typed, lambda _: ((floats(4, 8),), {"word": "größe \U0001f600", "raw": b"\x00\xff", "mode": Mode.MEAN})),
    "sizes": (Typed, lambda _: ((floats(4, 8),), {"size": torch.Size([8, 4])})),
    "rows": (Typed, lambda _: ((floats(4, 8),), {"rows": slice(0, None, 2)})),
}
# what else a plan can be made with; each with inputs that share memory
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw by name": {"optimizer": "adamw"},
    "an optimizer": {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1)},
    "updates in backward": {
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1), "optimizer_in_backward": True
    },
    "arena": {"arena": True},
    "offload": {"allow": {"recompute", "reorder", "offload"}},
    "loss": {"loss": torch.square},
}  # fmt: skip
SHARED = ("one tensor twice by name", "shifted tokens", "a view of a parameter")
HARD = ("updates in backward", "arena")  # for each of these inputs


def every() -> dict[str, tuple[str, dict[str, Any]]]:
    """Each test's name, its case and its options."""
    return {case: (case, {}) for case in CASES} | {
        f"{case}, {name}": (case, options)
        for name, options in OPTIONS.items()
        for case in (SHARED if name in HARD else SHARED[:1])
    }


def built(case: str, options: dict[str, Any]) -> tuple[nn.Module, tuple, dict, dict[str, Any]]:
    """A fresh model, its arguments, and the options with an optimizer that holds its parameters."""
    make, call = CASES[case]
    model = make()
    args, kwargs = call(model)
    optimizer = options.get("optimizer")
    return model, args, kwargs, options | ({"optimizer": optimizer(model)} if callable(optimizer) else {})


def step(module: nn.Module, args: tuple, kwargs: dict, options: dict[str, Any]) -> list[torch.Tensor]:
    """A loss and all gradients; the parameters, where the step updates them."""
    found = module(*args, **kwargs)
    loss = options.get("loss", lambda value: value)(found)
    loss.backward()
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    made = [value.grad for value in (*module.parameters(), *inputs) if value.is_leaf and value.grad is not None]
    if options.get("optimizer_in_backward"):
        if any(value.grad is not None for value in module.parameters()):
            options["optimizer"].step()
        return [loss.detach(), *(value.detach().clone() for value in module.parameters())]
    return [loss.detach(), *made]


def alike(name: str, folder: Path) -> str:
    """What is wrong with a plan that another process saved; empty where it gives eager's bits."""
    case, options = every()[name]
    wanted = step(*built(case, options))
    model, args, kwargs, options = built(case, options)
    given = {"optimizer": options["optimizer"]} if options.get("optimizer_in_backward") else {}
    given |= {"loss": options["loss"]} if "loss" in options else {}
    planned = memplan.load(folder / f"{name}.json").apply(model, **given)
    found = step(planned, args, kwargs, options)
    if len(found) != len(wanted):
        return f"{len(found)} results, not {len(wanted)}"
    return "" if all(map(torch.equal, found, wanted)) else "other bits"


if __name__ == "__main__":
    sys.modules["input_cases"] = sys.modules["__main__"]  # classes are named by the module that the test imports
    answers = {}
    for name in every():
        try:
            answers[name] = alike(name, Path(sys.argv[1]))
        except memplan.MemplanError as error:
            answers[name] = str(error)
    print(json.dumps(answers))

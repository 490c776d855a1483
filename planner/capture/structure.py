"""What a plan rests on of a model beside its tensors: its modules, how they are set, and which names are one tensor."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

PLAIN = bool | int | float | str | torch.dtype | None
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Structure:
    """A model at one moment. Two that are equal may still trace otherwise, where a module keeps what it does in an object.

    Attributes:
        modules: name and class of each.
        settings: (module, attribute, value) of every attribute that is a number, a word, a type or None.
        hooks: the keys, in torch's tables, of those of each module that see or change values.
        tied: names that are one parameter or buffer.
    """

    modules: tuple[tuple[str, type], ...]
    settings: tuple[tuple[str, str, Any], ...]
    hooks: tuple[tuple[int, ...], ...]
    tied: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(model: nn.Module) -> "Structure":
        """A model's structure now."""
        named = list(model.named_modules(remove_duplicate=False))
        return Structure(
            modules=tuple((name, type(module)) for name, module in named),
            settings=tuple((name, key, value) for name, module in named for key, value in settings_of(module)),
            hooks=tuple(tuple(key for table in hooks_of(module) for key in table) for _, module in named),
            tied=tied_names(model),
        )


def settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes of plain values, but for those that are torch's own."""
    for key, value in vars(module).items():
        if isinstance(value, PLAIN) and not key.startswith("_") and key != "training":
            yield key, value


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The tables of a module's hooks that see or change values."""
    return [vars(module)[table] for table in HOOKS if vars(module).get(table) is not None]


def everywhere(attribute: str) -> dict[int, Any]:
    """The table of hooks that every module calls."""
    return vars(sys.modules[nn.Module.__module__]).get(f"_global{attribute}", {})


def tied_names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names of one parameter or buffer each, where it has several."""
    groups: dict[int, list[str]] = {}
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, value in every:
        groups.setdefault(id(value), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)

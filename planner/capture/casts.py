"""Which casts of a traced model are autocast's, whose cache the tracer forbids; `restore.py` makes up for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .constants import Constants

CASTS = {"to", "type", "type_as", "bfloat16", "half"}


class _Asked(TorchFunctionMode):
    """Tells the tracer which casts the model itself asks for, as opposed to autocast's."""

    def __init__(self, mode: Constants):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.mode.asked = getattr(func, "__name__", "") in CASTS
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.mode.asked = False


@contextmanager
def cached_casts(mode: Constants, on: bool) -> Iterator[None]:
    """While a model is called, say that autocast's cache is on, as it is in eager mode and the tracer forbids.

    Nothing gets into it: `planner/capture/restore.py` does what it would have done.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(on)
    try:
        with _Asked(mode) if on and mode.region is not None else nullcontext():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)

"""What of a model by name can be made larger or smaller: its batch, its sequence, its depth."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from .byname import DEPTHS, Loaded, Ours, factory_of, load_factory, load_model
from .spec import ModelError, check_spec, split_query

KNOBS = ("batch", "seq", "layers")


@dataclass(frozen=True)
class Knob:
    """One size of a model that can be turned.

    Attributes:
        over: its name.
        base: what it is in the model's name.
        make: the model with another, on meta where `load_model` can put it there; raises `ModelError` where there is none.
    """

    over: str
    base: int
    make: Callable[[int], Loaded]


def knob_of(spec: str, over: str) -> Knob | None:
    """A knob of a model by name; None for a factory that has no argument of this name.

    Args:
        spec: see `planner/models/spec.py`. Of an `hf:` model batch and seq are those of its example, and layers its depth: that
            of the encoder and of the decoder, where it has both. Any other model is a factory, whose argument `over` it is.
        over: one of `KNOBS`.

    Raises:
        ModelError: the model cannot be loaded, or an `hf:` model has no such size.
    """
    if not check_spec(spec).startswith("hf:"):
        return factory_knob(spec, over)
    name, pairs = split_query(spec)
    config = getattr(load_model(spec, meta=True)[0], "config", None)
    if over != "layers":
        base = int(pairs[over]) if over in pairs else vars(Ours())[over]
        return Knob(over, base, lambda size: load_with(name, pairs, {over: size}))
    depths = depths_of(config)
    if not depths:
        raise ModelError(f"hf:{name} has no number of layers: fit it over batch")
    return Knob(over, max(depths.values()), lambda size: load_with(name, pairs, dict.fromkeys(depths, size)))


def depths_of(config: Any) -> dict[str, int]:
    """The depths that a configuration states, each by one name."""
    names = getattr(config, "attribute_map", {})
    found = {names.get(key, key): getattr(config, key, None) for key in DEPTHS}
    return {key: depth for key, depth in found.items() if isinstance(depth, int) and depth > 0}


def load_with(name: str, pairs: dict[str, str], sizes: dict[str, int]) -> Loaded:
    """An `hf:` model with other sizes than its name says, on meta."""
    turned = {*sizes, *(DEPTHS if set(sizes) & set(DEPTHS) else ())}
    kept = {key: value for key, value in pairs.items() if key not in turned}
    return load_model(f"hf:{name}?{urlencode(kept | sizes)}", meta=True)


def factory_knob(spec: str, over: str) -> Knob | None:
    """A factory's own argument."""
    try:
        known = inspect.signature(factory_of(spec)).parameters.get(over)
    except ValueError:  # no signature is known of some built-in ones
        return None
    if known is None:
        return None
    base = known.default if isinstance(known.default, int) and known.default > 0 else 1
    return Knob(over, base, lambda size: load_factory(spec, **{over: size}))

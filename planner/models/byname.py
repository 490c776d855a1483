"""Models by name, for the command line: `planner/models/spec.py` has the names.

A factory returns `(model, args)` or `(model, args, kwargs)`.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import MemplanError
from .spec import ModelError, check_spec, is_file_name, split_query, suggestion

Loaded = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def load_model(spec: str, *, meta: bool) -> Loaded:
    """The model that `spec` names, in training mode, with example arguments.

    Args:
        spec: see `planner/models/spec.py`.
        meta: put a transformers model and its inputs on the meta device, where they take no memory. A factory decides
            for itself where its model is.

    Raises:
        ModelError: what is wrong with `spec`, in one line.
    """
    if check_spec(spec).startswith("hf:"):
        return load_transformers(spec, meta=meta)
    return load_factory(spec)


def load_factory(spec: str, **sizes: int) -> Loaded:
    """What a factory makes, with sizes among its arguments.

    Raises:
        ModelError: it asks for others, fails, or returns something else.
    """
    factory = factory_of(spec)
    check_factory(spec, factory, **sizes)
    torch.manual_seed(0)
    with one_line(spec):
        result = factory(**sizes)
    parts = result if isinstance(result, tuple) else (result,)
    if len(parts) == 2:
        parts = (*parts, {})
    model, args, kwargs = parts if len(parts) == 3 else (None, None, None)
    if not isinstance(model, nn.Module) or not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        found = ", ".join(type(part).__name__ for part in (result if isinstance(result, tuple) else (result,)))
        raise ModelError(f"{spec} must return (model, args) or (model, args, kwargs) with args a tuple, not ({found})")
    return model, tuple(args), kwargs


def factory_of(spec: str) -> Callable[..., Any]:
    """The function that a name which is no `hf:` names."""
    place, _, name = spec.rpartition(":")
    return find_factory(place, name)


def check_factory(spec: str, factory: Callable[..., Any], **sizes: int) -> None:
    """Refuse a factory that cannot be called with these arguments alone.

    Raises:
        ModelError: what it asks for.
    """
    try:
        inspect.signature(factory).bind(**sizes)
    except TypeError as error:
        raise ModelError(f"{spec}: {error}; a factory takes no arguments, and returns (model, args)") from None
    except ValueError:  # no signature is known of some built-in ones
        pass


def find_factory(place: str, name: str) -> Callable[[], Any]:
    """The function `name` of the file or module `place`."""
    if is_file_name(place):
        path = Path(place)
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ModelError(f"{place} is not a Python file: write path/to/file.py:factory")
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickling look their module up
        with one_line(place), first_on_path(path.parent):
            found.loader.exec_module(module)
    else:
        with one_line(place), first_on_path(Path.cwd()):
            try:
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                if f"{place}.".startswith(f"{error.name}."):
                    raise ModelError(
                        f"no module {error.name}: write path/to/file.py:factory or package.module:factory"
                    ) from None
                raise
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ModelError(f"{place} has no function {name!r}{suggestion(name, functions)}")
    return factory


@contextmanager
def first_on_path(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as it could if it were run."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one line with its type, message and place."""
    try:
        yield
    except (MemplanError, MemoryError):
        raise
    except SyntaxError as error:
        raise ModelError(f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a file that ends its process must not end this one
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        raise ModelError(f"{what} failed at {last.filename}:{last.lineno}: {type(error).__name__}: {message}") from error


# --- transformers


@dataclass(frozen=True)
class Task:
    """How models of one head are built and fed.

    Attributes:
        heads: the `transformers` class that picks the model for a configuration.
        inputs: example inputs for a configuration and our own settings.
        loss: the value of `loss_type`, for configurations that do not find it out themselves.
        mapping: where `transformers` says which model types have this head.
    """

    heads: str
    mapping: str
    inputs: "Callable[[Any, Ours], dict[str, Tensor]]"
    loss: str | None = None


@dataclass(frozen=True)
class Ours:
    """The names in an `hf:` query that are not the configuration's: the example batch, and the element type."""

    batch: int = 1
    seq: int = 128
    image: int = 0
    dtype: str = "float32"

    @property
    def element(self) -> torch.dtype:
        """The torch type that `dtype` names."""
        element = getattr(torch, self.dtype, None)
        if not isinstance(element, torch.dtype) or not element.is_floating_point:
            raise ModelError(f"unknown dtype {self.dtype!r}: write float32, bfloat16 or float16")
        return element


def tokens(config: Any, ours: Ours) -> Tensor:
    """Random token ids of shape (batch, seq), no longer than a table of learned positions."""
    check_positions(config, ours.seq)
    return torch.randint(text_part(config).vocab_size, (ours.batch, ours.seq))


def check_positions(config: Any, seq: int) -> None:
    """Refuse a sequence that is longer than a table of learned positions, where the configuration has one.

    Raises:
        ModelError: how long it may be.
    """
    text = text_part(config)
    most = getattr(text, "max_position_embeddings", None)
    if not getattr(text, "rope_parameters", None) and isinstance(most, int) and 0 < most < seq:
        remedy = "lower seq or raise max_position_embeddings"
        raise ModelError(f"seq={seq} is longer than the {most} positions of the model: {remedy}")


def text_part(config: Any) -> Any:
    """The part of a configuration that speaks of tokens: itself, but for those that nest one."""
    return config.get_text_config(decoder=True)


def text_inputs(config: Any, ours: Ours) -> dict[str, Tensor]:
    """Tokens that are their own labels."""
    ids = tokens(config, ours)
    return {"input_ids": ids, "labels": ids.clone()}


def image_inputs(config: Any, ours: Ours) -> dict[str, Tensor]:
    """Square images and their classes."""
    size = ours.image or image_size(config)
    pixels = torch.randn(ours.batch, getattr(config, "num_channels", 3), size, size, dtype=ours.element)
    return {"pixel_values": pixels, "labels": torch.randint(0, config.num_labels, (ours.batch,))}


def image_size(config: Any) -> int:
    """The side length that the configuration asks for; 224, as is usual, where it asks for none."""
    size = getattr(config, "image_size", 224)
    return size if isinstance(size, int) else size[0]


def speech_inputs(config: Any, ours: Ours) -> dict[str, Tensor]:
    """Spectrogram frames (the encoder takes two per position) and the text as labels."""
    frames = torch.randn(ours.batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=ours.element)
    return {"input_features": frames, "labels": tokens(config, ours)}


# How many layers there are, by the names that configurations have for it: known when a configuration is made, for some make
# lists then that have an entry for each layer.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")

# In order of preference. A model type takes the first task that knows it.
MODELS = "transformers.models.auto.modeling_auto"
TASKS = (
    Task("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", speech_inputs),
    Task("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", text_inputs),
    Task("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", text_inputs),
    Task("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", text_inputs, "ForCausalLM"),
    Task("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", image_inputs),
)


def load_transformers(spec: str, *, meta: bool) -> Loaded:
    """A transformers model by configuration name, with random weights from seed 0 and inputs that give a loss."""
    import transformers

    name, pairs = split_query(spec)
    known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    if name not in known:
        raise ModelError(f"transformers has no model type {name!r}{suggestion(name, known)}")
    tables = importlib.import_module(MODELS)
    task = next((task for task in TASKS if name in getattr(tables, task.mapping)), None)
    if task is None:
        raise ModelError(f"hf:{name} is no language or image model with a loss: write a factory in a file instead")
    ours = Ours(**{key: converted(key, pairs.pop(key), default) for key, default in vars(Ours()).items() if key in pairs})
    if min(ours.batch, ours.seq) < 1 or ours.image < 0:
        raise ModelError("batch, seq and image must be positive")
    with one_line(spec):
        config = configured(plain(transformers.AutoConfig, name, pairs), name, pairs)
        torch.manual_seed(0)
        with torch.device("meta" if meta else "cpu"):
            model = getattr(transformers, task.heads).from_config(config, dtype=ours.element).train()
            inputs = task.inputs(config, ours)
    if task.loss is not None:
        model.loss_type = task.loss
    return model, (), inputs


def plain(configurations: Any, name: str, overrides: dict[str, str]) -> Any:
    """The configuration with no other override than its depth, for which it makes its lists of layers."""
    known = settings_of(configurations.for_model(name))
    depths = {key: int(overrides[key]) for key in DEPTHS if key in known and overrides.get(key, "").isdecimal()}
    return configurations.for_model(name, **depths)


def configured(config: Any, name: str, overrides: dict[str, str]) -> Any:
    """The configuration with the user's overrides, checked; without the cache that only generation needs.

    A setting of a nested configuration has the name of the nest before it: `text_config.hidden_size`.
    """
    for path, text in overrides.items():
        *nests, key = path.split(".")
        part, prefix = config, ""
        for nest in nests:
            if nest not in nested_parts(part):
                raise ModelError(f"hf:{name} has no part {prefix + nest!r}{suggestion(nest, nested_parts(part))}")
            part, prefix = nested_parts(part)[nest], f"{prefix}{nest}."
        known = settings_of(part)
        if key not in known:
            names = known if nests else [*known, *vars(Ours())]
            raise ModelError(f"hf:{name} has no setting {path!r}{suggestion(key, names)}")
        value = converted(path, text, known[key], annotation(part, key))
        if is_negative(key, value, known[key]):
            raise ModelError(f"{path}={text} does not fit: it must be 0 or more, as in {path}={known[key]}")
        setattr(part, key, value)
    for part in (config, text_part(config)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    for token in ("pad_token_id", "decoder_start_token_id") if config.is_encoder_decoder else ():
        # Missing, or beyond a vocabulary that was made smaller: any token will do for made-up text.
        index = getattr(config, token, None)
        if index is None or not 0 <= index < text_part(config).vocab_size:
            setattr(config, token, 0)
    return config


def is_negative(key: str, value: Any, default: Any) -> bool:
    """Whether a size is below 0. Tokens may be, where there are none, and so may windows that are everything."""
    sizes = isinstance(value, int) and isinstance(default, int) and not isinstance(default, bool)
    return sizes and value < 0 < default and not re.search("token|window|attention", key)


def settings_of(config: Any) -> dict[str, Any]:
    """What can be set of a configuration, by every name that it goes by, and its value."""
    known = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return known | {key: getattr(config, key) for key in (*config.attribute_map, "num_labels") if hasattr(config, key)}


def annotation(config: Any, key: str) -> Any:
    """The type that a configuration's class names for a setting, or None."""
    key = config.attribute_map.get(key, key)
    notes = [vars(cls).get("__annotations__", {}) for cls in type(config).__mro__]
    return next((note[key] for note in notes if key in note), None)


def nested_parts(config: Any) -> dict[str, Any]:
    """The configurations inside one, by name."""
    return {key: part for key, part in vars(config).items() if hasattr(part, "attribute_map")}


def converted(key: str, text: str, default: object, hint: object = None) -> Any:
    """`text` as a value of the type of `default`, or of a type that the annotation `hint` names."""
    words = set(re.findall(r"\w+", str(hint)))  # as text: annotations name types that are not always imported
    if text.lower() in ("none", "null") and (default is None or words & {"None", "NoneType", "Optional"}):
        return None
    named = [kind for kind in (bool, int, float, list, str) if kind.__name__ in words]
    kinds = named if default is None else [type(default), *named]
    for kind in kinds or [int, float, str]:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (list, tuple):
            return kind(int(part) if part.lstrip("-").isdigit() else part for part in text.strip("[]()").split(","))
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    raise ModelError(f"{key}={text} does not fit: it must be {names or 'a number or a word'}, as in {key}={default}")

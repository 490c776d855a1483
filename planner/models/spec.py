"""A model's name on the command line, as far as it can be read without torch.

path/to/file.py:factory      a function in a file
package.module:factory       a function in a module
hf:llama?num_hidden_layers=4&batch=1&seq=128     a transformers configuration with overrides; nothing is downloaded.
                             A setting of a configuration inside it is text_config.hidden_size, say
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qsl

from ..ir.errors import MemplanError

FORMS = "path/to/file.py:factory, package.module:factory or hf:gpt2?n_layer=2"


class ModelError(MemplanError, ValueError):
    """A model that cannot be found, built or called; the message says what to write instead."""


def check_spec(spec: str) -> str:
    """The spec itself, if it can be read and the file it names is there.

    Raises:
        ModelError: what is wrong with it, and what to write.
    """
    if spec.startswith("hf:"):
        split_query(spec)
        if find_spec("transformers") is None:
            raise ModelError("hf: models need transformers: pip install 'memplan[hf]'")
        return spec
    place, colon, name = spec.rpartition(":")
    if not colon and Path(spec).is_file():
        raise ModelError(f"{spec!r} names a file: name the function in it that returns (model, args), as in {spec}:factory")
    if not colon or not place or not name:
        hint = f", as in hf:{spec}" if spec.partition("?")[0] in model_types() else ""
        raise ModelError(f"cannot read the model {spec!r}: write {FORMS}{hint}")
    if is_file_name(place) and not Path(place).is_file():
        raise ModelError(f"no file {place}: write path/to/file.py:factory")
    return spec


def is_file_name(place: str) -> bool:
    """Whether what stands before the colon is a file, and not a module."""
    return place.endswith(".py") or os.sep in place


def split_query(spec: str) -> tuple[str, dict[str, str]]:
    """The model type of `hf:type?setting=value&...`, and the settings.

    Raises:
        ModelError: they cannot be read, or one is given twice.
    """
    name, _, rest = spec.removeprefix("hf:").partition("?")
    try:
        pairs = parse_qsl(rest, keep_blank_values=True, strict_parsing=True) if rest else []
    except ValueError:
        raise ModelError(f"cannot read {rest!r} after hf:{name}?: write name=value&name=value") from None
    settings = dict(pairs)
    for key, value in pairs:
        if settings[key] != value:
            raise ModelError(f"hf:{name} is given {key}={value} and {key}={settings[key]}: leave one out")
    return name, settings


def model_types() -> list[str]:
    """The transformers model types that its own tables name. They are read as text: to import them takes seconds."""
    found = find_spec("transformers")
    folders = [Path(place) / "models" / "auto" for place in (found.submodule_search_locations or ())] if found else []
    files = [folder / name for folder in folders for name in ("auto_mappings.py", "configuration_auto.py")]
    texts = [path.read_text() for path in files if path.is_file()]
    return sorted({name for text in texts for name in re.findall(r'\("([\w.-]+)", "\w+Config"\)', text)})


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?`, or what there is where nothing is close and the list is short."""
    known = sorted(known)
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; it has {', '.join(known)}" if 0 < len(known) <= 12 else ""

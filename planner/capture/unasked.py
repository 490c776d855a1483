"""Questions about an input's values that a library asks only to warn, which tracing could not answer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ASKED = ("transformers.modeling_utils", "PreTrainedModel", "warn_if_padding_and_no_attention_mask")


@contextmanager
def unasked() -> Iterator[None]:
    """Trace without them: transformers looks for padding in tokens without a mask, and goes on whatever it finds.

    So do torch's distributions, which look whether their parameters are sound: a planned step does not look.
    """
    with unvalidated(), unwarned():
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """Let distributions take their parameters as they are, where nobody has asked for more (`validate_args=True`)."""
    known = getattr(sys.modules.get("torch.distributions"), "Distribution", None)
    if known is None:
        yield
        return
    kept = known._validate_args
    known.set_default_validate_args(False)
    try:
        yield
    finally:
        known.set_default_validate_args(kept)


@contextmanager
def unwarned() -> Iterator[None]:
    """Let transformers not look for padding."""
    module, owner, name = ASKED
    asking = getattr(sys.modules.get(module), owner, None)
    if asking is None or name not in vars(asking):
        yield
        return
    kept = vars(asking)[name]
    setattr(asking, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(asking, name, kept)

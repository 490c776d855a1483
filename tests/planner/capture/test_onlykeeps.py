"""What a hook's code says of it: what is taken for a mere store does nothing else; what returns no value is known to."""

import logging
from functools import partial

import pytest
import torch
from memplan.planner.capture.onlykeeps import may_return, only_keeps
from torch import nn

STORE: dict = {}
LOG = logging.getLogger(__name__)


class Keeper:
    """Keeps what it sees in attributes, some of which have effects."""

    def __init__(self):
        self.seen, self.last, self.logger, self.callbacks = {}, None, LOG, [print]

    def keep(self, module, args, output):
        self.seen[type(module).__name__] = self.first(output).detach()

    def first(self, output):
        return output[0] if isinstance(output, tuple) else output

    def tell(self, module, args, output):
        self.last = output
        self.logger.info("seen")

    def call(self, module, args, output):
        self.last = output
        self.callbacks[0](output)

    def __call__(self, module, args, output):
        self.last = torch.relu(output).mean()


def helped(module, args, output):
    """By another function."""
    STORE["h"] = doubled(output)


def doubled(value):
    """Of torch alone."""
    return nn.functional.gelu(value) * 2


def prints(module, args, output):
    """And keeps."""
    STORE["h"] = output
    print(output)


def prints_below(module, args, output):
    """In a function that it calls."""
    STORE["h"] = output
    prints(module, args, output)


def imports(module, args, output):
    """Something of which nothing is known."""
    import json

    STORE["h"] = json.dumps(output)


KEEP = [Keeper().keep, Keeper(), helped, partial(Keeper().keep), lambda module, args, output: STORE.update(h=output)]
DO_MORE = [
    lambda module, args, output: torch.save(output, "file"),
    Keeper().tell,
    Keeper().call,
    prints,
    prints_below,
    imports,
    print,
    lambda *given: LOG.info(given),
]


@pytest.mark.parametrize("hook", KEEP)
def test_hooks_that_only_keep_are_known(hook):
    """By attributes, containers, functions of their own, and torch's."""
    assert only_keeps(hook)


@pytest.mark.parametrize("hook", DO_MORE)
def test_hooks_that_may_do_more_are_not_taken_for_such(hook):
    """A name is enough of which it is not known that it has no effects."""
    assert not only_keeps(hook)


def sometimes(module, args, output):
    """Returns a value."""
    if output is not None:
        return output * 2
    return None


def never(module, args, output):
    """Returns early, and from a block."""
    with torch.no_grad():
        if output is None:
            return
        STORE["h"] = output


@pytest.mark.parametrize(("hook", "may"), [(sometimes, True), (never, False), (Keeper().keep, False), (Keeper().first, True),
                                           (lambda *given: given[0], False), (print, True)])  # fmt: skip
def test_whether_a_hook_may_return_a_value(hook, may):
    """Of functions by what they return; a lambda is left to the step that calls it, and what is not Python's is not trusted."""
    assert may_return(hook) == may

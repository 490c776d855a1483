"""The verb: `within(model, budget)`, a model that keeps a budget at every call, whatever the batch is.

`plan` is for one call of one shape. This plans at its first call for what comes, and again for what comes new: another shape,
other answers to what the model asks of a mask, gradients that are there already, a second call before the first one's backward
pass, layers that have been frozen, cast or replaced. What was planned is kept, and picked by a look at the call.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..ir.machine import Machine
from ..ir.units import parse_bytes
from .arguments import Progress, check_model, check_numbers
from .session import Session
from .sizes import SizedPlans

if TYPE_CHECKING:
    from torch import nn

    from ..capture.symbols import Dynamic

LATER = 10.0  # seconds of planning, at most, for a kind of call that is not the first


def within(
    model: "nn.Module",
    budget: int | str,
    *,
    loss: Callable[[Any], Any] | None = None,
    optimizer: Any = None,
    machine: str | Machine | None = None,
    allow: Iterable[str] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    reserved: int | str = 0,
    progress: Progress | None = None,
) -> "nn.Module":
    """A model that keeps a budget at every call: same class, same parameters, same numbers.

    Args:
        model: its parameters are not touched. The result shares them, its submodules and its name in every message.
        budget: bytes of physical peak, everything counted: 17179869184, "16GiB", "16GB".
        loss: from the model's output to a scalar, where the caller computes it, so that its memory is counted. By default
            the model's own loss (its output, or its `.loss`), or else any loss of its outputs, which is taken to need as much
            again as they do.
        optimizer: as for `plan`: its state and its step's temporaries are counted.
        machine: as for `plan`.
        allow: as for `plan`.
        time_limit: seconds of measuring and planning for the first call; a later kind of call takes at most ten.
        seed: of the search.
        reserved: bytes of the budget that are left to others.
        progress: is told (stage, fraction of it).

    Returns:
        A module that plans at its first training call. Calls without gradients (evaluation, generation) run as they are. What
        cannot be planned runs as it is too, and is said once, in an `UnplannedWarning`.

    Raises:
        BudgetError: the budget is no size; from a call: no schedule fits it, for this batch.
        MemplanError: an argument that makes no sense.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> model = memplan.within(model, "1MiB", loss=lambda out: out.sum())
        >>> for rows in (8, 3, 8):
        ...     model(torch.randn(rows, 64)).sum().backward()
    """
    check_model(model, None)
    check_numbers(time_limit, seed)
    allowed = parse_bytes(budget)
    spare = 0 if reserved == 0 else parse_bytes(reserved, what="number of bytes reserved")
    from ...backends.eager.within import Within

    def session_of(model: "nn.Module", args: tuple, kwargs: dict[str, Any], first: bool, dynamic: "Dynamic | None") -> Session:
        """A call captured, the first one's ops measured."""
        return Session(
            model, args, kwargs, loss=loss, optimizer=optimizer, machine=machine, allow=allow, seed=seed, progress=progress,
            time_limit=time_limit if first else min(time_limit, LATER), outside=True, measured=first, dynamic=dynamic,
        )  # fmt: skip

    module = copy.copy(model)
    module.forward = Within(module, copy.copy(model), allowed, spare, session_of, SizedPlans)  # type: ignore[method-assign]
    return module

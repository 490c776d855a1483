"""Several calls of a planned module in one backward pass: where eager PyTorch would add gradients in another order, it is said.

A planned step is one node of autograd, which returns one gradient for each parameter. Where a parameter is used several times
in a step, eager mode adds each of its terms to what the later calls have left, ((b2 + b1) + a2) + a1; of two planned steps
autograd adds the sums, (b2 + b1) + (a2 + a1). A step that is planned for several calls adds term by term itself
(`planner/capture/accumulate.py`). And under autocast eager mode keeps one cast of a parameter for all calls in the same region,
and adds up their gradients in 16 bits; planned steps cast theirs back first.
"""

import warnings

import torch

from ...planner.capture.graph import Traced

HALF = (torch.float16, torch.bfloat16)
EARLIER = ("gradients of an earlier one are there, to which each call adds its own, where eager mode adds the calls' first: "
           "last bits differ")  # fmt: skip
ADVICE = "call backward() after each call, or plan for them (calls=), for eager's very bits"


class Together:
    """Says once that calls that share a backward pass have not eager's last bits.

    Attributes:
        why: what of the step makes a difference; None where nothing does.
        last: the backward pass in which a step of the module ran last.
        there: whether there were gradients before it, to which the steps add theirs.
        told: whether something has been said.
        advice: what to do for eager's bits.
    """

    def __init__(self, traced: Traced, advice: str = ADVICE):
        self.why, self.advice = reason(traced), advice
        self.last = -1
        self.there = self.told = False

    def note(self, there: bool = False) -> None:
        """A step's backward pass begins; `there` if it adds to gradients that there were before."""
        number = getattr(torch._C, "_current_graph_task_id", lambda: -1)()
        if number < 0 or number != self.last:
            self.there = there
        why = self.why or (EARLIER if self.there and not self.told else None)
        if number >= 0 and number == self.last and why is not None:
            warnings.warn(f"several calls of a planned module share one backward pass, and {why}; {self.advice}", stacklevel=3)
            self.why, self.told = None, True
        self.last = number


def reason(traced: Traced) -> str | None:
    """What makes the gradients of two calls together other than eager's, in their last bits."""
    returned = [(traced.sources[place].name, gradient) for place, gradient in traced.gradients]
    for name, gradient in [*returned, *(pair for row in traced.updates.values() for pair in row)]:
        target = gradient.target
        first = next(iter(gradient.all_input_nodes), None)
        if target == torch.ops.aten._to_copy.default and first is not None and first.meta["val"].dtype in HALF:
            return (f"{name} is cast by autocast, whose cache lets eager mode add up the gradients of all calls in 16 bits: "
                    "planned ones are added up in the parameter's type")  # fmt: skip
        if target == torch.ops.aten.add.Tensor and len(gradient.all_input_nodes) == 2:
            return (f"{name} is used several times in each, whose gradients are added up call by call, where eager mode adds "
                    "term by term: last bits differ")  # fmt: skip
    return None

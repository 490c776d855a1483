"""A torch optimizer run piece by piece: each parameter's update when the schedule says, by the optimizer's own code.

For the parameters of one op the optimizer's `step` is called on a stand-in of it that holds those alone and shares its state
and settings. Kernels, order of operations and state are therefore the optimizer's, and so are the bits; what it does for
several parameters at once must not depend on the others, as in all of torch's that memplan counts.
"""

from typing import Any

import torch
from torch import nn

from ...planner.capture.capture import trainable
from ...planner.capture.graph import Traced
from ...planner.ir.errors import MemplanError, PlanMismatch


class Updates:
    """The updates of one model's parameters by one optimizer.

    Attributes:
        done: how many parameters of this step have been updated.
        begun: how many more an update was begun of, if it has failed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, traced: Traced):
        """Pair parameters with their settings.

        Raises:
            PlanMismatch: the optimizer holds other parameters than the one planned for.
            MemplanError: it, or a parameter, has hooks that would not be called as in an ordinary step.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        self.optimizer = optimizer
        self.rows = {op: [named[name] for name, _ in pairs] for op, pairs in traced.updates.items()}
        self.done = self.begun = 0
        wanted = {name for pairs in traced.updates.values() for name, _ in pairs}
        held = trainable(model, optimizer)
        left = {traced.sources[place].name for place, _ in traced.gradients} & held
        for name in sorted((wanted - held) | left)[:1]:
            does = "does not hold" if name in wanted else "holds"
            raise PlanMismatch(f"the optimizer {does} {name}, unlike the one planned for: plan again with this optimizer")
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise MemplanError("the optimizer has hooks on its step, which updates in backward would call for each parameter: "
                               "remove them, or plan without optimizer_in_backward")  # fmt: skip
        for value in (value for row in self.rows.values() for value in row):
            if value._backward_hooks or value._post_accumulate_grad_hooks:
                raise MemplanError("a parameter has hooks on its gradient, which updates in backward would pass by: "
                                   "remove them, or plan without optimizer_in_backward")  # fmt: skip
        self.groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}

    def begin(self) -> None:
        """A step starts.

        Raises:
            MemplanError: gradients are left over from elsewhere.
        """
        self.done = self.begun = 0
        for row in self.rows.values():
            if any(value.grad is not None for value in row):
                raise MemplanError("a parameter has a gradient already, to which a plan that updates in backward cannot add: "
                                   "call optimizer.zero_grad() first")  # fmt: skip

    def update(self, op: int, gradients: list[torch.Tensor]) -> None:
        """Run one update op."""
        kind, row = type(self.optimizer), self.rows[op]
        alone = object.__new__(kind)
        alone.__dict__.update(self.optimizer.__dict__)
        groups: dict[int, dict[str, Any]] = {}
        for value in row:
            group = self.group_of(value)
            groups.setdefault(id(group), {**group, "params": []})["params"].append(value)
        alone.param_groups = list(groups.values())
        self.begun = len(row)
        try:
            for value, gradient in zip(row, gradients, strict=True):
                value.grad = gradient
            kind.step(alone)
        finally:
            for value in row:
                value.grad = None
        for value in row:
            torch.autograd.graph.increment_version(value)  # it runs below autograd, which therefore sees nothing
        self.done, self.begun = self.done + len(row), 0

    def group_of(self, value: torch.Tensor) -> dict[str, Any]:
        """The settings for a parameter, as they are now: schedulers change them, and `load_state_dict` replaces them."""
        group = self.groups.get(id(value))
        if group is None or not any(group is known for known in self.optimizer.param_groups):
            self.groups = {id(held): known for known in self.optimizer.param_groups for held in known["params"]}
            group = self.groups[id(value)]
        return group

    def explain(self, error: Exception) -> MemplanError:
        """The error of a step that has failed halfway."""
        total = sum(map(len, self.rows.values()))
        done = f"{self.done} of {total} parameters" + (f", and begun with {self.begun} more" if self.begun else "")
        return MemplanError(f"the step failed after it had updated {done}: go back to a checkpoint ({error})")

"""What the options of a planning command say together, as the API takes it; and what they may not say together.

An option that would do nothing is refused: somebody believes that it does something. All of this is known before the model is.
"""

from typing import Any

import typer

from ..ir.machine import named_machine
from ..ir.schedule import LEVERS
from .options import Optimizer, Rule


def planning(
    allow: list[str] | None = None,
    optimizer: Optimizer | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    *,
    infer: bool = False,
    machine: str | None = None,
    arena: bool = False,
    lend_gradients: bool = False,
    strategy: Rule | None = None,
    host_budget: str | None = None,
    in_backward: bool = False,
    solver: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `memplan.plan`.

    Raises:
        typer.BadParameter: two options contradict each other, or one does nothing beside the others.
    """
    words = {word.strip() for text in allow or [] for word in text.split(",")} - {""}
    levers = words if allow else set(LEVERS) if strategy else set()
    refuse(
        (bool(allow) and not words, "--allow is empty: name a lever, or leave it out"),
        (infer and optimizer is not None, "--infer plans no optimizer's step: leave out --optimizer"),
        (in_backward and infer, "--optimizer-in-backward updates in a backward pass: leave out --infer"),
        (in_backward and optimizer is None, "--optimizer-in-backward does nothing without --optimizer"),
        (lend_gradients and not arena, "--lend-gradients lends gradients that lie in an arena: give --arena too"),
        (lend_gradients and infer, "--lend-gradients does nothing with --infer: there are no gradients"),
        (strategy is not None and arena, f"--strategy {strategy} has no addresses: leave out --arena"),
        (strategy is not None and infer, f"--strategy {strategy} is a rule for training: leave out --infer"),
        (strategy is not None and "offload" not in levers, f"--strategy {strategy} moves activations: --allow offload too"),
        (strategy is not None and solver is not None, f"--strategy {strategy} solves no program: leave out --solver"),
        (
            solver is not None and levers == {"reorder"},
            f"--solver {solver} does nothing: --allow reorder alone leaves nothing to solve",
        ),
        (
            host_budget is not None and "offload" not in levers,
            "--host-budget limits what is moved, and nothing is: give --allow offload too",
        ),
    )
    known = named_machine(machine)
    bare = known is not None and len(known.tiers) == 1
    refuse(
        (host_budget is not None and bare, f"--host-budget does nothing: {machine} has no memory behind its first"),
        (strategy is not None and bare, f"--strategy {strategy} does nothing: {machine} has no memory behind its first"),
    )
    return {
        "train": not infer,
        "optimizer": None if optimizer is None else optimizer.value,
        "machine": machine,
        "allow": words if allow else None,
        "time_limit": time_limit,
        "seed": seed,
        "arena": arena,
        "lend_gradients": lend_gradients,
        "strategy": None if strategy is None else strategy.value,
        "host_budget": host_budget,
        "optimizer_in_backward": in_backward,
        "solver": solver,
    }


def refuse(*rules: tuple[bool, str]) -> None:
    """Raise the first message whose rule is broken.

    Raises:
        typer.BadParameter: with it.
    """
    for broken, message in rules:
        if broken:
            raise typer.BadParameter(message)

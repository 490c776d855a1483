"""A memory planner for PyTorch: say how many bytes you have; get the fastest step that provably fits, with the same numbers.

    import memplan

    plan = memplan.plan(model, "16GiB", (input_ids, labels), optimizer="adamw")
    print(plan)                # peak and step time, planned and unplanned
    model = plan.apply(model)  # an nn.Module: same call, same numbers, same parameters

`plan` and `Plan` are the place to begin: help(memplan.plan), help(memplan.Plan). `load` reads a plan that `Plan.save` wrote,
`fit` says which batches, sequences and depths train within a budget, `map_model` is for accelerators with a scratchpad,
`bring_back` for parameters that a plan keeps elsewhere. What is refused is a `MemplanError`: a `BudgetError` (its `.minimum` is
the smallest budget known to work), a `CaptureError`, a `MachineError`, a `PlanMismatch`, an `InvalidSchedule`. `Program`,
`Machine`, `Schedule` and `referee` are the parts of a plan. On the command
line: `memplan -h`, or `python -m memplan -h`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.backends.eager.fetched import bring_back as bring_back
    from memplan.planner.ir.errors import BudgetError as BudgetError
    from memplan.planner.ir.errors import BudgetWarning as BudgetWarning
    from memplan.planner.ir.errors import CaptureError as CaptureError
    from memplan.planner.ir.errors import InvalidSchedule as InvalidSchedule
    from memplan.planner.ir.errors import MachineError as MachineError
    from memplan.planner.ir.errors import MemplanError as MemplanError
    from memplan.planner.ir.errors import MemplanWarning as MemplanWarning
    from memplan.planner.ir.errors import PlanMismatch as PlanMismatch
    from memplan.planner.ir.errors import UnplannedWarning as UnplannedWarning
    from memplan.planner.ir.fit import Fit as Fit
    from memplan.planner.ir.machine import Machine as Machine
    from memplan.planner.ir.machine import load_machine as load_machine
    from memplan.planner.ir.plan import Plan as Plan
    from memplan.planner.ir.plan import load as load
    from memplan.planner.ir.program import Program as Program
    from memplan.planner.ir.referee import referee as referee
    from memplan.planner.ir.schedule import Schedule as Schedule
    from memplan.planner.verbs.fit import fit as fit
    from memplan.planner.verbs.map import map_model as map_model
    from memplan.planner.verbs.plan import plan as plan
    from memplan.planner.verbs.plan import sweep as sweep
    from memplan.planner.verbs.within import within as within

# name -> module that defines it; loaded on first use, so that `import memplan.solvers` does not import torch
_FACE = {
    "plan": "planner.verbs.plan",
    "sweep": "planner.verbs.plan",
    "fit": "planner.verbs.fit",
    "within": "planner.verbs.within",
    "map_model": "planner.verbs.map",
    "Plan": "planner.ir.plan",
    "load": "planner.ir.plan",
    "Fit": "planner.ir.fit",
    "Machine": "planner.ir.machine",
    "load_machine": "planner.ir.machine",
    "Program": "planner.ir.program",
    "Schedule": "planner.ir.schedule",
    "referee": "planner.ir.referee",
    "bring_back": "backends.eager.fetched",
    "MemplanError": "planner.ir.errors",
    "BudgetError": "planner.ir.errors",
    "CaptureError": "planner.ir.errors",
    "InvalidSchedule": "planner.ir.errors",
    "MachineError": "planner.ir.errors",
    "PlanMismatch": "planner.ir.errors",
    "MemplanWarning": "planner.ir.errors",
    "BudgetWarning": "planner.ir.errors",
    "UnplannedWarning": "planner.ir.errors",
}
__all__ = sorted(_FACE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        from difflib import get_close_matches

        close = get_close_matches(name, _FACE, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and not name.startswith("_") else ""
        raise AttributeError(f"module 'memplan' has no attribute {name!r}{hint}")
    from importlib import import_module

    return getattr(import_module(f"memplan.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"]

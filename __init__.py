"""A memory planner for PyTorch: say how many bytes you have; get the fastest step that provably fits, with the same numbers.

    import memplan

    plan = memplan.plan(model, "16GiB", (input_ids, labels), optimizer="adamw")
    print(plan)                # peak and step time, planned and unplanned
    model = plan.apply(model)  # an nn.Module: same call, same numbers, same parameters

`plan` and `Plan` are the place to begin: help(memplan.plan), help(memplan.Plan). `load` reads a plan that `Plan.save` wrote,
`map_model` is for accelerators with a scratchpad, `bring_back` for parameters that a plan keeps elsewhere. What is refused is a
`MemplanError`: a `BudgetError` (its `.minimum` is the smallest budget known to work), a `CaptureError`, a `MachineError`, a
`PlanMismatch`, an `InvalidSchedule`. `Program`, `Machine`, `Schedule` and `referee` are the parts of a plan. On the command
line: `memplan -h`, or `python -m memplan -h`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.backends.homes import bring_back as bring_back
    from memplan.planner.api import plan as plan
    from memplan.planner.api import sweep as sweep
    from memplan.planner.errors import BudgetError as BudgetError
    from memplan.planner.errors import BudgetWarning as BudgetWarning
    from memplan.planner.errors import CaptureError as CaptureError
    from memplan.planner.errors import InvalidSchedule as InvalidSchedule
    from memplan.planner.errors import MachineError as MachineError
    from memplan.planner.errors import MemplanError as MemplanError
    from memplan.planner.errors import MemplanWarning as MemplanWarning
    from memplan.planner.errors import PlanMismatch as PlanMismatch
    from memplan.planner.errors import UnplannedWarning as UnplannedWarning
    from memplan.planner.machine import Machine as Machine
    from memplan.planner.machine import load_machine as load_machine
    from memplan.planner.maps import map_model as map_model
    from memplan.planner.plan import Plan as Plan
    from memplan.planner.plan import load as load
    from memplan.planner.program import Program as Program
    from memplan.planner.referee import referee as referee
    from memplan.planner.schedule import Schedule as Schedule

# name -> module that defines it; loaded on first use, so that `import memplan.solvers` does not import torch
_FACE = {
    "plan": "planner.api",
    "sweep": "planner.api",
    "map_model": "planner.maps",
    "Plan": "planner.plan",
    "load": "planner.plan",
    "Machine": "planner.machine",
    "load_machine": "planner.machine",
    "Program": "planner.program",
    "Schedule": "planner.schedule",
    "referee": "planner.referee",
    "bring_back": "backends.homes",
    "MemplanError": "planner.errors",
    "BudgetError": "planner.errors",
    "CaptureError": "planner.errors",
    "InvalidSchedule": "planner.errors",
    "MachineError": "planner.errors",
    "PlanMismatch": "planner.errors",
    "MemplanWarning": "planner.errors",
    "BudgetWarning": "planner.errors",
    "UnplannedWarning": "planner.errors",
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

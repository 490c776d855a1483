"""memplan: say how many bytes you have; get the fastest step that provably fits, with the same numbers as before."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.backends.homes import bring_back as bring_back
    from memplan.planner.api import plan as plan
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
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"memplan.{_FACE[name]}"), name)

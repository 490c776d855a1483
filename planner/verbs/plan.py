"""The verb: `plan(model, budget)`."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..ir.errors import BudgetError
from ..ir.machine import Machine
from ..ir.plan import Plan, dynamic_of
from ..ir.units import parse_bytes
from .arguments import Progress, arguments_of, check_asked, check_calls, check_sizes, levers_of
from .dynamicshapes import varying
from .session import Session
from .sizes import plan_sizes
from .solver import check_strategy, solving

if TYPE_CHECKING:
    from torch import nn


@solving()
def plan(
    model: "nn.Module",
    budget: int | str | None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    loss: Callable[[Any], Any] | None = None,
    optimizer: Any = None,
    machine: str | Machine | None = None,
    allow: Iterable[str] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    arena: bool = False,
    lend_gradients: bool = False,
    strategy: str | None = None,
    host_budget: int | str | None = None,
    optimizer_in_backward: bool = False,
    solver: str | None = None,
    accumulate: bool = False,
    calls: int = 1,
    reserved: int | str = 0,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """The fastest step of a model that provably fits a number of bytes, with the same numbers as before.

    Args:
        model: parameters on cpu, cuda or meta; they are not touched.
        budget: bytes of physical peak, everything counted: 17179869184, "16GiB", "16GB", "60%" of the unplanned peak;
            None for the fastest step that the machine holds.
        args: example inputs: real, fake or meta tensors.
        kwargs: likewise.
        train: plan forward and backward; False for inference.
        loss: from the model's output to a scalar, where the caller computes it; default: the output itself or its `.loss`.
        optimizer: None, "sgd", "adam", "adamw" or a torch optimizer: its state and its step's temporaries count.
        machine: a preset's name, a TOML path or a `Machine`; default: the one the model is on, found out and measured.
        allow: which levers may be used, out of "recompute", "reorder" and "offload"; default: "recompute" and "reorder".
            Offload moves activations to the tiers behind the device: the host's memory for a GPU, a file for a CPU (in
            `MEMPLAN_OFFLOAD`, or else beside the measurements).
        time_limit: seconds for measuring and planning together, at most; not counted is the compiling of the solvers, which
            the first plan on a machine waits for.
        seed: of the search.
        arena: plan an address for every tensor that the step makes and keeps to itself: applied, the plan runs in one
            arena, made once, and fits the budget with it. Gradients and outputs are the caller's and lie beside it.
        lend_gradients: gradients lie in the arena too, as far as kernels can write them there, where the next forward pass
            has other things. They must be gone by then, as they are after `optimizer.zero_grad()`; a step that finds one
            still held refuses to run. So they cannot be accumulated.
        strategy: "memo" for MEMO's own rule of offload and recomputation (`remat/memo_rule.py`), to compare with; default: the
            fastest that is found.
        host_budget: bytes that may be used in each tier behind the device, in the same forms as `budget` ("50%" of the
            tier); default: what the machine has.
        optimizer_in_backward: the planned step updates each parameter itself, as soon as its gradient is complete, so that
            gradients never pile up; apply the plan with `plan.apply(model, optimizer=...)`. The numbers are those of a step
            after the backward pass; gradients are gone, so nothing can be clipped or accumulated.
        solver: of the integer programs that the search begins with: "highs", which is the default, "cbc", "scip", "gurobi" or
            "cplex", if it is installed.
        accumulate: gradients of earlier steps are there when the step begins, and it adds its own to them, each as soon as
            it is complete: for micro-batches between two optimizer steps. The budget counts them.
        calls: how many calls of the planned module come before one backward pass, as of a triplet's three; with more than
            one the step accumulates, and the budget holds for all of them together.
        reserved: bytes of the budget that are left to others, as 17179869184 or "2GiB": a second model, an EMA copy,
            DistributedDataParallel's buckets.
        dynamic_shapes: sizes of inputs that vary, as `torch.export` has them: {"input_ids": {0: Dim("batch", max=8)}}. One
            plan then serves every size up to the bounds (the example's size, where there is none): its schedule is the
            fastest that fits at the largest, and the referee judges it again at each size that comes.
        progress: is told (stage, fraction of it).

    Returns:
        A plan that the referee has accepted.

    Raises:
        BudgetError: no schedule fits; `.minimum` is the smallest budget known to work.
        CaptureError: the model cannot be traced.
        MachineError: no such machine.
        MemplanError: an argument that makes no sense.

    Several threads may plan at once: they trace one after the other, for tracing changes the model and torch for a while.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> planned = memplan.plan(model, None, (torch.randn(8, 64),), loss=lambda out: out.sum()).apply(model)
        >>> planned(torch.randn(8, 64)).sum().backward()
    """
    check_asked(budget, host_budget, arena, lend_gradients, strategy)
    check_strategy(solver, strategy)
    check_calls(calls, accumulate, train, arena, strategy, optimizer_in_backward)
    spare = 0 if reserved == 0 else parse_bytes(reserved, what="number of bytes reserved")
    sizes = () if dynamic_shapes is None else varying(dynamic_shapes, arguments_of(model, args, kwargs))
    if sizes:
        check_sizes(arena, strategy, accumulate, calls, spare)
    session = Session(
        model, args, kwargs, train=train, loss=loss, optimizer=optimizer, machine=machine, allow=levers_of(allow, strategy),
        time_limit=time_limit, seed=seed, lend_gradients=lend_gradients, host_budget=host_budget,
        optimizer_in_backward=optimizer_in_backward, solver=solver, progress=progress,
        dynamic=dynamic_of(sizes),
    )  # fmt: skip
    if sizes:
        return plan_sizes(session, budget, sizes)
    session = session.accumulating(calls) if accumulate or calls > 1 else session
    return session.plan(budget, arena, strategy, calls=calls, reserved=spare)


@solving()
def sweep(
    model: "nn.Module", points: int | Iterable[int | str], args: tuple = (), kwargs: Any = None, **options: Any
) -> list[Plan]:
    """Plans for falling budgets, from the unplanned peak to the smallest budget known to work, with one capture.

    Args:
        model: as in `plan`.
        points: how many budgets, evenly spaced; or the budgets themselves, in the forms that `plan` takes, of which those
            that no schedule meets are left out.
        args: as in `plan`.
        kwargs: as in `plan`.
        options: the other arguments of `plan`; `time_limit` is for each budget, the first of which pays for measuring.

    Returns:
        A plan for each budget, in their order.

    Raises:
        BudgetError: a budget that cannot be read.
        CaptureError: the model cannot be traced.
        MachineError: no such machine.
        MemplanError: an argument that makes no sense.

    Example:
        >>> import torch, memplan
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> plans = memplan.sweep(model, 3, (torch.randn(8, 64),), loss=lambda out: out.sum(), machine="h100-80gb")
        >>> [plan.peak <= plan.budget for plan in plans]
        [True, True, True]
    """
    arena, strategy = options.pop("arena", False), options.pop("strategy", None)
    check_strategy(options.get("solver"), strategy)
    session = Session(model, args, kwargs, **{**options, "allow": levers_of(options.get("allow"), strategy)})
    if isinstance(points, int):
        session.begin(arena)
        top = session.planner.unplanned.peak
        bottom = (session.static_floor if arena else session.planner.floor).peak
        budgets: list[int | str] = [top - (top - bottom) * index // max(points - 1, 1) for index in range(points)]
    else:
        budgets = list(points)
    plans = []
    for budget in budgets:
        try:
            plans.append(session.plan(budget, arena, strategy))
        except BudgetError as error:
            if error.minimum is None:
                raise
    return plans

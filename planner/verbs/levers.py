"""What would make a budget do that cannot be met: the levers that are not allowed yet, and what each comes to.

Each figure is that of a schedule by simple rules (keep nothing, move everything), which takes no search; where a lever changes
the step itself, as updates in backward do, the program is rewritten and not traced again. So they are estimates: a plan
mostly goes lower, and it alone shows that a budget works.
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

import msgspec

from ...passes.homes import Homes
from ...passes.promptly import Promptly
from ...passes.reorder import Reorder
from ...passes.transfers import routes_of
from ..cost.table import apply_costs
from ..ir.errors import BudgetError
from ..ir.program import Kind, Phase, Program
from ..ir.units import show_bytes
from ..pipeline.planner import Planner

if TYPE_CHECKING:
    from ..capture.graph import Traced

IN_BACKWARD = "optimizer_in_backward"
MOST = 3  # levers in the message


def with_levers(error: BudgetError, budget: int, found: dict[str, int]) -> BudgetError:
    """The error with what would make the budget do.

    Args:
        error: what was to be said.
        budget: bytes asked for.
        found: name of one lever or several -> estimated bytes.
    """
    enough = sorted((name.count(" and "), size, name) for name, size in found.items() if size <= budget)
    if enough:
        fewest = [row for row in enough if row[0] == enough[0][0]][:MOST]
        said = "; ".join(f"with {name}: about {show_bytes(size)}" for _, size, name in fewest)
    elif found and min(found.values()) < (error.minimum or 0):
        name = min(found, key=found.__getitem__)
        said = f"with {name}: about {show_bytes(found[name])}, so a smaller batch or another machine is needed too"
    else:
        said = "a smaller batch or another machine is needed"
    return BudgetError(f"{error}; {said}", error.minimum, found)


def levers_beyond(planner: Planner, traced: "Traced", optimizer: Any, device: str) -> dict[str, int]:
    """Bytes that a step needs, estimated, by what is allowed beyond what a planner may do now.

    Args:
        planner: that finds no schedule.
        traced: the graph behind its program.
        optimizer: what was counted of it: its update is the last op of the program, or runs in backward; None for none.
        device: the type of device that the step is for.
    """
    ways = ways_beyond(planner, traced, optimizer, device)
    found: dict[str, int] = {}
    for names in subsets(list(ways)):
        changed = planner
        for name in names:
            changed = ways[name](changed)
        found[" and ".join(names)] = estimate(in_one_order(changed, traced))
    return found


def ways_beyond(planner: Planner, traced: "Traced", optimizer: Any, device: str) -> dict[str, Callable[[Planner], Planner]]:
    """What a planner may not do yet: the name of a lever -> a planner that may.

    Args:
        planner: see `levers_beyond`, as the others.
        traced: likewise.
        optimizer: likewise.
        device: likewise.
    """
    ways: dict[str, Callable[[Planner], Planner]] = {}
    if not planner.recompute:
        ways["recompute"] = lambda each: dataclasses.replace(each, recompute=True)
    if not planner.reorder:
        ways["reorder"] = lambda each: dataclasses.replace(each, reorder=True)
    if optimizer is not None and planner.program.ops[-1].phase is Phase.UPDATE:
        ways[IN_BACKWARD] = lambda each: updated_in_backward(each, traced, optimizer, device)
    if routes_of(planner.machine) and not planner.offload:
        ways["offload"] = lambda each: dataclasses.replace(each, offload=True)  # last, for it looks for homes
    return ways


def subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Each name alone, any two, all."""
    yield from ((name,) for name in names)
    if len(names) > 2:
        yield from combinations(names, 2)
    if len(names) > 1:
        yield tuple(names)


def in_one_order(planner: Planner, traced: "Traced") -> Planner:
    """The planner of one base order of a step whose levers have been changed."""
    program = planner.program
    order = Promptly()(program, Reorder()(program) if planner.reorder else range(len(program.ops)))
    homes: tuple[int, ...] = ()
    if planner.offload:
        homes = Homes(planner.machine.tiers[routes_of(planner.machine)[0].tier].capacity, traced.shared)(program)
    return dataclasses.replace(planner, known=None, progress=None, order=tuple(order), homes=homes)


def estimate(planner: Planner) -> int:
    """Bytes of the smallest schedule of one base order that has been found: by rules, before anything is searched."""
    return planner.search.descent.peak if planner.recompute or planner.moves else planner.kept.peak


def updated_in_backward(planner: Planner, traced: "Traced", optimizer: Any, device: str) -> Planner:
    """The same of a step that updates each parameter as soon as its gradient is complete, as `capture.graph` lowers it."""
    from ..capture.optimizers import rows_of, update_ops

    program = planner.program
    last, states = program.ops[-1], {index for index, each in enumerate(program.buffers) if each.kind is Kind.STATE}
    parameters = set(last.mutates) - states
    read: dict[int, list[int]] = {}
    for place, node in traced.gradients:
        if traced.owner[place] in parameters:
            read.setdefault(traced.owner[place], []).append(traced.owner[node])
    sizes = {buffer: program.buffers[buffer].bytes for buffer in read}
    made = {buffer: at for at, op in enumerate(program.ops) for buffer in op.writes}
    rows = rows_of(sizes, {buffer: max(made.get(gradient, -1) for gradient in row) for buffer, row in read.items()})
    names = {buffer: program.buffers[buffer].name for buffer in read}
    kept = [buffer for index, buffer in enumerate(program.buffers) if index not in states]  # the states are the last buffers
    new, _, ops = update_ops(optimizer, sizes, read, names, rows, len(kept), device)
    gone = {buffer for row in read.values() for buffer in row}
    bare = msgspec.structs.replace(program, buffers=(*kept, *new), ops=tuple(ops), outputs=())
    costed = apply_costs(bare, planner.machine)
    changed = Program(
        name=program.name,
        buffers=costed.buffers,
        ops=(*program.ops[:-1], *costed.ops),
        outputs=tuple(buffer for buffer in program.outputs if buffer not in gone),
        device=program.device,
    )
    return dataclasses.replace(planner, program=changed)

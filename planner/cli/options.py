"""The options that commands share: their types, their help, and what is refused of each before anything is loaded.

What several of them together make no sense of is in `planner/cli/asked.py`.
"""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...solvers.programs.names import NAMES, why_not
from ...solvers.storage.methods import METHODS
from ..ir.errors import BudgetError, MachineError, MemplanError
from ..ir.machine import LOCAL, named_machine, preset_names
from ..ir.names import OPTIMIZERS
from ..ir.schedule import LEVERS, check_levers
from ..ir.units import parse_bytes
from ..models.spec import check_spec, model_types

SCRATCHPADS = ("M_R", "M_P", "M_H")  # as `planner/pipeline/mapping.py` knows them
PICTURES = (".png", ".svg", ".pdf")


if TYPE_CHECKING:  # what tables name is in no type checker's reach

    class Method(StrEnum):
        """Ways to place buffers."""

    class Optimizer(StrEnum):
        """Torch's optimizers."""

else:
    Method = StrEnum("Method", {name.upper(): name for name in METHODS})
    Optimizer = StrEnum("Optimizer", {name.upper(): name for name in OPTIMIZERS})


class Rule(StrEnum):
    """Strategies to compare with."""

    MEMO = "memo"


class Over(StrEnum):
    """Sizes of a model."""

    BATCH = "batch"
    SEQ = "seq"
    LAYERS = "layers"


def readable(budget: str | None) -> str | None:
    """A budget that can be read, known before the model is loaded. A percentage is of a peak that is not known yet."""
    if budget is not None:
        parse_bytes(budget, of=2**40)
    return budget


def whole_budget(budget: str | None) -> str | None:
    """The same of a budget for many sizes: a percentage is of nothing."""
    if budget is not None:
        parse_bytes(budget)
    return budget


def readable_host(budget: str | None) -> str | None:
    """The same of the tiers behind the device."""
    if budget is not None:
        parse_bytes(budget, of=2**40, what="host budget", whole="tier")
    return budget


def readable_capacity(text: str | None) -> str | None:
    """A capacity that can be read, known before the file is."""
    for word in [] if text is None else text.split(","):
        name, equals, size = word.rpartition("=")
        if (equals and not name.strip()) or (not equals and "," in (text or "")):
            raise BudgetError(
                f"cannot read the capacity {text!r}: write bytes, as in '16MiB', or by pool, 'fast=1MiB,slow=4GiB'"
            )
        parse_bytes(size.strip(), what="capacity")
    return text


def readable_levers(allow: list[str] | None) -> list[str] | None:
    """Levers that there are: the option may be given several times, and each time be a list."""
    words = [word.strip() for text in allow or [] for word in text.split(",")]
    try:
        check_levers([word for word in words if word])
    except MemplanError as error:
        raise typer.BadParameter(str(error)) from None
    return allow


def a_machine(name: str | None) -> str | None:
    """The name of a machine that there is, or of a file that describes one."""
    try:
        named_machine(name)
    except MachineError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def a_scratchpad(size: str) -> str:
    """Bytes that can be read, or one of COSMA's sizes."""
    if size not in SCRATCHPADS:
        try:
            parse_bytes(size, what="scratchpad")
        except BudgetError:
            raise typer.BadParameter(f"{size!r}: give bytes, as 1048576 or 1MiB, or one of {', '.join(SCRATCHPADS)}") from None
    return size


def a_solver(name: str | None) -> str | None:
    """The name of a solver that can be used here."""
    reason = "" if name is None else why_not(name)
    if reason:
        raise typer.BadParameter(f"{name!r} {reason}")
    return name


def a_number(seconds: float) -> float:
    """Not nan, which is neither below a least value nor above it."""
    if math.isnan(seconds):
        raise typer.BadParameter("nan: give seconds, 0 or more")
    return seconds


def writable(path: Path | None) -> Path | None:
    """A file that can be made, known before minutes are spent on what is to be in it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise typer.BadParameter(f"cannot write {path}: {why}")
    return path


def drawable(path: Path | None) -> Path | None:
    """The same of a picture, whose kind its name says."""
    if path is not None and path.suffix not in PICTURES:
        raise typer.BadParameter(f"cannot draw {path}: the name must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    return writable(path)


def picture(help: str, *flags: str) -> Any:
    """An option that names a picture to write."""
    return typer.Option(*flags, help=help, metavar="FILE", callback=drawable)


def output(help: str, *flags: str) -> Any:
    """An option that names a file to write."""
    return typer.Option(*flags, help=help, metavar="FILE", callback=writable)


def solver(help: str) -> Any:
    """The option that names a solver of integer programs."""
    return typer.Option("--solver", metavar="NAME", help=help, callback=a_solver, autocompletion=complete_solver)


def searching(help: str) -> Any:
    """The option that limits a search."""
    return typer.Option("--time-limit", metavar="SECONDS", help=help, min=0.0, callback=a_number)


def starting_with(names: list[str], incomplete: str) -> list[str]:
    """Those that a shell may complete a word to."""
    return [name for name in names if name.startswith(incomplete)]


def complete_machine(incomplete: str) -> list[str]:
    """Names of machines."""
    return starting_with([*LOCAL, *preset_names()], incomplete)


def complete_solver(incomplete: str) -> list[str]:
    """Names of solvers, installed or not."""
    return starting_with(list(NAMES), incomplete)


def complete_levers(incomplete: str) -> list[str]:
    """Levers, after those of a list that are there already."""
    done, comma, word = incomplete.rpartition(",")
    return [f"{done}{comma}{lever}" for lever in starting_with(list(LEVERS), word) if lever not in done.split(",")]


def complete_model(incomplete: str) -> list[str]:
    """`hf:` and transformers' model types."""
    return starting_with([f"hf:{name}" for name in model_types()], incomplete) if incomplete.startswith("hf:") else ["hf:"]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:factory, package.module:factory or hf:gpt2?n_layer=2&batch=4",
        callback=check_spec,
        autocompletion=complete_model,
    ),
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="A file that `memplan plan -o` wrote.")]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES", help="16GiB, bytes, or 60% of the unplanned peak; left out: the fastest step.", callback=readable
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        help="What to plan for: see `memplan machines`, or a TOML file; left out: this machine.",
        callback=a_machine,
        autocompletion=complete_machine,
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LEVERS",
        help=f"What the plan may do, of {', '.join(LEVERS)}; left out: reorder,recompute.",
        callback=readable_levers,
        autocompletion=complete_levers,
    ),
]
Infer = Annotated[bool, typer.Option("--infer", help="Plan the forward pass alone.")]
Counted = Annotated[
    Optimizer | None,
    typer.Option("--optimizer", metavar="NAME", help="Count this optimizer's state and its step: any of torch's."),
]
InBackward = Annotated[
    bool,
    typer.Option("--optimizer-in-backward", help="With --optimizer: update each parameter once its gradient is complete."),
]
TimeLimit = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="At most, for measuring and planning together.", min=0.0, callback=a_number),
]
SearchLimit = Annotated[float, searching("Of search, at most.")]
Seed = Annotated[int, typer.Option(metavar="NUMBER", help="Of the search: the same seed, the same plan.", min=0, max=2**31 - 1)]
Solver = Annotated[str | None, solver(f"Of integer programs: {', '.join(NAMES)}; left out: {NAMES[0]}.")]
Strategy = Annotated[Rule | None, typer.Option(help="MEMO's own rule of offload, to compare with; left out: the fastest plan.")]
HostBudget = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="With offload: 64GiB, or 50% of the host's memory (of the disk's room, behind a CPU), at most.",
        callback=readable_host,
    ),
]
Placed = Annotated[bool, typer.Option("--arena", help="Plan addresses too: the step runs in one arena, allocated once.")]
Lent = Annotated[bool, typer.Option("--lend-gradients", help="With --arena: gradients lie in it until the next forward pass.")]

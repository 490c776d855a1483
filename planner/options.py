"""The options that commands share: their types, their help, and what is refused before anything is loaded."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BudgetError
from .plan import OPTIMIZERS
from .schedule import LEVERS
from .units import parse_bytes

PICTURES = (".png", ".svg", ".pdf")


class Method(StrEnum):
    """Solvers of storage allocation."""

    AUTO = "auto"
    CP_SAT = "cp-sat"
    MIP = "mip"


Optimizer = StrEnum("Optimizer", {name.upper(): name for name in OPTIMIZERS})


def planning(allow: str | None, optimizer: Optimizer | None, time_limit: float, seed: int, **others: Any) -> dict[str, Any]:
    """The options that planning commands share, as the API takes them."""
    chosen = {word.strip() for word in allow.split(",")} if allow is not None else None
    if chosen is not None and not chosen <= set(LEVERS):
        raise typer.BadParameter(f"--allow {allow}: choose from {', '.join(LEVERS)}, separated by commas")
    name = optimizer.value if optimizer is not None else None
    return {"allow": chosen, "optimizer": name, "time_limit": time_limit, "seed": seed, **others}


def readable(budget: str | None) -> str | None:
    """A budget that can be read, known before the model is loaded. A percentage is of a peak that is not known yet."""
    if budget is not None:
        parse_bytes(budget, of=2**40)
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


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="file.py:factory, package.module:factory or hf:gpt2?n_layer=2&batch=4")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="A file that `memplan plan -o` wrote.")]
Budget = Annotated[
    str | None,
    typer.Option(help="Bytes, 4GiB, or 60% of the unplanned peak; left out: the fastest.", callback=readable),
]
MachineName = Annotated[str | None, typer.Option("--machine", help="A preset, a TOML file, or local; see `memplan machines`.")]
Allow = Annotated[str | None, typer.Option(help=f"What the plan may do: a list of {', '.join(LEVERS)}.")]
Infer = Annotated[bool, typer.Option("--infer", help="Plan the forward pass alone.")]
Counted = Annotated[Optimizer | None, typer.Option("--optimizer", help="Count this optimizer's state.")]
InBackward = Annotated[
    bool, typer.Option("--optimizer-in-backward", help="Update each parameter as soon as its gradient is complete.")
]
TimeLimit = Annotated[float, typer.Option(help="Seconds that planning may take.", min=0.0)]
Seed = Annotated[int, typer.Option(help="Of the search.", min=0, max=2**31 - 1)]
Strategy = Annotated[str | None, typer.Option(help="memo: MEMO's own rule of offload, to compare with; left out: the fastest.")]
HostBudget = Annotated[
    str | None,
    typer.Option(help="Bytes that may be used in each tier behind the device: 64GiB, or 50% of it.", callback=readable_host),
]
Placed = Annotated[bool, typer.Option("--arena", help="Plan addresses too: the step runs in one arena, made once.")]
Lent = Annotated[bool, typer.Option("--lend-gradients", help="With --arena: gradients lie in it until the next forward pass.")]

"""`memplan machines`: what can be planned for."""

import shutil
from typing import TYPE_CHECKING

from ..ir.errors import MachineError
from ..ir.units import show_bytes
from .options import Json, Quiet
from .progress import progress
from .tables import table
from .terminal import answer

if TYPE_CHECKING:
    from ..ir.machine import Machine


def machines(quiet: Quiet = False, as_json: Json = False) -> None:
    """The machines that can be planned for."""
    with progress("asking this machine for its rates", quiet):
        import msgspec

        from ..cost.local import local_machine
        from ..ir.machine import load_machine, preset_names

        known = {machine.name: machine for machine in [local_machine("cpu"), *local_gpu()]}
        known |= {name: load_machine(name) for name in preset_names()}
    rows = []
    for name, machine in known.items():
        tier, unit = machine.tiers[0], machine.units[0]
        best = max(unit.flops.values())
        rows.append(
            (
                name,
                machine.device,
                show_bytes(tier.capacity),
                f"{tier.bandwidth / 1e9:.0f} GB/s",
                f"{unit.flops.get('float32', unit.flops['default']) / 1e12:.4g}",
                f"{best / 1e12:.4g}",
                ", ".join(other.name for other in machine.tiers[1:]),
            )
        )
    heads = ("machine", "device", "memory", "bandwidth", "TFLOP/s float32", "best type", "memory behind it")
    answer(
        as_json,
        {"machines": {name: msgspec.to_builtins(machine) for name, machine in known.items()}},
        table(heads, rows),
    )


def local_gpu() -> "list[Machine]":
    """The machine of this host's GPU, if it has one. Only then is torch imported."""
    from ..cost.local import local_machine

    if shutil.which("nvidia-smi") is None:
        return []
    try:
        return [local_machine("cuda")]
    except MachineError:
        return []

"""`memplan calibrate`: how fast this machine is."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..ir.units import show_count
from .asked import refuse
from .options import Infer, Json, Model, Quiet, TimeLimit
from .progress import progress
from .terminal import answer

if TYPE_CHECKING:
    pass


def calibrate(
    model: Model,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    infer: Infer = False,
    offload: Annotated[bool, typer.Option("--offload", help="Measure the disk behind a CPU's memory too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure anew, whatever was measured before.")] = False,
    time_limit: TimeLimit = 60.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a model's ops, for plans with real times."""
    refuse(
        (device not in ("cpu", "cuda"), f"--device {device}: what is calibrated is this machine's cpu or cuda"),
        (offload and device != "cpu", "--offload measures the disk behind a CPU's memory: leave it out with --device cuda"),
    )
    with progress("loading torch", quiet) as report:
        import msgspec

        from ...backends.measure.worker import calibrate as measure
        from ..capture.capture import capture
        from ..cost.local import device_key, local_machine
        from ..cost.table import Table as Costs
        from ..cost.table import apply_costs, coverage
        from ..models.byname import load_model

        report("asking this machine for its rates", 0.0)
        machine = local_machine(device, offload, again)
        report("building the model", 0.0)
        module, args, kwargs = load_model(model, meta=True)
        report("tracing the model", 0.0)
        program = capture(module, args, kwargs, train=not infer, device=machine.device).program
        costs = Costs(device_key(machine.device))
        report("measuring ops", 0.0)
        count = measure(
            program,
            machine,
            costs,
            time_limit=time_limit,
            progress=lambda done, total: report("measuring ops", done / max(total, 1)),
            again=again,
        )
    known = coverage(apply_costs(program, machine, costs), costs)
    facts = {"machine": machine.name, "measured": count, "ops": len(program.ops), "coverage": msgspec.to_builtins(known),
             "disturbed": known.disturbed, "file": str(costs.path), "links": msgspec.to_builtins(machine.links)}  # fmt: skip
    lines = [f"{show_count(count, 'operator')} measured on {machine.name}; the table is {costs.path}", f"of the step: {known}"]
    lines += [known.describe(machine.name)] if known.measured else []
    lines += [f"{link.source} to {link.target}: {link.bandwidth / 1e9:.2f} GB/s, {link.duplex:.0%} of it while copies go both "
              f"ways; computing loses {link.load:.0%} of the time" for link in machine.links]  # fmt: skip
    answer(as_json, facts, Text("\n".join(lines)))

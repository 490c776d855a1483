"""The command line: parse, call the API, print.

`--json` prints one object on standard output; tables, colour and progress for people go to standard error. Exit
status: 0, 1 for an error, 2 for usage, 3 for a budget that cannot be met.
"""

import csv
import io
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from .errors import MachineError, MemplanError
from .files import write_file
from .options import (
    Allow,
    Budget,
    Counted,
    HostBudget,
    InBackward,
    Infer,
    Json,
    Lent,
    MachineName,
    Method,
    Model,
    Optimizer,
    Placed,
    PlanFile,
    Seed,
    Strategy,
    TimeLimit,
    output,
    picture,
    planning,
    readable_capacity,
)
from .tables import overhead, plan_facts, plan_table, run_facts, run_table, table
from .terminal import answer, console, fail, progress
from .units import show_bytes, show_seconds

# torch and matplotlib take seconds to import: the commands that need them import them inside.
if TYPE_CHECKING:
    from .machine import Machine
    from .plan import Plan

app = typer.Typer(
    help="Say how many bytes you have; get the fastest training step that provably fits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def plan(
    model: Model,
    budget: Budget = None,
    machine: MachineName = None,
    allow: Allow = None,
    infer: Infer = False,
    optimizer: Counted = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    arena: Placed = False,
    lend_gradients: Lent = False,
    strategy: Strategy = None,
    host_budget: HostBudget = None,
    in_backward: InBackward = False,
    out: Annotated[Path | None, output("Write the plan here.", "-o", "--output")] = None,
    as_json: Json = False,
) -> None:
    """Plan a step within a budget."""
    from . import api
    from .models import load_model

    options = planning(allow, optimizer, time_limit, seed, train=not infer, machine=machine)
    options |= {"arena": arena, "lend_gradients": lend_gradients, "strategy": strategy, "host_budget": host_budget}
    options["optimizer_in_backward"] = in_backward
    with progress("building the model") as report:
        module, args, kwargs = load_model(model, meta=True)
        made = api.plan(module, budget, args, kwargs, **options, progress=report)
    if out is not None:
        made.save(out)
    answer(as_json, plan_facts(made) | ({"output": str(out)} if out else {}), plan_table(made))


@app.command()
def show(
    file: PlanFile,
    png: Annotated[Path | None, picture("The memory timeline as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    trace: Annotated[Path | None, output("A Chrome trace, for ui.perfetto.dev.")] = None,
    snapshot: Annotated[Path | None, output("A memory snapshot, for pytorch.org/memory_viz.")] = None,
    html: Annotated[Path | None, output("A self-contained report.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the schedule.")] = False,
    as_json: Json = False,
) -> None:
    """Show a plan: summary, pictures, exports."""
    from .plan import load
    from .text import show_schedule

    with progress("reading the plan"):
        made = load(file)
        if png or svg or trace or snapshot or html:
            export(made, png=png, svg=svg, trace=trace, snapshot=snapshot, html=html)
    written = [str(path) for path in (png, svg, trace, snapshot, html) if path]
    schedule = show_schedule(made.program, made.schedule) if text else None
    answer(as_json, plan_facts(made) | {"written": written} | ({"text": schedule} if text else {}), plan_table(made))
    if schedule is not None and not as_json:
        print(schedule, end="")


@app.command()
def check(file: PlanFile, as_json: Json = False) -> None:
    """Have the referee replay a plan."""
    from .plan import load

    with progress("replaying the plan"):
        made = load(file)
    report = made.planned.report
    links = [f"{link.source}->{link.target}" for link in made.machine.links]
    moved = dict(zip(links, report.moved, strict=True))
    facts = {
        "valid": True,
        "peak": made.peak,
        "time": made.time,
        "budget": made.budget,
        "moved": moved,
        "repeated": report.repeated,
        "recompute_time": report.recompute,
        "instructions": len(made.schedule.instructions),
    }
    rows = [
        ("peak", show_bytes(made.peak)),
        ("step time (predicted)", show_seconds(made.time)),
        ("instructions", str(len(made.schedule.instructions))),
        ("repeated runs", str(report.repeated)),
        *((f"moved {link}", show_bytes(carried)) for link, carried in moved.items() if carried),
    ]
    answer(as_json, facts, Group(Text(f"{file}: valid", style="green"), table((), rows)))


@app.command()
def run(
    model: Model,
    budget: Budget = None,
    steps: Annotated[int, typer.Option(help="Measured steps.", min=1)] = 5,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Step this optimizer; left out: gradients only.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; left out: where the model is.")] = None,
    allow: Allow = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    arena: Placed = False,
    lend_gradients: Lent = False,
    strategy: Strategy = None,
    host_budget: HostBudget = None,
    in_backward: InBackward = False,
    as_json: Json = False,
) -> None:
    """Train for real, unplanned and planned side by side, each in a fresh process."""
    from ..backends.trial import Request, in_fresh_process, to_device
    from . import api
    from .models import load_model

    options = planning(allow, optimizer, time_limit, seed, arena=arena, strategy=strategy, host_budget=host_budget)
    options |= {"lend_gradients": lend_gradients, "optimizer_in_backward": in_backward}
    stepped = options["optimizer"]
    with progress("building the model") as report, tempfile.TemporaryDirectory() as folder:
        module, args, kwargs = to_device(device, *load_model(model, meta=False))
        made = api.plan(module, budget, args, kwargs, **options, progress=report)
        del module, args, kwargs  # the runs want the memory
        made.save(Path(folder) / "plan.json")
        report("running unplanned", 0.0)
        plain = in_fresh_process(Request(model, None, steps, stepped, device, in_backward))
        report("running planned", 0.5)
        planned = in_fresh_process(Request(model, str(Path(folder) / "plan.json"), steps, stepped, device, in_backward))
    answer(as_json, run_facts(made, plain, planned), run_table(made, plain, planned))


@app.command()
def sweep(
    model: Model,
    points: Annotated[int, typer.Option(help="How many budgets.", min=2)] = 10,
    machine: MachineName = None,
    allow: Allow = None,
    infer: Infer = False,
    optimizer: Counted = None,
    in_backward: InBackward = False,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    png: Annotated[Path | None, picture("The curve as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    table_file: Annotated[Path | None, output("The table as CSV.", "--csv")] = None,
    as_json: Json = False,
) -> None:
    """Peak against step time, from the unplanned peak down to the floor."""
    from . import api
    from .models import load_model

    options = planning(allow, optimizer, time_limit, seed, train=not infer, machine=machine)
    options["optimizer_in_backward"] = in_backward
    with progress("building the model") as report:
        module, args, kwargs = load_model(model, meta=True)
        plans = api.sweep(module, points, args, kwargs, **options, progress=report)
        if not plans:
            raise MemplanError("no budget between the unplanned peak and the floor was met: give a longer --time-limit")
    facts = [
        {
            "budget": made.budget,
            "peak": made.peak,
            "time": made.time,
            "overhead": overhead(made),
            "gap": made.gap,
            "status": made.status,
        }
        for made in plans
    ]
    for path in (png, svg):
        if path is not None:
            from ..backends.pictures import curve, save

            save(curve(plans), path)
    if table_file is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(facts[0]))
        writer.writeheader()
        writer.writerows(facts)
        write_file(table_file, text.getvalue())
    first = plans[0]
    whole = {
        "machine": first.machine.name,
        "unplanned": {"peak": first.unplanned.peak, "time": first.unplanned.time},
        "minimum_budget": min(made.minimum for made in plans),
        "points": facts,
    }
    rows = [
        (
            "none" if made.budget is None else show_bytes(made.budget),
            show_bytes(made.peak),
            show_seconds(made.time),
            f"{overhead(made):+.1%}",
            f"{made.gap:.1%}",
        )
        for made in plans
    ]
    answer(as_json, whole, table(("budget", "peak", "step time", "overhead", "gap"), rows))


@app.command()
def machines(as_json: Json = False) -> None:
    """The machines that can be planned for."""
    import msgspec

    from .local import local_machine
    from .machine import load_machine, preset_names

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
    heads = ("machine", "device", "memory", "bandwidth", "TFLOP/s float32", "at best", "behind it")
    answer(
        as_json,
        {"machines": {name: msgspec.to_builtins(machine) for name, machine in known.items()}},
        table(heads, rows),
    )


@app.command()
def calibrate(
    model: Model,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    infer: Infer = False,
    offload: Annotated[bool, typer.Option("--offload", help="Measure the disk behind a CPU's memory too.")] = False,
    time_limit: TimeLimit = 60.0,
    as_json: Json = False,
) -> None:
    """Measure a model's operators on this machine, so that plans rest on their real times."""
    import msgspec

    from ..backends.measure import calibrate as measure
    from .capture import capture
    from .cost import Table as Costs
    from .cost import apply_costs, coverage
    from .local import device_key, local_machine
    from .models import load_model

    with progress("building the model") as report:
        machine = local_machine(device, offload)
        module, args, kwargs = load_model(model, meta=True)
        report("tracing", 0.0)
        program = capture(module, args, kwargs, train=not infer, device=machine.device).program
        costs = Costs(device_key(machine.device))
        count = measure(
            program,
            machine,
            costs,
            time_limit=time_limit,
            progress=lambda done, total: report("measuring", done / max(total, 1)),
        )
    known = coverage(apply_costs(program, machine, costs), costs)
    facts = {"machine": machine.name, "measured": count, "ops": len(program.ops), "coverage": msgspec.to_builtins(known),
             "file": str(costs.path), "links": msgspec.to_builtins(machine.links)}  # fmt: skip
    lines = [f"{count} operators measured on {machine.name}; the table is {costs.path}", f"of the step: {known}"]
    lines += [f"{link.source} to {link.target}: {link.bandwidth / 1e9:.2f} GB/s, {link.duplex:.0%} of it while copies go both "
              f"ways; computing loses {link.load:.0%} of the time" for link in machine.links]  # fmt: skip
    answer(as_json, facts, Text("\n".join(lines)))


@app.command()
def alloc(
    file: Annotated[Path, typer.Argument(metavar="IN.CSV", help="Columns id, lower, upper, size; lifetimes half-open.")],
    capacity: Annotated[
        str | None,
        typer.Option(
            help="Bytes to fit into, or fast=1MiB,slow=4GiB by pool; left out: the smallest peak.", callback=readable_capacity
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Every offset is a multiple of it.", min=1, max=2**40)] = 1,
    out: Annotated[Path | None, output("Write the file again, with offsets.", "-o", "--output")] = None,
    png: Annotated[Path | None, picture("The packing as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds to search for, at most.", min=0.0)] = 10.0,
    method: Annotated[Method, typer.Option(help="auto, or a solver to compare it with.")] = Method.AUTO,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Addresses for buffers with known lifetimes."""
    from .placing import find_places, write_places

    with progress("reading the file") as report:
        places = find_places(file, capacity, align, method.value, time_limit, seed, report)
    facts = places.facts()
    if places.reason:
        if as_json:
            print(json.dumps(facts))
        print(f"memplan: {file}: {places.reason}", file=sys.stderr)
        raise SystemExit(3)
    write_places(places, out, [path for path in (png, svg) if path is not None])
    answer(as_json, facts, table((), places.rows()))


@app.command(name="map")
def map_(
    model: Model,
    scratchpad: Annotated[str, typer.Option(help="Bytes, 1MiB, or M_R (the largest op), M_P (the smallest peak), M_H.")],
    machine: Annotated[str, typer.Option(help="A preset or TOML file with a memory behind its first tier.")] = "scratchpad",
    weights: Annotated[bool, typer.Option("--weights", help="Parameters take room in the scratchpad, too.")] = False,
    bits: Annotated[int | None, typer.Option(help="Of every element: 8, 16 or 32; left out: the model's own.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Let ops run again where that spares bytes.")] = False,
    execute: Annotated[bool, typer.Option("--run", help="Run it on the scratchpad machine, beside the model.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds to search for, at most.", min=0.0)] = 60.0,
    seed: Seed = 0,
    out: Annotated[Path | None, output("Write the program: .json, or text.", "-o", "--output")] = None,
    png: Annotated[Path | None, picture("Addresses over time as a picture.")] = None,
    svg: Annotated[Path | None, picture("The same, scalable.")] = None,
    save: Annotated[Path | None, output("Write a plan, for `memplan show` and `memplan check`.")] = None,
    as_json: Json = False,
) -> None:
    """Map an inference onto a scratchpad accelerator."""
    from .maps import compared, map_model
    from .models import load_model

    with progress("building the model") as report:
        module, args, kwargs = load_model(model, meta=not execute)
        made = map_model(module.eval(), scratchpad, args, kwargs, machine=machine, weights=weights, bits=bits,
                         recompute=recompute, time_limit=time_limit, seed=seed, progress=report)  # fmt: skip
        ran = compared(made, args, kwargs) if execute else {}
        if out is not None:
            write_file(out, made.assembly.to_json() if out.suffix == ".json" else str(made.assembly))
        for path in (png, svg):
            if path is not None:
                made.save_picture(path)
        if save is not None:
            made.plan.save(save)
    facts = made.facts() | ran | ({"output": str(out)} if out else {})
    rows = made.rows()
    if ran:
        same = "equal" if ran["equal"] else f"differs by {ran['difference']:.1e}"
        rows.append(("run", same, f"{show_bytes(ran['counted'])} moved, {show_seconds(ran['counted_time'])} by its clock"))
    answer(as_json, facts, table((), rows))


def export(
    made: "Plan", *, png: Path | None, svg: Path | None, trace: Path | None, snapshot: Path | None, html: Path | None
) -> None:
    """Write the files asked for."""
    from ..backends import exports, pictures

    for path in (png, svg):
        if path is not None:
            pictures.save(pictures.timeline(made), path)
    if trace is not None:
        exports.save_trace(made, trace)
    if snapshot is not None:
        exports.save_snapshot(made, snapshot)
    if html is not None:
        exports.save_html(made, html)


def local_gpu() -> "list[Machine]":
    """The machine of this host's GPU, if it has one. Only then is torch imported."""
    from .local import local_machine

    if shutil.which("nvidia-smi") is None:
        return []
    try:
        return [local_machine("cuda")]
    except MachineError:
        return []


def main(arguments: list[str] | None = None) -> None:
    """The console entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: console.print(
                f"memplan: warning: {message}", markup=False, soft_wrap=True
            )
            app(words, prog_name="memplan")
    except (MemplanError, OSError, MemoryError) as error:
        fail(error, "--json" in words)


if __name__ == "__main__":
    main()

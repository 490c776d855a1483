"""Training whose batches and calls differ, within a budget: its peak at every step, its time, and eager's bits.

    python -m memplan.benchmarks.calls
    python -m memplan.benchmarks.calls --models bert --situations lengths --batches 50

Each situation runs in a fresh process as eager PyTorch, as `memplan.within`, through `torch.compile(backend="memplan")` and
with the model's own gradient checkpointing. The budget is a share of eager's peak.

`lengths`: batches of random sizes and lengths, masks all ones and padded in turn.
`accumulation`: four micro-batches. `triplet`: three calls before one backward pass. `preference`: DPO's two models, a frozen
one beside. `losses`: two backward passes over one forward pass. `known`: what `within` takes beyond the plan itself at a call
that it knows, in turns, and what a size takes that it has not seen.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .command import Command
from .record import MIB, Results, Row, ask, header, markdown, mib, paragraph, percent, ratio, say, verdict

SLACK = 0.03, 16 * MIB  # of a budget that a measured peak may pass it by
TWO_MODELS = 0.8  # of eager's peak, where it has a frozen model beside
PLANNED = ("within", "compile")
KINDS = ("eager", *PLANNED, "checkpointing")
SITUATIONS = ("lengths", "accumulation", "triplet", "preference", "losses")
TURNS = 40  # of a call, through a plan and through `within`
VOCABULARY, POSITIONS, SMALL = 4096, 512, 256
MODELS = ("gpt2", "bert")


# The models and their batches


def model_of(name: str) -> Any:
    """A model with random weights."""
    import transformers

    if name.startswith("gpt2"):
        layers, width = (2, 64) if name.endswith("tiny") else (12, 256)
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=width, n_head=4, vocab_size=VOCABULARY, n_positions=POSITIONS, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model.train()
    layers, width = (2, 64) if name.endswith("tiny") else (8, 256)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=4, intermediate_size=4 * width,
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).train()


def batch_of(number: int, rows: int, length: int) -> dict[str, Any]:
    """Tokens, their labels, and a mask that is all ones for even numbers."""
    import torch

    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones(rows, length, dtype=torch.long)
    if number % 2 and rows > 1:
        mask[0, length - length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def sizes_of(count: int, most: int) -> list[tuple[int, int]]:
    """Random sizes 1 to 8 and lengths 1 to `most`."""
    import random

    draw = random.Random(0)
    return [(draw.randint(1, 8), draw.randint(1, most)) for _ in range(count)]


# The situations: what one step does


def lengths(request: Row) -> Callable[[Any, int], Any]:
    sizes = sizes_of(request["batches"], request["length"])

    def step(model: Any, number: int) -> Any:
        loss = model(**batch_of(number, *sizes[number])).loss
        loss.backward()
        return loss

    return step


def accumulation(request: Row) -> Callable[[Any, int], Any]:
    def step(model: Any, number: int) -> Any:
        loss = model(**batch_of(number, 4, request["length"] // 2)).loss / 4
        loss.backward()
        return loss

    return step


def triplet(request: Row) -> Callable[[Any, int], Any]:
    def step(model: Any, number: int) -> Any:
        calls = [model(**batch_of(10 * number + 2 * call, 2, request["length"] // 2)).loss for call in range(3)]
        loss = (calls[0] - calls[1]).relu() + calls[2]
        loss.backward()
        return loss

    return step


def preference(request: Row) -> Callable[[Any, int], Any]:
    import copy

    import torch

    held: dict[str, Any] = {}

    def step(model: Any, number: int) -> Any:
        if not held:
            held["reference"] = copy.deepcopy(request["plain"]).eval().requires_grad_(False)
        pair = [batch_of(10 * number + 2 * call, 2, request["length"] // 2) for call in range(2)]
        with torch.no_grad():
            known = [held["reference"](**each).loss for each in pair]
        ours = [model(**each).loss for each in pair]
        loss = -torch.nn.functional.logsigmoid((ours[1] - known[1]) - (ours[0] - known[0]))
        loss.backward()
        return loss

    return step


def losses(request: Row) -> Callable[[Any, int], Any]:
    def step(model: Any, number: int) -> Any:
        import torch

        given = batch_of(2 * number, 4, request["length"] // 2)
        labels = given.pop("labels")
        logits = model(**given).logits
        first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        first.backward(retain_graph=True)
        second = logits.float().square().mean() * 1e-3
        second.backward()
        return first + second

    return step


STEPS: dict[str, Callable[[Row], Callable[[Any, int], Any]]] = {
    "lengths": lengths, "accumulation": accumulation, "triplet": triplet, "preference": preference, "losses": losses,
}  # fmt: skip


# One process


def one_known(request: Row) -> Row:
    """Seconds of forward passes of one call through a plan and through `within`, in turns, and of calls of new sizes."""
    import memplan
    import torch

    torch.manual_seed(0)
    model = model_of(request["model"])
    rows, length = 4, request["length"] // 4
    planned = memplan.plan(model, None, kwargs=batch_of(0, rows, length), time_limit=request["time_limit"]).apply(model)
    kept = memplan.within(model, "1TiB", time_limit=request["time_limit"])

    def took(called: Any, *sizes: int) -> float:
        given = batch_of(0, *sizes)
        began = time.perf_counter()
        loss = called(**given).loss
        seconds = time.perf_counter() - began
        loss.backward()
        model.zero_grad(set_to_none=True)
        return seconds

    for sizes in ((rows, length), (rows + 1, length + 1), (rows + 2, length + 2)):
        took(kept, *sizes)
    took(planned, rows, length)
    turns = [(took(planned, rows, length), took(kept, rows, length)) for _ in range(TURNS)]
    fresh = [(took(kept, rows, length + number), took(kept, rows, length + number)) for number in range(3, 13)]
    return {"turns": turns, "fresh": fresh}


def serve(request: Row) -> Iterator[Row]:
    """Run a situation, and measure every step."""
    if request["situation"] == "known":
        yield one_known(request)
        return
    import memplan
    import torch

    from ..backends.measure.meters import resident
    from ..backends.measure.training import Meter, checksum, keep_freed_memory

    torch.manual_seed(0)
    model = request["plain"] = model_of(request["model"])
    step = STEPS[request["situation"]](request)
    called: Any = model
    ledger: Any = None
    reserved = sum(value.nbytes for value in model.parameters()) if request["situation"] == "preference" else 0
    if request["kind"] == "within":
        options = {"reserved": reserved} if reserved else {}
        called = memplan.within(model, request["budget"], time_limit=request["time_limit"], **options)
    elif request["kind"] == "compile":
        from ..backends.compile.ledger import ledger_of

        options = {"budget": request["budget"] - reserved, "time_limit": request["time_limit"]}
        called, ledger = torch.compile(model, backend="memplan", options=options), ledger_of(options)
    elif request["kind"] == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if request["situation"] == "preference":
        step(called, 0)  # the frozen model is made
        model.zero_grad(set_to_none=True)
    meter, count = Meter("cpu"), request["batches"] if request["situation"] == "lengths" else request["steps"]
    sha, peaks, took, kept, new = hashlib.sha256(), [], [], [], []
    again = 4 if request["situation"] == "accumulation" else 1
    forward = vars(called).get("forward")

    def planned() -> Row:
        return kinds_of(forward) if ledger is None else ledger.counts()

    for number in range(count):
        there = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)
        fixed = sum(value.nbytes for value in model.parameters()) * (1 + (request["situation"] == "preference")) + there
        meter.reset()
        torch.manual_seed(number)
        known = planned()
        began = time.perf_counter()
        loss = step(called, number).item()
        took.append(time.perf_counter() - began)
        peak = meter.peak(fixed)
        peaks.append(peak)
        new.append(planned() != known)
        sha.update(float(loss).hex().encode())
        if (number + 1) % again == 0:
            sha.update(checksum(model).encode())
            model.zero_grad(set_to_none=True)
        kept.append(resident())
    keep_freed_memory()
    yield {"peaks": peaks, "seconds": took, "bits": sha.hexdigest(), "new": new, "resident": kept, **planned()}


def kinds_of(forward: Any) -> Row:
    """What a module within a budget has planned."""
    if not hasattr(forward, "forms"):
        return {}
    kinds = [kind for form in forward.forms.values() for kind in form.kinds]
    every = [kind for kind in kinds if hasattr(kind, "plans")]
    return {
        "shapes": len(kinds) - len(every), "every": len(every),
        "schedules": sum(len(plans.ways) for kind in every for plans in kind.plans.values()),
        "runners": sum(len(kind.runners) for kind in kinds),
        "unplanned": sum(form.unplanned for form in forward.forms.values()),
    }  # fmt: skip


def measure(results: Results, name: str, situation: str, options: argparse.Namespace) -> None:
    """What is missing of one situation."""
    keys = {"model": name, "situation": situation}
    request = keys | {
        "batches": options.batches, "steps": options.steps, "length": options.length, "time_limit": options.time_limit,
    }  # fmt: skip
    for kind in KINDS if situation in STEPS else ("within",):
        if results.last(kind=kind, **keys):
            continue
        eager = results.last(kind="eager", **keys)
        if kind in PLANNED and situation in STEPS:
            if eager is None:
                return
            share = TWO_MODELS if situation == "preference" else options.share
            request["budget"] = int(max(eager["peaks"]) * share)
        say(f"{name}, {situation}: {kind}")
        for row in ask("calls", request | {"kind": kind}, malloc="returning", timeout=options.timeout):
            results.add(keys | {"kind": kind, "budget": request.get("budget")} | row)
            if "failed" in row:
                say(f"{name}, {situation}, {kind} failed: {row['failed']}")


def row_of(name: str, kind: str, eager: Row, ours: Row, other: Row | None) -> tuple[str, ...]:
    """The figures of one situation, planned one way.

    Args:
        name: of the model and the situation.
        kind: what planned it.
        eager: what eager PyTorch took.
        ours: what the planned steps took.
        other: what gradient checkpointing took.
    """
    allowed = ours["budget"] * (1 + SLACK[0]) + SLACK[1]
    planned = [index for index, new in enumerate(ours["new"]) if not new]
    peaks = [ours["peaks"][index] for index in planned]
    over = sum(peak > allowed for peak in peaks)
    disturbed = ours.get("disturbed", False)
    seconds = [ours["seconds"][index] for index in planned]
    late = steady(seconds, [eager["seconds"][index] for index in planned])
    spent = sum(took - late * usual for took, usual, new in
                zip(ours["seconds"], eager["seconds"], ours["new"], strict=True) if new)  # fmt: skip
    return (
        name, kind, f"{len(planned)} of {len(ours['new'])}", mib(max(eager["peaks"])), mib(ours["budget"]),
        mib(max(peaks, default=None)), str(over), mib(max(other["peaks"])) if other else "-",
        verdict(ours["bits"] == eager["bits"]), "-" if disturbed else ratio(late),
        ratio(steady(other["seconds"], eager["seconds"])) if other else "-",
        "-" if disturbed else percent(spent / sum(ours["seconds"])), f"{ours['shapes']} + {ours['every']}",
        str(ours["schedules"]), growth(ours["resident"]),
    )  # fmt: skip


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    heads = ("model, situation", "planned by", "steps", "eager's peak, MiB", "budget, MiB", "peak, MiB", "steps over",
             "checkpointing's", "eager's bits", "time / eager's", "checkpointing's / eager's", "planning / run", "traced",
             "schedules", "grown, MiB")  # fmt: skip
    rows = []
    for situation in SITUATIONS:
        for name in MODELS + tuple(f"{each}:tiny" for each in MODELS):
            keys = {"model": name, "situation": situation}
            eager, *ours, other = (results.last(kind=kind, **keys) for kind in KINDS)
            known = [(kind, each) for kind, each in zip(PLANNED, ours, strict=True) if eager is not None and each is not None]
            rows += [row_of(f"{name}, {situation}", kind, eager, each, other) for kind, each in known]
    lines = header("Batches and calls that differ", results)
    lines += paragraph(
        "Written by `python -m memplan.benchmarks.calls`. Peaks are of whole steps, everything counted, the largest of the "
        "steps for which nothing had to be traced or planned (`steps`: so many of all); those that do hold Python's objects "
        "of the trace beside. A step is over where it passes the budget by more than 3 % and 16 MiB. Time is the median over "
        "these steps of a step's ratio to the same step in eager PyTorch. `planning / run` is what the other steps took beyond "
        "that, as a share of the run. `traced`: shapes traced alone + traces for every size; `schedules`: of the latter. "
        "`planned by`: `memplan.within`, or `torch.compile` with memplan as its backend. "
        "`grown`: the resident set, from the middle of the run to its end. Times are taken with an allocator that gives "
        "memory back; a dash stands for those of a run that had other work beside it."
    )
    lines += [*markdown(heads, rows), "", *one_call(results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def one_call(results: Results) -> list[str]:
    """What `within` adds to a call, as a table."""
    rows = []
    for name in MODELS + tuple(f"{each}:tiny" for each in MODELS):
        found = results.last(model=name, situation="known", kind="within")
        if found is not None and "turns" in found:
            planned, kept = (sorted(each) for each in zip(*found["turns"], strict=True))
            fresh = sorted(first - second for first, second in found["fresh"])
            middle = len(planned) // 2
            rows.append((name, f"{planned[middle] * 1e3:.1f}", ratio(kept[middle] / planned[middle]),
                         f"{fresh[len(fresh) // 2] * 1e3:.0f}"))  # fmt: skip
    if not rows:
        return []
    text = paragraph(f"One forward pass of a call that is known, through a plan and through `within`, in turns: medians of "
                     f"{TURNS}. A new size: what its first call takes beyond its second, the median of ten.")  # fmt: skip
    return [*text, *markdown(("model", "plan, ms", "within / plan", "a new size, ms"), rows)]


def growth(resident: list[int]) -> str:
    """By how much the resident set grew in the second half of a run."""
    return f"{(resident[-1] - resident[len(resident) // 2]) / MIB:.1f}"


def steady(ours: list[float], eager: list[float]) -> float:
    """The median of the steps' ratios to eager's."""
    ratios = sorted(one / other for one, other in zip(ours, eager, strict=True))
    return ratios[len(ratios) // 2] if ratios else float("nan")


def run(results: Results, options: argparse.Namespace) -> Iterator[None]:
    """Each situation of each model."""
    for situation in options.situations:
        for name in options.models:
            measure(results, name, situation, options)
            yield


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.models, options.batches, options.steps, options.length = ["gpt2:tiny"], 6, 4, 32


def forget(results: Results, options: argparse.Namespace) -> None:
    """Drop what was measured of the same."""
    for situation in options.situations:
        for name in options.models:
            results.drop(model=name, situation=situation)


def main() -> None:
    """The command line."""
    command = Command("calls", __doc__, run, render, serve, quick=quick, forget=forget)
    command.add_models(MODELS, [*MODELS, *(f"{each}:tiny" for each in MODELS)])
    command.add("--situations", nargs="+", choices=[*SITUATIONS, "known"], default=[*SITUATIONS, "known"])
    command.add("--batches", type=int, default=200, help="of random sizes")
    command.add("--steps", type=int, default=8, help="of the other situations")
    command.add("--length", type=int, default=POSITIONS, help="the longest")
    command.add("--share", type=float, default=0.6, help="of eager's peak that is the budget")
    command.add_limits(planning=30.0, process=3600.0)
    command()


if __name__ == "__main__":
    main()

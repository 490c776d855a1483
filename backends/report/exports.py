"""Plans for tools that people already use: Perfetto, PyTorch's memory visualiser, a browser."""

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.ir.files import write_file
from ...planner.ir.program import Program
from ...planner.ir.schedule import Run, Schedule
from ...planner.ir.text import show_program, show_schedule
from ...planner.ir.units import show_bytes, show_seconds
from .pictures import svg, timeline
from .replay import Life, copies, largest, layer_of, layers, lives, phases

if TYPE_CHECKING:
    from ...planner.ir.machine import Machine
    from ...planner.ir.plan import Plan, Side

Event = dict[str, Any]
PHASE_TRACK, UNIT_TRACK, LINK_TRACK = 0, 10, 20
BASE = 0x7F0000000000  # where the visualiser's addresses begin: looks like an address, and is not zero


def save_trace(plan: "Plan", path: str | Path) -> None:
    """Write a Chrome trace (JSON, times in microseconds) of the planned and the unplanned step, for ui.perfetto.dev."""
    events: list[Event] = []
    for process, (name, side) in enumerate([("planned", plan.planned), ("unplanned", plan.unplanned)]):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}})
        events += [{**event, "pid": process} for event in trace_events(plan, side)]
    write_file(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def trace_events(plan: "Plan", side: "Side") -> Iterator[Event]:
    """One schedule's tracks: phases, one for each unit and link, and the counter of live bytes by kind."""
    program, machine = side.program, plan.machine
    ends = {PHASE_TRACK: "phase"}
    ends |= {UNIT_TRACK + index: f"unit {unit.name}" for index, unit in enumerate(machine.units)}
    ends |= {LINK_TRACK + index: f"{link.source} to {link.target}" for index, link in enumerate(machine.links)}
    for track, name in ends.items():
        yield {"ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "tid": track, "args": {"sort_index": track}}
    starts = side.report.starts
    reached = phases(program, side.schedule)
    for (phase, at), (_, following) in zip(reached, [*reached[1:], (None, None)], strict=True):
        until = side.time if following is None else starts[following]
        yield slice_of(phase.value, "phase", PHASE_TRACK, starts[at], until - starts[at])
    yield from work(program, machine, side)
    held = layers(program, machine, side.schedule)
    last: Event = {}
    for at, start in enumerate(starts):
        values = {str(name): int(bytes_held[at]) for name, bytes_held in held.items()}
        if values != last:
            yield {"ph": "C", "name": "live bytes", "tid": 0, "ts": start * 1e6, "args": values}
            last = values


def work(program: Program, machine: "Machine", side: "Side") -> Iterator[Event]:
    """Runs on their units, copies on their links."""
    done: set[int] = set()
    for step, start in zip(side.schedule.instructions, side.report.starts, strict=True):
        if isinstance(step, Run):
            op = program.ops[step.op]
            again = step.op in done
            done.add(step.op)
            facts = {
                "op": op.name,
                "where": op.where,
                "again": again,
                "writes": {program.buffers[b].name: show_bytes(program.buffers[b].bytes) for b in op.writes},
            }
            category = "recompute" if again else op.phase.value
            event = slice_of(op.target, category, UNIT_TRACK + step.unit, start, op.seconds, facts)
            yield {**event, "cname": "bad"} if again else event
    for copy in copies(program, machine, side):
        buffer = program.buffers[copy.buffer]
        facts = {"size": show_bytes(buffer.bytes)}
        yield slice_of(buffer.name, "copy", LINK_TRACK + copy.link, copy.begin, copy.end - copy.begin, facts)


def slice_of(name: str, category: str, track: int, start: float, seconds: float, facts: Event | None = None) -> Event:
    """A complete event of the trace format."""
    when = {"ts": start * 1e6, "dur": seconds * 1e6}
    return {"ph": "X", "name": name, "cat": category, "tid": track, **when, "args": facts or {}}


def save_snapshot(plan: "Plan", path: str | Path) -> None:
    """Write a memory snapshot for pytorch.org/memory_viz: planned is device 0, unplanned device 1.

    The viewer reads pickles itself, in JavaScript: of protocol 4 at most, and of plain values alone.
    """
    raw = io.BytesIO()
    _Plain(raw, protocol=4).dump(snapshot(plan))
    write_file(path, raw.getvalue())


class _Plain(pickle.Pickler):
    """Writes nested dicts and lists of strings and numbers, and refuses what needs a class to be read again."""

    def reducer_override(self, obj: Any) -> Any:
        raise TypeError(f"a snapshot holds {obj!r}, which PyTorch's viewer cannot read")


def snapshot(plan: "Plan") -> Event:
    """What `torch.cuda.memory._snapshot()` returns, had the schedules run on a device."""
    sides = [memory_of(plan, side, device) for device, side in enumerate([plan.planned, plan.unplanned])]
    return {"segments": [segment for segment, _ in sides], "device_traces": [trace for _, trace in sides]}


def memory_of(plan: "Plan", side: "Side", device: int) -> tuple[Event, list[Event]]:
    """One schedule's segment and its allocations and frees.

    What is live before the step has no event and stands in the segment, as memory allocated before recording does.
    """
    everything = [life for life in lives(side.program, plan.machine, side.schedule) if life.bytes]
    places, total = addresses(everything, side.schedule)
    moments: list[tuple[int, int, Life]] = []
    for life in everything:
        if life.maker >= 0:
            moments.append((life.lower, 1, life))
        if not life.final:
            moments.append((life.upper, 0, life))
    trace = []
    for at, opens, life in sorted(moments, key=lambda entry: entry[:2]):
        moment = side.report.starts[at] if at < len(side.report.starts) else side.time
        facts = {
            "addr": places[life],
            "size": life.bytes,
            "stream": 0,
            "frames": frames(side.program, side.schedule, life),
            "time_us": int(1e6 * moment),
        }
        # A free is asked for and completed: the visualiser folds the two, its Python tools want both.
        actions = ["alloc"] if opens else ["free_requested", "free_completed"]
        trace += [{"action": action, **facts} for action in actions]
    final = sorted((places[life], life) for life in everything if life.final)
    blocks, here = [], BASE
    for address, life in final:
        blocks += [block(here, address - here, "inactive", [])] if address > here else []
        blocks.append(block(address, life.bytes, "active_allocated", frames(side.program, side.schedule, life)))
        here = address + life.bytes
    blocks += [block(here, BASE + total - here, "inactive", [])] if BASE + total > here else []
    allocated = sum(life.bytes for _, life in final)
    segment = {
        "device": device,
        "address": BASE,
        "total_size": total,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": allocated,
        "stream": 0,
        "segment_type": "large",
        "frames": [],
        "blocks": blocks,
    }
    return segment, trace


def block(address: int, size: int, state: str, stack: list[Event]) -> Event:
    """A block of a segment."""
    return {"address": address, "size": size, "requested_size": size, "state": state, "frames": stack}


def frames(program: Program, schedule: Schedule, life: Life) -> list[Event]:
    """A life's "stack": the tensor, the operator that made it, the module that called that."""
    step = schedule.instructions[life.maker] if life.maker >= 0 else None
    name = "workspace" if life.buffer < 0 else program.buffers[life.buffer].name
    stack = [{"name": name, "filename": str(layer_of(program, life)), "line": max(life.buffer, 0)}]
    if isinstance(step, Run):
        op = program.ops[step.op]
        stack.append({"name": op.target, "filename": op.name, "line": step.op})
        stack += [{"name": op.phase.value, "filename": op.where, "line": life.maker}] if op.where else []
    return stack


def addresses(everything: list[Life], schedule: Schedule) -> tuple[dict[Life, int], int]:
    """An address for each life, and the bytes that they span.

    They are the schedule's own where it has placements. Otherwise freed bytes go to the next buffer of the same size,
    as in a caching allocator, so that the picture of the segment stays of a size that can be looked at.
    """
    planned = {(place.buffer, place.lower): place.offset for place in schedule.placements if place.tier == 0}
    known = [life for life in everything if (life.buffer, life.lower) in planned]
    top = max((life.bytes + planned[life.buffer, life.lower] for life in known), default=0)
    cache: dict[int, list[int]] = defaultdict(list)
    waiting = sorted(everything, key=lambda life: life.upper, reverse=True)
    places: dict[Life, int] = {}
    for life in sorted(everything, key=lambda life: life.lower):
        if (life.buffer, life.lower) in planned:
            places[life] = BASE + planned[life.buffer, life.lower]
            continue
        while waiting and waiting[-1].upper <= life.lower:
            ended = waiting.pop()
            if (ended.buffer, ended.lower) not in planned:
                cache[ended.bytes].append(places[ended])
        if cache[life.bytes]:
            places[life] = cache[life.bytes].pop()
        else:
            places[life] = BASE + top
            top += life.bytes
    return places, top


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; }}

svg {{ width: 100%; height: auto; }}
pre {{ overflow-x: auto; font-size: 12px; line-height: 1.35; background: #f6f6f6; padding: 1rem; }}
</style></head><body>
<h1>{title}</h1>
{summary}
<h2>Memory of a step</h2>
{picture}
<h2>Largest buffers at the peak</h2>
{buffers}
<details><summary>Schedule</summary><pre>{schedule}</pre></details>
<details><summary>Program</summary><pre>{program}</pre></details>
</body></html>
"""


def save_html(plan: "Plan", path: str | Path) -> None:
    """Write one self-contained page: summary, timeline, the largest buffers at the peak, schedule and program."""
    counts = plan.counts
    summary = [
        ("", "planned", "unplanned"),
        ("peak", show_bytes(plan.peak), show_bytes(plan.unplanned.peak)),
        ("step time (predicted)", show_seconds(plan.time), show_seconds(plan.unplanned.time)),
        ("repeated runs", str(plan.planned.report.repeated), str(plan.unplanned.report.repeated)),
        ("budget", "none" if plan.budget is None else show_bytes(plan.budget), ""),
        ("smallest budget known to work", show_bytes(plan.minimum), ""),
        ("gap to the bound", f"{plan.gap:.1%}, {plan.status}", ""),
        ("activations kept, recomputed, offloaded", f"{counts.keep}, {counts.recompute}, {counts.offload}", ""),
    ]
    at = plan.planned.report.timeline.index(plan.peak) if plan.peak in plan.planned.report.timeline else 0
    rows = [("buffer", "kind", "size", "made by")]
    for life in largest(plan.program, plan.machine, plan.schedule, at, 20):
        stack = frames(plan.program, plan.schedule, life)
        made = " in ".join([*(frame["name"] for frame in stack[1:2]), *(frame["filename"] for frame in stack[2:])])
        rows.append((stack[0]["name"], layer_of(plan.program, life), show_bytes(life.bytes), made))
    page = PAGE.format(
        title=escape(f"{plan.program.name} on {plan.machine.name}"),
        summary=table(summary),
        picture=svg(timeline(plan)),
        buffers=table(rows),
        schedule=escape(show_schedule(plan.program, plan.schedule)),
        program=escape(show_program(plan.program)),
    )
    write_file(path, page)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as an HTML table, the first one its head; everything escaped."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"

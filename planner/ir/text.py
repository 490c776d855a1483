"""Programs and schedules as text: stable, aligned, one line each, for golden files that a person reviews.

A buffer is `%index` everywhere. Sizes have three significant digits; seconds appear where they are known.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .schedule import Free, Instruction, Run, Schedule, Start
from .units import show_bytes, show_seconds

if TYPE_CHECKING:
    from .program import Op, Program

Row = Sequence[str]
WIDEST = 96  # characters of a column
FOLDED = 8  # buffers in a row that are written as a range


def show_program(program: "Program") -> str:
    """The buffers, then the ops in base order with a heading per phase, then the outputs."""
    head = f"program {program.name} on {program.device}: {len(program.ops)} ops, {len(program.buffers)} buffers"
    lines = [f"{head}, {show_bytes(program.resident_bytes)} resident", "buffers"]
    lines += align(
        (f"%{index}", buffer.kind.value, show_bytes(buffer.bytes), "" if made < 0 else f"op {made}", buffer.name)
        for index, (buffer, made) in enumerate(zip(program.buffers, program.producer, strict=True))
    )
    effects = [op_effects(program, op, op.writes, op.reuse, "can reuse") for op in program.ops]
    rows = align((str(at), op.target, op.where, effects[at], *op_costs(op)) for at, op in enumerate(program.ops))
    phase = None
    for op, row in zip(program.ops, rows, strict=True):
        if op.phase is not phase:
            lines.append(op.phase.value)
            phase = op.phase
        lines.append(row)
    return "\n".join([*lines, f"outputs {buffers(program.outputs)}".rstrip(), ""])


def show_schedule(program: "Program", schedule: Schedule) -> str:
    """One line per instruction, consecutive frees on one; `again` marks a run that is not the op's first.

    A heading tells when the first op of a phase starts. The numbers are those that the referee's verdicts name.
    """
    cells, headings = [], {}
    phases, done, again = set(), set(), 0
    for at, step, freed in folded(schedule):
        if isinstance(step, Run):
            op = program.ops[step.op]
            if op.phase not in phases:
                phases.add(op.phase)
                headings[len(cells)] = op.phase.value
            verb = "again" if step.op in done else "run"
            again += step.op in done
            done.add(step.op)
            effects = op_effects(program, op, step.keep, step.reuse, "in")
            unit = [f"on unit {step.unit}"] if step.unit else []
            cells.append((str(at), verb, op.target, op.where, effects, *op_costs(op), *unit))
        elif isinstance(step, Free):
            cells.append((str(at), "free", buffers(freed) + (f" in tier {step.tier}" if step.tier else "")))
        else:
            verb = "start" if isinstance(step, Start) else "wait"
            size = show_bytes(program.buffers[step.buffer].bytes)
            cells.append((str(at), verb, f"%{step.buffer} {size} over link {step.link}"))
    lines = [f"schedule for {program.name}: {len(schedule.instructions)} instructions, {again} repeated runs"]
    for number, row in enumerate(align(cells)):
        if number in headings:
            lines.append(headings[number])
        lines.append(row)
    if schedule.placements:
        lines.append("placements")
        lines += align(
            (f"%{place.buffer}", f"tier {place.tier}", f"at {place.offset}", f"during [{place.lower}, {place.upper})")
            for place in schedule.placements
        )
    for title, some in (("outside", schedule.outside), ("lent", schedule.lent)):
        if some:
            lines += [title, f"  {buffers(some)}"]
    for tier in sorted({tier for _, tier in schedule.homes}):
        lines += [f"at home in tier {tier}", f"  {buffers(buffer for buffer, other in schedule.homes if other == tier)}"]
    return "\n".join([*lines, ""])


def folded(schedule: Schedule) -> Iterator[tuple[int, Instruction, list[int]]]:
    """Instructions with their index; a row of frees in one tier comes as its first, with all their buffers."""
    steps = schedule.instructions
    at = 0
    while at < len(steps):
        step, end = steps[at], at + 1
        if isinstance(step, Free):
            while end < len(steps) and isinstance(other := steps[end], Free) and other.tier == step.tier:
                end += 1
        yield at, step, [free.buffer for free in steps[at:end] if isinstance(free, Free)]
        at = end


def op_effects(program: "Program", op: "Op", keep: Iterable[int], reuse: Iterable[tuple[int, int]], verb: str) -> str:
    """`(%3 %10) -> %11 1.5 MiB, %12 dropped`: what an op reads, and what becomes of what it writes."""
    kept, taken = set(keep), dict(reuse)
    writes = []
    for buffer in op.writes:
        over = f" {verb} %{taken[buffer]}" if buffer in taken else ""
        dropped = "" if buffer in kept else " dropped"
        writes.append(f"%{buffer} {show_bytes(program.buffers[buffer].bytes)}{over}{dropped}")
    changed = [f"changes {buffers(op.mutates)}"] if op.mutates else []
    return f"({buffers(op.reads)}) -> {', '.join([*writes, *changed]) or 'nothing'}"


def op_costs(op: "Op") -> tuple[str, str]:
    """The op's seconds, and its remarks: workspace, random, once."""
    remarks = [f"workspace {show_bytes(op.workspace)}"] if op.workspace else []
    remarks += ["random"] if op.random else []
    remarks += [] if op.repeatable else ["once"]
    return show_seconds(op.seconds) if op.seconds > 0 else "", ", ".join(remarks)


def buffers(indices: Iterable[int]) -> str:
    """`%3 %10`; many in a row, as of an update of everything, as `%3...%294`."""
    known = list(indices)
    words, at = [], 0
    while at < len(known):
        end = at + 1
        while end < len(known) and known[end] == known[end - 1] + 1:
            end += 1
        row = known[at:end]
        words += [f"%{row[0]}...%{row[-1]}"] if len(row) >= FOLDED else [f"%{index}" for index in row]
        at = end
    return " ".join(words)


def align(rows: Iterable[Row]) -> list[str]:
    """Pad the cells of each column to one width; a row's last cell is neither padded nor counted.

    A cell wider than `WIDEST` is not counted either, and pushes the rest of its row to the right: else one op that reads
    everything would fill the whole text with spaces.
    """
    table = [list(row) for row in rows]
    for row in table:
        while row and not row[-1]:
            row.pop()
    columns = max(map(len, table), default=0)
    widths = [max((len(row[c]) for row in table if len(row) > c + 1 and len(row[c]) <= WIDEST), default=0)
              for c in range(columns)]  # fmt: skip
    padded = [[*(cell.ljust(widths[at]) for at, cell in enumerate(row[:-1])), *row[-1:]] for row in table]
    return ["  " + "  ".join(row) for row in padded]

"""What is live at a schedule's peak: by buffer, and by module."""

import re
from collections import Counter

import numpy as np

from ..ir.plan import Side
from ..ir.program import Kind, Program
from ..ir.schedule import Free, Run, Start

STATE = "optimizer state"
INPUTS = "inputs"


def live_at_peak(program: Program, side: Side) -> tuple[set[int], int | None]:
    """The buffers on the device, and the op whose workspace counts; None for none."""
    worst = int(np.argmax(side.report.timeline))
    live = {buffer for buffer, op in enumerate(program.producer) if op < 0} - dict(side.schedule.homes).keys()
    running: int | None = None
    for step in side.schedule.instructions[: worst + 1]:
        if isinstance(step, Run):
            op = program.ops[step.op]
            done = side.schedule.instructions[worst] is not step
            live |= set(step.keep if done else op.writes)
            live -= {old for _, old in step.reuse}
            running = step.op
        elif isinstance(step, Start):
            live.add(step.buffer)  # a copy out is of what is there
        elif isinstance(step, Free) and step.tier == 0:
            live.discard(step.buffer)
    return live, running


def at_peak(program: Program, side: Side) -> list[tuple[str, int]]:
    """What is live at a schedule's peak, largest first: (name, bytes), workspace included."""
    live, running = live_at_peak(program, side)
    rows = [(program.buffers[buffer].name, program.buffers[buffer].bytes) for buffer in live]
    rows.append(("workspace", 0 if running is None else program.ops[running].workspace))
    return sorted(rows, key=lambda row: -row[1])


def modules_at_peak(program: Program, side: Side) -> dict[str, int]:
    """The same by module, most first: bytes of its parameters and of what its ops have made, workspace included.

    Layers with numbers are one: `h.*.mlp`. Optimizer state and inputs are of no module, and have names of their own.
    """
    live, running = live_at_peak(program, side)
    found: Counter[str] = Counter()
    for buffer in live:
        found[holder(program, buffer)] += program.buffers[buffer].bytes
    if running is not None:
        found[numberless(program.ops[running].where)] += program.ops[running].workspace
    return {name: size for name, size in found.most_common() if size}


def holder(program: Program, buffer: int) -> str:
    """Whose a buffer is."""
    made, known = program.producer[buffer], program.buffers[buffer]
    if made >= 0:
        return numberless(program.ops[made].where)
    if known.kind is Kind.INPUT:
        return INPUTS
    return STATE if known.kind is Kind.STATE else numberless(known.name.rpartition(".")[0])


def numberless(module: str) -> str:
    """A module's name with a star for each number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)

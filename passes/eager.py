"""The step as eager PyTorch runs it: every op once, in eager's order, and memory freed when autograd lets go of it.

An autograd node holds the gradients that came in and what was saved for it until all its ops are done
(torch/csrc/autograd/engine.cpp releases a node's variables after the call), and the temporaries of an expression until the
expression is: `(2 * x.pow(1)) * gradient` has all five tensors at once. An expression is taken to be ops of which each reads
what the one before it made. Nothing is written in place but the engine's own sums of gradients (input_buffer.cpp adds to what
nobody else holds). What the forward pass holds beyond the last use, in variables of the model's code, a graph does not tell.
"""

from dataclasses import dataclass

import msgspec

from ..planner.ir.program import SUM, Program
from ..planner.ir.schedule import Free, Instruction, Run, Schedule
from .liveness import Liveness


@dataclass(frozen=True)
class Eager:
    """Program -> its unplanned schedule."""

    name = "eager"

    def __call__(self, program: Program) -> Schedule:
        """The schedule: that of the base order, with what is freed inside a group of ops freed at its end."""
        sums = {index for index, op in enumerate(program.ops) if op.group == SUM}
        schedule = Liveness(only=sums)(program, range(len(program.ops)))
        made: list[Instruction] = []
        held: list[Free] = []  # by an autograd node
        within: list[Free] = []  # by an expression of it
        group, last = 0, None
        for step in schedule.instructions:
            if isinstance(step, Run):
                op = program.ops[step.op]
                if last is None or not set(op.reads) & set(last.writes):
                    made += within
                    within = []
                if op.group != group or group <= 0:
                    made += [*within, *held]
                    held, within = [], []
                group, last = op.group, op
                made.append(step)
            elif isinstance(step, Free):
                maker = program.producer[step.buffer]
                inside = group > 0 and maker >= 0 and program.ops[maker].group == group
                (within if inside else held).append(step)
        return msgspec.structs.replace(schedule, instructions=(*made, *within, *held))

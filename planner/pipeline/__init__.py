"""Program and budget -> schedule: passes and solvers in order, every answer replayed by the referee.

Comes in: a program with its costs, a machine, a budget. Goes out: an `Answer`, which is a schedule, its report and a bound.
`planner.py` for a training step or an inference, `mapping.py` for a scratchpad, `storage.py` for a file of buffers.
Imports passes and solvers; knows no model.
"""

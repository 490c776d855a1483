"""Program and budget -> schedule: passes and solvers in order, every answer replayed by the referee.

Comes in: a program with its costs, a machine, a budget. Goes out: a schedule, its report and a bound.
`planner.py` for a training step or an inference (`Planner.solve`), `mapping.py` for a scratchpad (`Mapper.map`), `storage.py`
for a file of buffers (`place_pools`).
Imports passes and solvers; knows no model.
"""

"""What an op costs: measured figures, estimates, workspaces, and this host's rates.

Comes in: a program, a machine. Goes out: the same program with seconds and workspaces (`table.apply_costs`).
Imports `ir` alone; what measures ops is `backends.measure`.
"""

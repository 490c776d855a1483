"""When is a value resident: keep, recompute, hold, move.

`problem.py` states the problem as flat arrays, and checks and scores an answer by simulation (`replay.py`); `methods.py` names
the ways, each of which is a file with `solve(problem, limit) -> Answer`: `search.py` by every means, among them `exact.py` (the
integer program) and `anneal.py`.

The planner asks one problem for many budgets, and goes on where it was: `MultiStart`, `Master` and `CutModel` are what it keeps
between its calls, and `solve` makes one for one call. The other files answer another question. `bound.py` says what no answer
is faster than, `descent.py` looks for the smallest budget, `segments.py` finds layers that come again, and `memo_rule.py` is
a rule to compare with, which has to be told which ops attend.
"""

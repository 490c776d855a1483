"""When is a value resident: keep, recompute, hold, move.

`problem.py` states the problem as flat arrays and scores answers by simulation (`replay.py`); `search.py` with `descent.py` and
`anneal.py` searches; `exact.py` is the integer program; `bound.py` bounds; `segments.py` finds layers that come again.
"""

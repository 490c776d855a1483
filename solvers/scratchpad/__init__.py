"""Which order and which residency move the fewest bytes through a scratchpad.

`problem.py` states the problem, checks an answer and scores it; `methods.py` names the ways, each of which is a file with
`solve(problem, limit) -> Answer[Mapped, int]`: `spm.py` by every means, among them `ordered.py` (one order), `orders.py` (best
first over all) and `walls.py`, which take an answer further; `cosma.py` and `replacement.py` are what they are compared with.

The other files answer another question. `waists.py` cuts a problem into parts, `peakorder.py` finds the order of the smallest
peak, `overlap.py` bounds a mapping's time. `again.py` and `placed.py` start from an answer and ask more of it: ops may run
again, addresses shall exist.
"""

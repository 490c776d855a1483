"""Which order and which residency move the fewest bytes through a scratchpad.

`residency.py` states, checks and scores; `spm.py` answers; `orders.py`, `walls.py`, `again.py`, `placed.py` are the means,
`cosma.py` and `replacement.py` what they are compared with.
"""

"""Where does it lie: addresses for buffers with known lifetimes (dynamic storage allocation).

`problem.py` states, checks and scores; `allocate.py` answers by every means; `greedy.py`, `canonical.py` (exact), `levels.py`
(what comes again is packed once) and `formulations.py` (as others state it) are the means.
"""

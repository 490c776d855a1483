"""Where does it lie: addresses for buffers with known lifetimes (dynamic storage allocation).

`problem.py` states the problem, checks an answer and scores it; `methods.py` names the ways, each of which is a file with
`solve(storage, limit) -> Packing`: `allocate.py` by every means, `cpsat.py` and `mip.py` as others state it.

The other files are means of `allocate.py` and answer less than the whole: `greedy.py` gives offsets at once and knows no
bound; `canonical.py` is asked for one capacity; `coalesce.py` and `merge.py` make a smaller problem, `repeat.py` and
`levels.py` one for each level. `share.py` asks a way about a wider problem, in which buffers may lie on one another.
`instances.py` makes problems to try.
"""

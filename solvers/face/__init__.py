"""The face that every room of solvers shows: what a way is asked, and what it answers.

A room states its problem in `problem.py`, which checks an answer and scores it. A way is a file with `solve(problem, limit) ->
Answer`, and a row in the room's `methods.py`; the room's `__init__.py` says which files are no ways, and why.
"""

"""Model -> `Program`: the only reader of torch's graphs and of a model's state.

Comes in: a module and example inputs. Goes out: `Captured`, a program with what a backend needs to run it.
Begins at `capture.py`. Imports `cost` for the keys of ops, and `ir`.
"""

"""One file a verb: `plan`, `map`, `alloc`.

Comes in: what the user passes. Goes out: `Plan`, `MappedModel`, places.
Each prepares (captures, measures), asks the pipeline, and assembles the answer. Imported by `memplan` itself and by `cli`.
"""

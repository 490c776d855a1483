"""One file a verb: `plan`, `fit`, `map`, `alloc`.

Comes in: what the user passes. Goes out: `Plan`, `Fit`, `MappedModel`, `Places`.
Each has a session (`Session`, which `fit` keeps in its `Steps`, `MapSession`, `AllocSession`), which checks what it is given,
traces or reads it once, asks the pipeline, and hands back an object that tells the answer. Imported by `memplan` itself and by
`cli`.
"""

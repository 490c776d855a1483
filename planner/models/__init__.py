"""Models by name, as the command line and processes that train them write them.

Comes in: `file.py:factory`, `package.module:factory` or `hf:gpt2?n_layer=2`. Goes out: a module and its inputs.
`spec.py` reads a name without torch; `byname.py` builds; `knobs.py` builds the same with another batch, sequence or depth.
"""

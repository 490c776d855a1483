"""The nouns, and the referee that judges them.

Comes in: nothing of memplan. Goes out: `Program`, `Machine`, `Schedule`, `Plan`, their texts and files, `referee`, errors,
units. May be imported by everybody; imports no other room, but that
`Plan.apply` loads `backends.eager` when it is called.
"""

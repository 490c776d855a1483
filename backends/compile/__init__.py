"""The `torch.compile` door.

Comes in: the pieces that Dynamo cuts. Goes out: callables (`door.memplan`). Imports `eager` and `tiers`.
"""

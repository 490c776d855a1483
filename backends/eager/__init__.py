"""A schedule as PyTorch calls: generated code, arena, optimizer updates, CUDA graphs.

Comes in: a plan and a model. Goes out: a module that steps by the plan (`module.apply`). Imports `tiers`.
"""

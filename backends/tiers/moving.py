"""What generated code needs to move values between tiers: where each lies there, and tensors to copy from and into.

t1 = open_1()                              one step's space in tier 1
t1.start(5, t1.put(4096, v3))              Start: v3's storage is being copied to offset 4096
t1.wait(5)                                 Wait
v3 = blank_v3(); t1.start(5, t1.get(4096, v3))
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from ...passes.place import find_lives, requests_of
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine
from ...planner.ir.program import Program
from ...planner.ir.schedule import Schedule, Start
from ...solvers.face.answer import Limit
from ...solvers.storage import allocate
from .filetier import FileTier
from .pinnedtier import PinnedTier

PLACING = 0.2  # seconds of search for the addresses in each tier: it is large, so a fast answer will do


def places_of(program: Program, machine: Machine, schedule: Schedule) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Where each moved buffer lies: (buffer, tier) -> offset; and how many bytes of each tier a step needs.

    They are the schedule's own addresses where it has them.
    """
    offsets: dict[tuple[int, int], int] = {(p.buffer, p.tier): p.offset for p in schedule.placements if p.tier}
    size = np.array([buffer.bytes for buffer in program.buffers], np.int64)
    if any(isinstance(step, Start) for step in schedule.instructions) and not schedule.placements:
        lives = [life for life in find_lives(program, machine, schedule) if life.tier]
        for tier in sorted({life.tier for life in lives}):
            mine = [life for life in lives if life.tier == tier]
            storage, names = requests_of(mine, size, machine.tiers[tier].alignment)
            offset = allocate.solve(storage, Limit(seconds=PLACING)).found
            offsets |= {(life.buffer, tier): int(offset[names[life.request]]) for life in mine}
    ends: dict[int, int] = {}
    for (buffer, tier), offset in offsets.items():
        ends[tier] = max(ends.get(tier, 0), offset + int(size[buffer]))
    return offsets, ends


def make_tier(machine: Machine, tier: int, size: int) -> Any:
    """The memory behind a tier: a file for a step on the CPU, pinned memory of the host for one on a GPU.

    Raises:
        MemplanError: the machine has a tier that nothing here stands for.
    """
    if machine.device == "cpu":
        return FileTier(size)
    if machine.tiers[tier].name == "host":
        return PinnedTier(size)
    raise MemplanError(f"nothing on {machine.device} stands for the tier {machine.tiers[tier].name!r}: plan without it")


def blank(like: torch.Tensor, device: str) -> Any:
    """A function that makes a tensor with the layout of another, over a new storage of the same size."""
    facts = like.untyped_storage().nbytes(), like.dtype, like.storage_offset(), tuple(like.shape), like.stride()
    return partial(new_tensor, device, *facts)


def storage_over(pool: torch.Tensor, begin: int, size: int) -> torch.UntypedStorage:
    """A storage of its own over some bytes of a flat tensor of bytes, which lives as long as it.

    Operators that stride by absolute offsets (`as_strided`), or copy a storage from its beginning (`slice_scatter`), find there
    what they would find in a storage that was allocated for the one buffer.
    """
    return torch.from_dlpack(pool[begin : begin + size]).untyped_storage()


def new_tensor(
    device: str | torch.device, size: int, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A tensor of that layout over a new storage of `size` bytes."""
    storage = torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, stride)

"""Storage problems to try solvers on: rectangles cut at random, whose optimum is known, and blocks that come again."""

from collections.abc import Sequence

import numpy as np

from ..jit.compiled import compiled
from .problem import Storage, make_storage


@compiled()
def _cut(count, duration, height, share, draws):  # pragma: no cover
    """Cut `count - 1` times; each time a piece drawn by area is halved, across time with probability `share`."""
    lower, upper = np.zeros(count, np.int64), np.zeros(count, np.int64)
    offset, size = np.zeros(count, np.int64), np.zeros(count, np.int64)
    upper[0], size[0] = duration, height
    leaves = 1
    while leaves < count:
        leaves *= 2
    area = np.zeros(2 * leaves)
    area[leaves] = 1.0
    node = leaves // 2
    while node > 0:
        area[node] = area[2 * node] + area[2 * node + 1]
        node //= 2
    made = 1
    for number in range(len(draws)):
        if made == count:
            break
        where, across, cut = draws[number, 0] * area[1], draws[number, 1] < share, draws[number, 2]
        node = 1
        while node < leaves:
            node *= 2
            if where >= area[node] and area[node + 1] > 0:
                where -= area[node]
                node += 1
        i = node - leaves
        length = upper[i] - lower[i] if across else size[i]
        if length < 2:
            continue
        at = 1 + int(cut * (length - 1))
        lower[made], upper[made], offset[made], size[made] = lower[i], upper[i], offset[i], size[i]
        if across:
            upper[i] = lower[made] = lower[i] + at
        else:
            size[made] = size[i] - at
            size[i] = at
            offset[made] = offset[i] + at
        for j in (i, made):
            node = leaves + j
            area[node] = (upper[j] - lower[j]) / duration * (size[j] / height)
            node //= 2
            while node > 0:
                area[node] = area[2 * node] + area[2 * node + 1]
                node //= 2
        made += 1
    return lower[:made], upper[:made], offset[:made], size[:made]


def cut_rectangle(
    count: int, seed: int = 0, duration: int = 2**30, height: int = 2**40, across: float = 0.5, fray: float = 0.0
) -> tuple[Storage, np.ndarray]:
    """Buffers cut out of a rectangle, and a packing of them: no packing has a peak below `height`.

    Args:
        count: buffers; fewer where the rectangle is too small to be cut so often.
        seed: of the cuts.
        duration: of the whole trace.
        height: the optimum, in bytes.
        across: the share of cuts at a moment in time; the others are at an address.
        fray: lifetimes are then shortened by up to this share, at one end or the other, so that few buffers fit one
            another exactly; those live at one moment, drawn at random, are left as they are, and hold the bound.
    """
    random = np.random.default_rng(seed)
    lower, upper, offset, size = _cut(count, duration, height, across, random.random((2 * count + 64, 3)))
    if fray:
        moment = random.integers(duration)
        loss = (random.random(len(size)) * fray * (upper - lower)).astype(np.int64)
        loss[(lower <= moment) & (moment < upper)] = 0
        early = random.random(len(size)) < 0.5
        lower, upper = lower + np.where(early, loss, 0), upper - np.where(early, 0, loss)
    order = random.permutation(len(size))
    return make_storage(lower[order], upper[order], size[order]), offset[order]


def tower(block: Storage, times: int, kept: Sequence[int]) -> Storage:
    """Equal blocks in a row, each of which keeps some buffers until a tail in which they are freed, the last ones first.

    Args:
        block: buffers of one span each.
        times: how many blocks.
        kept: sizes of what each block makes and keeps.
    """
    long, each = int(block.upper.max()), np.arange(times)
    end = times * long
    shift = np.repeat(each * long, len(block))
    made = np.repeat(each * long + long // 2, len(kept))
    freed = np.repeat(end + times - each, len(kept))
    tail = end + each  # something happens at each moment of the tail
    return make_storage(
        np.concatenate([np.tile(block.lower, times) + shift, made, tail]),
        np.concatenate([np.tile(block.upper, times) + shift, freed, tail + 1]),
        np.concatenate([np.tile(block.size, times), np.tile(np.asarray(kept, np.int64), times), np.ones(times, np.int64)]),
    )

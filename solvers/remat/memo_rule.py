"""MEMO's own rule for offload and recomputation, to compare an optimum with (arXiv 2407.12117, sections 4.1 and 4.2).

Of each transformer layer the input and the attention's output always leave the device; of the rest a share alpha leaves,
and the others are dropped and recomputed before the layer's backward pass; the last two layers keep everything. A layer is
fetched while the backward pass of the layer after it runs. Alpha is as large as the link and the host allow:

    alpha = ((min(B * T, M / (n - 2)) - S_in - S_attn) / S_other), between 0 and 1

with the link's bytes per second B, the time T of one layer's forward pass, the host's bytes M and n layers.

What differs: MEMO splits each tensor along its tokens, here whole tensors are taken in the order they are made until their
bytes reach alpha of the sum; and MEMO holds two layers' tensors in buffers of their own, where here they live as long as
they are needed, which is never longer.
"""

from dataclasses import dataclass

import numpy as np

from .exact import Slots
from .problem import BEGIN, EAGER, HOLD, MOVE, SINCE, Problem
from .segments import Segments

LAST = 2  # layers that keep everything


@dataclass(frozen=True)
class Layers:
    """The longest row of equal layers in a forward pass.

    Attributes:
        start: number of the first segment.
        length: segments in a layer.
        count: layers.
    """

    start: int
    length: int
    count: int

    def segments(self, layer: int) -> slice:
        """The segments of a layer."""
        begin = self.start + layer * self.length
        return slice(begin, begin + self.length)


def find_layers(segments: Segments) -> Layers:
    """The repetition of segments' classes that covers most of them; of two alike, the one with the shorter layers."""
    kind = segments.kind
    best = Layers(0, max(len(kind), 1), 1 if len(kind) else 0)
    most = 0
    for length in range(1, len(kind) // 2 + 1):
        equal = np.concatenate([[False], kind[length:] == kind[:-length], [False]])
        edges = np.flatnonzero(equal[1:] != equal[:-1]).reshape(-1, 2)
        for begin, end in edges.tolist():
            count = (end - begin + length) // length
            if count > 1 and count * length > most:
                best, most = Layers(begin, length, count), count * length
    return best


def memo(problem: Problem, segments: Segments, slots: Slots, attention: np.ndarray) -> np.ndarray | None:
    """The solution by MEMO's rule, moving to the first tier; None where there are no layers to speak of.

    Args:
        problem: with a tier behind the device.
        segments: of its forward pass.
        slots: its choices.
        attention: ops that compute attention, shape (ops,), bool.
    """
    layers = find_layers(segments)
    if layers.count <= LAST:
        return None
    late = (slots.before <= problem.boundary) & (slots.at > problem.boundary) & slots.travels
    crossing = late & (slots.last == 0)
    segment = segments.of_buffer[slots.buffer]
    out, delay, _, _, _, _, host, _ = problem.tiers[0]
    solution = problem.keep_all()
    for layer in range(layers.count - LAST):
        own = layers.segments(layer)
        inside = crossing & (segment >= own.start) & (segment < own.stop - 1)
        inside |= crossing & (segment == own.stop - 1) & ~segments.crosses[slots.buffer]
        entering = late & (segment == own.start - 1) & segments.crosses[slots.buffer]
        attended = inside & attention[np.minimum(problem.producer[slots.buffer], len(attention) - 1)]
        others = inside & ~attended
        first, last = int(segments.start[own.start]), stop_of(problem, segments, own.stop)
        seconds = float(problem.seconds[first:last].sum())
        limit = min(out * (seconds - delay), host / (layers.count - LAST))
        rest = bytes_of(problem, slots, others)
        alpha = float(np.clip((limit - bytes_of(problem, slots, entering | attended)) / max(rest, 1), 0.0, 1.0))
        opened, before = int(segments.opened[own.stop - 1]), int(segments.opened[min(own.stop, len(segments.start) - 1)])
        moved = set(slots.buffer[entering | attended].tolist())
        sent = 0
        for buffer in sorted(set(slots.buffer[others].tolist()), key=lambda buffer: (problem.producer[buffer], buffer)):
            if sent + problem.size[buffer] <= alpha * rest or slots.movable[slots.buffer == buffer].max() == 2:
                moved.add(buffer)
                sent += int(problem.size[buffer])
        for slot in np.flatnonzero(inside | entering):
            goes = int(slots.buffer[slot]) in moved
            if slots.last[slot]:
                solution[[BEGIN, HOLD, MOVE], slots.gap[slot]] = max(before, problem.boundary), opened, 1
                continue
            since = max(before if goes else opened, int(slots.before[slot]) + 1, problem.boundary)
            solution[SINCE, slots.gap[slot]] = min(since, int(slots.at[slot]))
            solution[MOVE, slots.gap[slot]] = int(goes)
            solution[EAGER, slots.gap[slot]] = int(not goes)  # what was dropped is made at once, before the backward pass
    return solution


def stop_of(problem: Problem, segments: Segments, segment: int) -> int:
    """Base time at which a segment begins, or the forward pass ends."""
    return int(segments.start[segment]) if segment < len(segments.start) else problem.boundary


def bytes_of(problem: Problem, slots: Slots, which: np.ndarray) -> int:
    """Bytes of the buffers of some slots, each counted once."""
    return int(problem.size[np.unique(slots.buffer[which])].sum())

"""Repetition as structure: the forward pass cut where one value crosses, and equal pieces recognised as equal.

A *segment* is a run of forward ops between two positions that only one value crosses (values that live through a
quarter of the pass or more, such as masks and rotary tables, are not counted). Segments with the same sequence of kinds
of op are of one *class*; a buffer's *role* is its class and its place in the segment. What a solver learns of a role it
can try on every layer at once.
"""

from dataclasses import dataclass

import numpy as np

from .problem import Problem

LONG = 0.25  # of the forward pass: a value alive for longer does not tie neighbouring ops together


@dataclass(frozen=True)
class Segments:
    """How a forward pass falls into segments.

    Attributes:
        start: base time of each segment's first op, ascending.
        kind: class of each segment.
        of_buffer: segment of each buffer that the forward pass makes, else -1.
        role: for each buffer made in the forward pass a number that equal places in equal segments share, else -1.
        crosses: buffers that are read by the forward pass outside their segment.
        opened: base time at which the backward pass first reads something of each segment.
    """

    start: np.ndarray
    kind: np.ndarray
    of_buffer: np.ndarray
    role: np.ndarray
    crosses: np.ndarray
    opened: np.ndarray


def find_segments(problem: Problem) -> Segments:
    """Cut the forward pass, the ops up to `problem.boundary`."""
    end = problem.boundary
    start = cut_points(problem, end)
    of_op = np.searchsorted(start, np.arange(end), side="right") - 1
    sequences: dict[tuple[int, ...], int] = {}
    kinds, stops = problem.kind.tolist(), [*start[1:], end]
    kind = np.array([sequences.setdefault(tuple(kinds[a:b]), len(sequences)) for a, b in zip(start, stops, strict=True)])
    count = len(problem.size)
    of_buffer, role = np.full(count, -1), np.full(count, -1)
    crosses = np.zeros(count, np.bool_)
    opened = np.full(len(start), len(problem.seconds), np.int64)
    roles: dict[tuple[int, int, int], int] = {}
    for buffer in range(count):
        op = int(problem.producer[buffer])
        if op >= end:
            continue
        segment = int(of_op[op])
        place = int(np.flatnonzero(problem.write[problem.write_start[op] : problem.write_start[op + 1]] == buffer)[0])
        of_buffer[buffer] = segment
        role[buffer] = roles.setdefault((int(kind[segment]), op - int(start[segment]), place), len(roles))
        uses = problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]]
        early, late = uses[uses < end], uses[uses > end]
        crosses[buffer] = bool(len(early)) and int(of_op[early[-1]]) != segment
        if len(late):
            opened[segment] = min(opened[segment], late[0])
    for segment in range(len(start) - 2, -1, -1):
        if opened[segment] == len(problem.seconds):
            opened[segment] = opened[segment + 1]
    return Segments(start, kind, of_buffer, role, crosses, opened)


def cut_points(problem: Problem, end: int) -> np.ndarray:
    """Base times at which a segment starts: those that at most one short-lived value crosses."""
    crossing = np.zeros(end + 1, np.int64)
    for buffer in range(len(problem.size)):
        made = int(problem.producer[buffer])
        uses = problem.use[problem.use_start[buffer] : problem.use_start[buffer + 1]]
        early = uses[uses < end]
        if made < end and len(early) and early[-1] - made < LONG * end:
            crossing[made + 1] += 1
            crossing[early[-1] + 1 : early[-1] + 2] -= 1
    alive = np.cumsum(crossing)[: end + 1]
    points = [0, *(at for at in range(1, end) if alive[at] <= 1)]
    return np.array(points, np.int64)

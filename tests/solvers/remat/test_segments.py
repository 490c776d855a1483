"""Repetition found by structure."""

import random
from dataclasses import replace

import numpy as np
import pytest
from memplan.passes.problem import flatten
from memplan.solvers.remat.segments import find_segments
from strategies import make_program


def segments_of(program):
    """The segments of a program."""
    return find_segments(flatten(program).problem)


@pytest.mark.parametrize("seed", range(10))
def test_equal_blocks_of_a_chain_are_recognised_as_equal(seed):
    """Six copies of a block without branches: the same sequence of classes six times, and the same roles in each."""
    program = make_program(random.Random(seed), 4, branching=0.0, plain=True, repeat=6)
    found = segments_of(program)

    keys = [op.key for op in program.ops]
    by_sequence = {}
    for at, (low, high) in enumerate(zip(found.start, [*found.start[1:], program.boundary], strict=True)):
        by_sequence.setdefault(tuple(keys[low:high]), set()).add(int(found.kind[at]))
    assert all(len(kinds) == 1 for kinds in by_sequence.values())
    assert len(found.start) >= 6
    assert len(set(found.kind.tolist())) <= len(found.start) // 5 + 2
    assert len(set(found.role[found.role >= 0].tolist())) < (found.role >= 0).sum() / 3


def test_different_keys_are_different_classes():
    """The same shape of graph with one op's key changed is no longer the same class."""
    program = make_program(random.Random(1), 3, branching=0.0, plain=True, repeat=2)
    problem = flatten(program).problem
    same = find_segments(problem)
    other = find_segments(replace(problem, kind=problem.kind + 100 * (np.arange(len(problem.kind)) >= 3)))

    assert len(set(same.kind.tolist())) < len(set(other.kind.tolist()))


@pytest.mark.parametrize("seed", range(20))
def test_every_forward_op_is_in_one_segment(seed):
    """Segments start at op 0, ascend and cover the forward pass; a segment's buffers know it."""
    rng = random.Random(seed)
    program = make_program(rng, rng.randint(2, 12), repeat=rng.choice([1, 3]))
    found = segments_of(program)
    problem = flatten(program).problem

    assert found.start[0] == 0
    assert (np.diff(found.start) > 0).all()
    assert found.start[-1] < program.boundary
    for buffer, producer in enumerate(problem.producer):
        segment = found.of_buffer[buffer]
        assert (segment >= 0) == (producer < program.boundary)
        if segment >= 0:
            assert found.start[segment] <= producer < [*found.start[1:], program.boundary][segment]
    assert (found.opened >= program.boundary).all()
    assert (found.opened <= len(program.ops)).all()

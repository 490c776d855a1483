"""MEMO's rule: which layers and values it moves, drops and keeps, and that the plan by it is one that the referee accepts."""

import memplan
import numpy as np
import pytest
import torch
from memplan.planner.pipeline.planner import Planner
from memplan.planner.verbs.session import Session
from memplan.solvers.remat.memo_rule import LAST, find_layers
from memplan.solvers.remat.problem import MOVE, SINCE
from transformers import GPT2Config, GPT2LMHeadModel

LAYERS = 5
PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}


def session(host: str | None = None) -> Session:
    """A small GPT for a machine with a host behind it."""
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=2, **PLAIN)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        ids = torch.zeros(1, 64, dtype=torch.int64)
    levers = ("recompute", "offload")
    step = {"input_ids": ids, "labels": ids}
    return Session(model, (), step, machine="a800-80gb", allow=levers, time_limit=2.0, host_budget=host)


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Its planner."""
    return session().planner


def test_layers_are_found_without_their_names(planner):
    """As many as there are blocks, each of the same number of segments, side by side."""
    layers = find_layers(planner.segments)
    assert layers.count == LAYERS
    kinds = [tuple(planner.segments.kind[layers.segments(layer)]) for layer in range(LAYERS)]
    assert len(set(kinds)) == 1


def test_attention_and_inputs_leave_and_the_last_layers_stay(planner):
    """Attention's results of all but the last two layers are moved; nothing of the last two is moved or dropped."""
    solution, slots, segments = planner.memo_solution, planner.master.slots, planner.segments
    layers = find_layers(segments)
    problem = planner.flat.problem
    untouched = problem.keep_all()
    target = [planner.program.ops[index].target for index in planner.flat.ops]
    attended = np.array(["scaled_dot_product" in target[problem.producer[buffer]] for buffer in slots.buffer])
    crossing = (slots.before <= problem.boundary) & (slots.at > problem.boundary) & (slots.last == 0)
    late = segments.of_buffer[slots.buffer] >= layers.segments(LAYERS - LAST).start
    own = segments.of_buffer[slots.buffer]
    moved = solution[MOVE, slots.gap] > 0
    assert moved[attended & crossing & ~late].all()
    assert (attended & crossing & ~late).sum() >= LAYERS - LAST
    assert (solution[:, slots.gap[late]] == untouched[:, slots.gap[late]]).all()
    inputs = {int(buffer) for buffer in slots.buffer[moved & segments.crosses[slots.buffer]]}
    assert {layers.segments(layer).start - 1 for layer in range(LAYERS - LAST)} <= {int(segments.of_buffer[b]) for b in inputs}
    dropped = (solution[SINCE, slots.gap] != untouched[SINCE, slots.gap]) & ~moved
    assert (own[dropped] >= layers.start).all()


def test_a_plan_by_the_rule_waits_only_as_the_budget_asks(planner):
    """It is accepted, moves something, and takes no longer with more bytes; joint planning is never slower."""
    smallest = planner.finish(planner.memo_solution, None)
    tight, free = planner.solve_memo(smallest.peak), planner.solve_memo(10 * smallest.peak)
    assert sum(tight.found.report.moved) > 0
    assert tight.found.peak <= smallest.peak
    assert free.found.time <= tight.found.time
    with pytest.raises(memplan.BudgetError):
        planner.solve_memo(smallest.peak - 1)


def test_a_small_host_means_a_small_alpha():
    """What is moved stays within the host's bytes."""
    least = session().planner.solve_memo(2**40).found.report.peak[1]
    limited = session(f"{least // 2}").planner
    assert 0 < limited.solve_memo(2**40).found.report.peak[1] <= least // 2


def test_where_there_are_no_layers_the_rule_does_not_apply():
    """Refused, saying what is missing."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    with pytest.raises(memplan.MemplanError, match="three equal layers"):
        memplan.plan(model, None, (torch.randn(4, 8),), machine="a800-80gb", strategy="memo", loss=lambda out: out.sum())

"""The generated functions as text: what a reader of a traceback sees."""

import torch
from memplan.backends.eager.codegen import generate
from memplan.planner.verbs.session import Session
from torch import nn


def loss(output):
    """A scalar."""
    return output.square().mean()


def test_the_source_of_a_planned_step_reads_well(golden):
    """The smallest step of a tiny MLP: views where they are read, `del` where the schedule frees, dropout's state kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 8))
    session = Session(model, (torch.empty(256, 32),), loss=loss, machine="h100-80gb", time_limit=5.0)
    tight = session.plan(session.plan(None).minimum)
    assert golden == generate(tight.captured.traced, tight.schedule).source

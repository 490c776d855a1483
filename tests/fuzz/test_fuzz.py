"""Random models with habits of real ones: a plan is eager's to the bit and planning leaves no trace, or it is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from judge import Case, eager_steps, judge_door, judge_plan  # noqa: E402

MANY = 2000


@pytest.mark.parametrize("seed", range(24))
def test_a_plan_is_eagers_or_refused(seed: int):
    """Losses, gradients, who has none, buffers and attributes over three steps; the model is as it was after planning."""
    case = Case(seed)
    outcome = judge_plan(case, eager_steps(case))
    assert not outcome.split(":")[0].isupper(), f"{case.name}: {outcome}"


@pytest.mark.parametrize("seed", [*range(100, 106), 3084])
def test_the_door_is_eagers_or_refused(seed: int):
    """The same through torch.compile."""
    case = Case(seed)
    outcome = judge_door(case, eager_steps(case))
    assert not outcome.split(":")[0].isupper(), f"{case.name}: {outcome}"


@pytest.mark.slow
@pytest.mark.parametrize("door", ["plan", "door"])
def test_many(door: str):
    """None of two thousand is silently different, damaged or crashed."""
    command = [sys.executable, str(HERE), "--cases", str(MANY), "--doors", door]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]

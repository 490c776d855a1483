"""The API's words as flags."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from memplan.planner.cli.flags import ELSEWHERE, in_flags
from memplan.planner.verbs import map as maps
from memplan.planner.verbs import plan as api

ROOT = Path(__file__).parents[3]
WORDS = {*inspect.signature(api.plan).parameters, *inspect.signature(maps.map_model).parameters} - {"model", "args", "progress"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a plan with train=False", "a plan with --infer"),
        ("plan without optimizer_in_backward", "plan without --optimizer-in-backward"),
        ("allow='tile' does not exist yet: the levers are", "--allow 'tile' does not exist yet: the levers are"),
        ("time_limit=nan: give seconds", "--time-limit nan: give seconds"),
        ("strategy='memo' wants a tier; plan without strategy", "--strategy 'memo' wants a tier; plan without --strategy"),
        ("lend_gradients=True lends: plan with arena=True", "--lend-gradients lends: plan with --arena"),
        ("a budget of 5 is no machine, but the arena is without gradients", None),
        ("--time-limit and --host-budget stay", None),
    ],
)
def test_words_of_the_api_become_flags(said, told):
    """And English stays English."""
    assert in_flags(said) == (told or said)


def literals(path: Path) -> list[str]:
    """The texts that a file raises or warns of, with a number for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        warns = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn"
        if isinstance(node, ast.Raise) or warns:
            for text in ast.walk(node):
                if isinstance(text, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "1" for part in text.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found.append(text.value)
    return found


def test_every_message_speaks_of_flags():
    """No error or warning of the package shows an argument of the API on the command line, but what no command can meet."""
    pattern = re.compile(rf"(?<![\w-])(?:({'|'.join(WORDS)})=|({'|'.join(word for word in WORDS if '_' in word)})\b)")
    left = []
    for folder in ("planner", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for text in literals(path):
                told = in_flags(text)
                if pattern.search(told) and not any(word in told for word in ELSEWHERE):
                    left.append((path.name, told))
    assert left == []

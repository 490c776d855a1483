"""Who may import whom, read from the folders and the source; and what must not be loaded."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
STOREYS = ("planner", "passes", "solvers", "backends")
# Rooms, lowest first; a storey stands for its rooms that are not named. A room imports what is below it; of rooms on one
# line each may import the others as long as there is no way back.
ORDER = (
    ("planner.ir",),
    ("planner.cost",),
    ("planner.capture", "planner.models", "solvers"),
    ("passes",),
    ("planner.pipeline",),
    ("backends",),
    ("planner.verbs",),
    ("planner.cli",),
)
# The one import that goes up, made when a method is called.
FACE = ("planner.ir.plan", "backends.eager.module")  # `Plan.apply`


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's."""
    found = {}
    for storey in STOREYS:
        for path in sorted((ROOT / storey).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(name: str) -> str:
    """The folder that a module lies in, dotted."""
    return ".".join(modules()[name].relative_to(ROOT).parent.parts)


def level_of(room: str) -> int:
    """How high a room lies."""
    levels = {name: level for level, names in enumerate(ORDER) for name in names}
    return levels[room] if room in levels else levels[room.partition(".")[0]]


@cache
def imports(name: str) -> tuple[tuple[str, bool], ...]:
    """What a module imports, package modules without the package's name; and whether a type checker alone sees it."""
    path = modules()[name]
    tree = ast.parse(path.read_text())
    package = ["memplan", *(name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")]
    quiet = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in quiet) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = base.removeprefix("memplan").lstrip(".")
            parts = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(f"memplan.{part}" if part in modules() else base, id(node) in quiet) for part in parts]
    return tuple((one.removeprefix("memplan."), hidden) for one, hidden in found)


def arrows(between_rooms: bool) -> nx.DiGraph:
    """Who imports whom when the program runs, the face left out."""
    found = nx.DiGraph()
    for name in modules():
        for target, hidden in imports(name):
            if hidden or target not in modules() or (name, target) == FACE:
                continue
            one, other = (room_of(name), room_of(target)) if between_rooms else (name, target)
            if one != other:
                found.add_edge(one, other)
    return found


@pytest.mark.parametrize("between_rooms", [True, False], ids=["rooms", "files"])
def test_nothing_imports_in_a_circle(between_rooms: bool):
    """Neither rooms nor files."""
    assert not [sorted(one) for one in nx.strongly_connected_components(arrows(between_rooms)) if len(one) > 1]


def test_rooms_import_what_lies_below():
    """cli -> verbs -> backends -> pipeline -> passes -> solvers and capture -> cost -> ir."""
    up = [(one, other) for one, other in arrows(True).edges if level_of(one) < level_of(other)]

    assert not up


def test_the_face_is_still_needed():
    """An exception that is gone goes from here too."""
    assert FACE[1] in {target for target, _ in imports(FACE[0])}


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("solvers")])
def test_solvers_know_arrays_only(name: str):
    """A solver imports no torch and nothing of the package but solvers."""
    for target, _ in imports(name):
        assert target.partition(".")[0] not in {"torch", "planner", "passes", "backends", "memplan"}, target


def test_the_referee_knows_the_nouns_only():
    """It shares no code with what it judges."""
    inside = {target for target, _ in imports("planner.ir.referee") if target in modules()}

    assert inside <= {f"planner.ir.{name}" for name in ("program", "machine", "schedule", "errors")}


def test_torch_is_imported_by_capture_and_backends_alone():
    """Other rooms do without it until a function is called."""
    for name, path in modules().items():
        if room_of(name) in ("planner.capture", "planner.models") or name.startswith("backends"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(one.partition(".")[0] == "torch" for one in names), name


def test_every_room_says_what_it_is_for():
    """Its `__init__.py` holds a docstring and no code, so that importing one file of a room loads that file."""
    for name, path in modules().items():
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), name
            assert len(tree.body) == 1, name


def test_every_room_is_in_the_wheel():
    """pyproject lists each package folder."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

    assert set(listed) == {
        "memplan",
        *("memplan." + ".".join(path.parent.relative_to(ROOT).parts) for path in modules().values()),
    }
    for room in {path.parent for path in modules().values()}:
        assert (room / "__init__.py").is_file()


def test_the_root_holds_the_face_and_the_way_in():
    """`python -m memplan` looks for __main__.py there and nowhere else; any other .py would land in the wheel."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_the_face_and_the_solvers_do_not_load_torch():
    """`import memplan` is quick, and the solvers work without torch."""
    code = "import sys, memplan, memplan.solvers.remat.anneal, memplan.planner.ir.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

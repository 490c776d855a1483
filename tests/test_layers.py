"""Who may import whom, and what must not be loaded: see `rooms.py`."""

import ast
import subprocess
import sys
import tomllib

import networkx as nx
import pytest
from rooms import BEGIN, END, FACE, ROOT, arrows, imports, level_of, modules, room_of, table


@pytest.mark.parametrize("between_rooms", [True, False], ids=["rooms", "files"])
def test_nothing_imports_in_a_circle(between_rooms: bool):
    """Neither rooms nor files."""
    assert not [sorted(one) for one in nx.strongly_connected_components(arrows(between_rooms)) if len(one) > 1]


def test_rooms_import_what_lies_below():
    """cli -> verbs -> backends -> pipeline -> passes -> solvers and capture -> cost -> ir."""
    up = [(one, other) for one, other in arrows(True).edges if level_of(one) < level_of(other)]

    assert not up


def test_the_map_shows_the_rooms_that_are():
    """docs/design.md: `python tests/rooms.py` writes it. How many lines a room has may have changed since."""

    def without_lines(rows: list[str]) -> list[list[str]]:
        return [[cell for at, cell in enumerate(row.split("|")) if at != 4] for row in rows]

    written = (ROOT / "docs" / "design.md").read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert without_lines(written) == without_lines(table())


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
    code = "import sys, memplan, memplan.solvers.remat.anneal; memplan.plan, memplan.Plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["memplan", "memplan.planner.cli.app"])
def test_what_few_need_is_loaded_when_it_is_asked_for(name: str):
    """PuLP and networkx are for a solver that is named and for `Program.to_networkx`: neither makes the first second longer."""
    code = f"import sys, {name}; assert not {{'torch', 'pulp', 'networkx'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""Who may import whom, read from the source; and what must not be loaded."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("planner", "passes", "solvers", "backends")
NOUNS = {
    f"planner.{name}"
    for name in "program machine schedule referee plan coverage summary errors units text trace files columns".split()
}
CAPTURE = {
    f"planner.{name}"
    for name in "capture inputs inputtext constants casts structure layouts asides graph nodes in_place optimizers "
    "optimizertrial restore native keys workspaces cache cost disk estimate gauge local probe watch standins tracing callers "
    "plain_calls hooks reached reach state reads writes rebinding calls step settle losses".split()
}
# The storeys, lowest first: a module may import from its own and from those below, where ALLOWED does not say less.
STOREYS = {
    **dict.fromkeys(NOUNS, 0),
    "planner.referee": 0,
    "solvers": 1,
    **dict.fromkeys(CAPTURE, 1),
    "passes": 2,
    "planner.pipeline": 3,
    "planner.ways": 3,
    "planner.addresses": 3,
    "planner.mapping": 3,
    "backends": 4,
    "planner.api": 5,
    "planner.models": 3,  # builds models by name for the command line and its trials; knows no plan
    "planner.placing": 5,
    "planner.levers": 5,
    "planner.floors": 5,
    "planner.maps": 5,
    "planner.spec": 0,  # names of models, read without torch
    **dict.fromkeys((f"planner.{name}" for name in ("tables", "options", "asked", "flags", "progress", "terminal")), 6),
    **dict.fromkeys((f"planner.commands.{name}" for name in ("plan", "files", "run", "sweep", "machines", "places")), 6),
    "planner.commands": 6,
    "planner.cli": 6,
}
# Imports that go up, each deliberate and made inside a function.
UPWARD = {
    ("planner.plan", "backends.eager"): "Plan.apply is the face of the backend; loaded when a plan is applied",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> list[tuple[str, bool]]:
    """What a module imports, package modules without the package's name; and whether a type checker alone sees it."""
    tree = ast.parse(MODULES[name].read_text())
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
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
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
            found += [(one, id(node) in quiet) for one in names]
    return [(one.removeprefix("memplan."), hidden) for one, hidden in found]


def storey(name: str) -> int | None:
    """Where a module of the package lives; None for somebody else's."""
    return STOREYS.get(name, STOREYS.get(name.partition(".")[0]))


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_go_down(name):
    """cli -> api -> backends -> pipeline -> passes -> solvers and capture -> nouns; what goes up is listed with its reason."""
    own = storey(name)
    assert own is not None, f"{name} has no storey: add it to STOREYS"
    for target, hidden in imports(name):
        if hidden or target not in MODULES or (name, target) in UPWARD:
            continue
        level = storey(target)
        assert level is not None, target
        assert level <= own, f"{name} imports {target}, which is above it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("solvers")])
def test_solvers_know_arrays_only(name):
    """A solver imports no torch and nothing of the package but solvers."""
    for target, _ in imports(name):
        assert target.partition(".")[0] not in {"torch", "planner", "passes", "backends", "memplan"}, target


def test_the_referee_knows_the_nouns_only():
    """It shares no code with what it judges."""
    inside = {target for target, _ in imports("planner.referee") if target in MODULES}

    assert inside <= {"planner.program", "planner.machine", "planner.schedule", "planner.errors"}


def test_only_capture_and_backends_import_torch_when_loaded():
    """The nouns, the pipeline and the face import no torch at their top level."""
    for name in (*NOUNS, "planner.pipeline", "planner.api", "passes.liveness", "passes.problem", "planner.cost"):
        tree = ast.parse(MODULES[name].read_text())
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(one.partition(".")[0] == "torch" for one in names), name


def test_every_exception_is_still_needed():
    """UPWARD lists no import that is gone."""
    for source, target in UPWARD:
        if source in MODULES:
            assert target in {one for one, _ in imports(source)}, (source, target)


def test_every_folder_is_in_the_wheel():
    """pyproject lists each package folder, and each has an __init__.py."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"memplan", *("memplan." + ".".join(path.parent.relative_to(ROOT).parts) for path in MODULES.values())}

    assert set(listed) == found
    for folder in found - {"memplan"}:
        assert (ROOT.joinpath(*folder.split(".")[1:]) / "__init__.py").is_file()


def test_the_root_holds_the_face_and_the_way_in():
    """`python -m memplan` looks for __main__.py there and nowhere else; any other .py would land in the wheel."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_the_face_and_the_solvers_do_not_load_torch():
    """`import memplan` is quick, and the solvers work without torch."""
    code = "import sys, memplan, memplan.solvers.anneal, memplan.planner.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

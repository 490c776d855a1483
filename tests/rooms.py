"""The rooms of the house, read from the folders and the source: who may import whom, and who does.

`python tests/rooms.py` writes the table of rooms into docs/design.md.
"""

import ast
from functools import cache
from pathlib import Path

import networkx as nx

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
BEGIN, END = "<!-- rooms -->", "<!-- end of rooms -->"
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


def lines_of(room: str) -> int:
    """Lines of the Python files of a room."""
    return sum(len(path.read_text().splitlines()) for name, path in modules().items() if room_of(name) == room)


def table() -> list[str]:
    """The rooms, the highest first, as lines of markdown; a room's first sentence says what it is for."""
    graph = arrows(between_rooms=True)
    held = {room_of(name) for name, path in modules().items() if path.name != "__init__.py"}  # a storey may hold rooms alone
    rooms = sorted(held, key=lambda room: (-level_of(room), room))
    rows = ["| room | what it is for | files | lines | imports |", "| :-- | :-- | --: | --: | :-- |"]
    for room in rooms:
        path = ROOT.joinpath(*room.split("."))
        files = len(list(path.glob("*.py"))) - 1
        said = (ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or "").partition("\n")[0]
        found = ", ".join(sorted(graph.successors(room))) if room in graph else ""
        rows.append(f"| {room.replace('.', '/')}/ | {said} | {files} | {lines_of(room)} | {found} |")
    return rows


def write(path: Path) -> None:
    """Put the table between its two marks."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text("\n".join([before + BEGIN, *table(), END + after]))


if __name__ == "__main__":
    write(ROOT / "docs" / "design.md")

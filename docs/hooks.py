"""Pages of the site that are made from something else: the first from README.md, the command line's from its own options."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMMANDS = "<!-- commands -->"


def on_startup(**_: Any) -> None:
    """Show mkdocstrings the sources under the package's name: the root of the repository is the package itself."""
    named = ROOT / "build" / "named" / "memplan"
    named.parent.mkdir(parents=True, exist_ok=True)
    if not named.is_symlink():
        named.symlink_to(ROOT, target_is_directory=True)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What MkDocs asks for each page: its text."""
    if page.file.src_uri == "index.md":
        return front_page((ROOT / "README.md").read_text())
    return markdown.replace(COMMANDS, command_reference()) if COMMANDS in markdown else markdown


def front_page(readme: str) -> str:
    """README, whose links into docs/ are links within the site, and whose links to other files are names of them."""
    inside = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", readme)
    return re.sub(r"\]\(((?:CONTRIBUTING|CHANGELOG|benchmarks|examples)[^)]*)\)", r"] (`\1`)", inside)


def command_reference() -> str:
    """Every command's `--help`, as a terminal of 100 columns shows it."""
    from memplan.planner.cli.app import app
    from typer.main import get_command
    from typer.testing import CliRunner

    os.environ |= {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    parts = []
    for name in sorted(get_command(app).commands):  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="memplan").output
        parts += [f"## memplan {name}", "", "```text", *(line.rstrip() for line in shown.strip().splitlines()), "```", ""]
    return "\n".join(parts)

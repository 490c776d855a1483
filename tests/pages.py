"""The pages of the documentation, and how the blocks of one are run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = {"", "text", "sh", "json", "toml", "csv"}  # not run: output, installation, files
# That a block runs is the question, not how good its plan is.
HASTY = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); from quick import hasty; cut = hasty(); cut.__enter__()"
MAIN = HASTY + "; from memplan.planner.cli.app import main; main()"
RUNNER = f"""
import json, os, shlex, subprocess, sys
{HASTY}
space = {{"__name__": "__main__"}}
for kind, code, line in json.load(open(sys.argv[1])):
    if kind == "python":
        exec(compile("\\n" * line + code, "<" + sys.argv[2] + ">", "exec"), space)
    else:
        for command in code.replace("\\\\\\n", " ").splitlines():
            words = shlex.split(command.removeprefix("$ "))
            assert words[0] == "memplan", command
            subprocess.run([sys.executable, "-P", "-c", "{MAIN}", *words[1:]], check=True)
"""


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Language, text and first line of each block of a page."""
    text = (ROOT / page).read_text()
    return [(found[1], found[2], text[: found.start()].count("\n") + 1) for found in FENCE.finditer(text)]


RUN = [page for page in PAGES if any(kind in ("python", "console") for kind, _, _ in blocks(page))]


def run(page: str, folder: Path, cache: Path) -> None:
    """Run the blocks of a page in their order, as one script, in an empty folder.

    Args:
        page: its path from the root of the project.
        folder: the empty one.
        cache: for measurements.
    """
    (folder / "blocks.json").write_text(json.dumps([block for block in blocks(page) if block[0] in ("python", "console")]))
    (folder / "runner.py").write_text(RUNNER)
    environment = {**os.environ, "MEMPLAN_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # fmt: skip
    done = subprocess.run([sys.executable, "runner.py", "blocks.json", page], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

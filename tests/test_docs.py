"""Every block of code in README and docs/ runs as it stands, and the site builds without a warning.

The pages of docs/howto/ are in `test_howto.py`, so that two processes share them.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, RUN, SHOWN, blocks, run


def test_blocks_say_what_they_are():
    """A block is Python or commands, which run, or of a language that is only shown."""
    for page in PAGES:
        for kind, _, line in blocks(page):
            assert kind in SHOWN | {"python", "console"}, f"{page}:{line}: ```{kind}"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measurements that the pages share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", [page for page in RUN if "/howto/" not in page])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, shared_cache: Path):
    """In their order, as one script, in an empty folder."""
    run(page, tmp_path, shared_cache)


def test_the_site_builds(tmp_path: Path):
    """Strictly: a link or a name that leads nowhere is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in PAGES:
        if page.startswith("docs/"):
            assert (tmp_path / "site" / page.removeprefix("docs/")).with_suffix(".html").is_file()

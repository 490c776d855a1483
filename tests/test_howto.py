"""Every block of code in docs/howto/ runs as it stands."""

from pathlib import Path

import pytest
from pages import RUN, run


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measurements that the pages share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", [page for page in RUN if "/howto/" in page])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, shared_cache: Path):
    """In their order, as one script, in an empty folder."""
    run(page, tmp_path, shared_cache)

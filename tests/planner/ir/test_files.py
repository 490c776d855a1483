"""Files that are asked for are written whole or not at all."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memplan.planner.cost.cache import write_atomically
from memplan.planner.ir.files import write_file


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path):
    """The new content under the old name, with the old mode; a new file has the mode that `open` would give it."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o640)
    write_file(path, "neu: \u00fc")
    plain = tmp_path / "plain"
    plain.write_text("")
    write_file(tmp_path / "made", b"x")

    assert path.read_bytes() == "neu: \u00fc".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "made").stat().st_mode == plain.stat().st_mode
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made", "plain", "plan.json"]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path):
    """What a link leads to is replaced; what is no file is written to."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    for content in ("first", "second"):
        write_file(tmp_path / "link", content)
    write_file("/dev/null", "gone")
    reader, writer = os.pipe()
    write_file(f"/dev/fd/{writer}", "through")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_text() == "second"
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("failing", ["write_new", "replace"])
def test_a_failure_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    """Whatever fails on the way, the old content is there, nothing lies beside it, and the error says which file."""
    from memplan.planner.ir import files

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((files, "write_new") if failing == "write_new" else (os, "replace")), full)
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left on device; the file that was there is as it was") as error:
        write_file(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="cannot be written: No space left on device: "):
        write_file(tmp_path / "none", "new")
    assert list(tmp_path.iterdir()) == [path]


SCRIPT = """
import resource, sys
from pathlib import Path
import memplan
from memplan.backends.report import exports, pictures
from memplan.planner.ir.bufferfile import read_trace, write_trace
plan = memplan.load("plan.json")
figure = pictures.timeline(plan)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
writers = {
    "plan.json": plan.save, "t.json": lambda path: exports.save_trace(plan, path),
    "t.svg": lambda path: pictures.save(figure, path),
    "t.png": lambda path: pictures.save(figure, path), "t.html": lambda path: exports.save_html(plan, path),
    "t.pickle": lambda path: exports.save_snapshot(plan, path),
    "t.csv": lambda path: write_trace(Path(path), read_trace(Path(path)), list(range(9))),
}
for path, write in writers.items():
    try:
        write(path)
    except OSError as error:
        assert error.filename == path and "File too large" in str(error), error
    else:
        sys.exit(path + " was written past the limit")
"""


def test_no_writer_loses_a_file_when_it_cannot_write(tmp_path: Path):
    """Plans, pictures, traces, reports and tables, in a process that may write 64 bytes a file: each names its file and
    leaves what was there."""
    import torch
    from memplan import plan

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    plan(model, None, (torch.ones(2, 8),), loss=lambda out: out.sum(), machine="h100-80gb", time_limit=1).save(
        tmp_path / "plan.json"
    )
    with (tmp_path / "t.csv").open("w") as stream:
        csv.writer(stream).writerows([("id", "lower", "upper", "size"), *((f"b{n}", n, n + 1, 4) for n in range(9))])
    for name in ("t.json", "t.svg", "t.png", "t.html", "t.pickle"):
        (tmp_path / name).write_text(f"the old {name}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr + done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_cache_makes_its_folder(tmp_path: Path):
    """Measurements are written the same way, and their folder is made."""
    write_atomically(tmp_path / "a" / "b" / "table.json", b"{}")
    assert (tmp_path / "a" / "b" / "table.json").read_bytes() == b"{}"

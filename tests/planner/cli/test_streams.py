"""Pipes, full disks, closed streams and Ctrl-C: never a traceback."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-P", "-m", "memplan"]
SLOW = """
import time

def factory():
    time.sleep(60)
"""


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `memplan` is this package's."""
    script = f'memplan() {{ "{sys.executable}" -P -m memplan "$@"; }}\n{line}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)


def test_an_answer_can_be_piped():
    """The table goes to standard output, whole; progress does not."""
    done = shell("memplan machines | grep h100-80gb")
    assert done.stdout.startswith("h100-80gb")
    assert done.stdout.rstrip().endswith("host")
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        ("memplan machines -q > /dev/full", 1, "memplan: cannot write the answer to standard output: No space left on device"),
        ("memplan machines -q --json > /dev/full", 1, "memplan: cannot write the answer"),
        ("memplan machines -q >&-", 1, "memplan: standard output is closed"),
        ("memplan machines -q 2>&-", 0, ""),
        ("memplan machines -q | true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_streams_that_take_nothing(line, status, told):
    """Are one line, or none."""
    done = shell(line)
    assert status is None or done.returncode == status
    assert done.returncode in (0, 1, 141)
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == bool(told)


def test_ctrl_c_is_one_line(tmp_path):
    """Status 130, in the middle of a user's code."""
    (tmp_path / "slow.py").write_text(SLOW)
    lines = []
    with subprocess.Popen([*COMMAND, "plan", f"{tmp_path}/slow.py:factory"], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            lines.append(line)
            if "building" in line:
                time.sleep(0.5)
                child.send_signal(signal.SIGINT)
                break
        lines += child.stderr.readlines()
    assert child.returncode == 130
    assert lines[-1] == "memplan: interrupted\n"
    assert not any("Traceback" in line for line in lines)


def test_on_a_terminal_the_time_runs(tmp_path):
    """While a user's code says nothing; and the line is gone in the end."""
    (tmp_path / "slow.py").write_text(SLOW.replace("60", "3"))
    pid, screen = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
        os.execv(sys.executable, [*COMMAND, "plan", f"{tmp_path}/slow.py:factory"])
    shown = b""
    while select.select([screen], [], [], 60)[0]:
        try:
            shown += os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    seconds = {int(found) for found in re.findall(r"building the model \S+ (\d+) s", text)}
    assert len(seconds) >= 3
    assert "must return (model, args)" in text

"""Whether other work on the machine got in the way of what was timed.

Linux counts for every thread how long it was ready to run while no core was free for it (proc(5), schedstat). While
matrices are multiplied on two cores of an Intel Xeon most runs have waits under 1 % of the time when nothing else goes
on; one busy process makes products take 2 to 3 times as long and the waits half as long as the time itself or longer.
A virtual machine is told what its host took from it (proc_stat(5), steal), to 10 ms. Pressure (/proc/pressure/cpu) is not
asked for: it tells of all processes' waits, those of threads that are none of ours among them, averaged over ten seconds.
What other work takes of caches and of memory bandwidth shows in no counter; `gauge` sees it.
"""

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

GRACE = 3e-4  # seconds: threads that wake up wait up to half as long on a quiet machine
SHARE = 0.05  # of the time; less is lost in what repeats differ by
GLANCE = 0.05  # seconds of arithmetic that show whether the machine is quiet now
ROWS = 512  # and columns of the matrices multiplied meanwhile


class Watch:
    """A stretch of time of this process. Use as a context manager.

    Attributes:
        seconds: how long it was.
        waits: seconds for which threads had no core, all threads together; 0 where the system does not count them.
        stolen: seconds for which a hypervisor had taken cores away that somebody wanted; 0 where none does.
    """

    def __enter__(self) -> "Watch":
        self.stolen = -stolen() if is_guest() else 0.0
        self.waits = -waited()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.waits = max(0.0, self.waits + waited())  # a thread that has ended takes its count along
        self.stolen += stolen() if is_guest() else 0.0

    @property
    def disturbed(self) -> bool:
        """Whether a time taken meanwhile says more about the other work than about this process."""
        return max(self.waits, self.stolen) > max(GRACE, SHARE * self.seconds)


def waited() -> float:
    """Seconds for which the threads of this process have been ready to run and were not run, so far."""
    total = 0
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile, or the kernel does not count
                total += int((thread / "schedstat").read_text().split()[1])
    return total / 1e9


def stolen() -> float:
    """Seconds for which the hypervisor has run something else while this machine had work, so far; 0 where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        with Path("/proc/stat").open() as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


@cache
def is_guest() -> bool:
    """Whether a hypervisor has taken anything since this machine started. Where none does, `Watch` does not ask each time."""
    return stolen() > 0


def is_quiet() -> bool:
    """Whether torch's threads get their cores at once just now; takes about 50 ms."""
    import torch

    matrix = torch.ones(ROWS, ROWS)
    with Watch() as watch:
        end = time.perf_counter() + GLANCE
        while time.perf_counter() < end:
            torch.mm(matrix, matrix)
    return not watch.disturbed

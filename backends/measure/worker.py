"""What an op takes on the device at hand: seconds and workspace, found by running it.

The work happens in a fresh process (`python -m memplan.backends.measure.worker`), one request a line on its standard input and
one answer a line on its standard output, so that the caller's process neither grows nor dies with a kernel. There are
two such processes, one after the other: the first takes times, with the allocator as the user has it set, the second
workspaces, with an allocator that gives memory back at once.

A time during which a thread had to wait for a core says little of the op: such runs are left out (`planner.cost.watch`). What
no counter shows, fixed pieces of work do that are timed before, between and after the ops (`planner.cost.gauge`). Ops with no
other runs, and those of a slow moment, are timed once more in the end; what is still in doubt then is kept as an upper bound
(`planner.cost.table.apply_costs`), said, and taken again by the next plan that finds the machine quieter.

What accuracy to expect, seen on two cores of an Intel Xeon with torch 2.13 and an allocator that keeps what is freed:
the ops of one planned training step add up to 1.10 (GPT-2), 1.06 (Llama), 1.03 (BERT), 0.97 (ViT) and 1.04 (ResNet-50)
of its time, taken right after; the machine itself is 10 to 20 % slower at some times than at others. Between two runs
of an op as many other bytes pass through the caches as in a step: without, the sums were 0.77 of eager's step on GPT-2,
ViT and ResNet-50, elementwise ops half of what they take in it. Timed one by one within such a step, products of matrices
take 0.94 to 1.08 of their figures and elementwise ops 0.9 to 1.05 where they write new memory, but 0.35 to 0.6 where they
write in place of a value just made, which no key tells; so a step with many of those is faster than predicted. Runs after the
first take 0.84 (GPT-2) to 1.08 (BERT) of their figures, much as first runs do. Single tensors above 32 MiB, mapped anew on
each call, come out at up to three times. With `MALLOC_MMAP_THRESHOLD_` set low, page faults outweigh the arithmetic of all
but matrix products, and times vary by a factor of two between runs. Workspaces repeat within 100 KiB, and are within 5 % of
what torch's allocator reports where it sees all of them.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ...planner.cost.estimate import work_of
from ...planner.cost.gauge import SLOW, Reading, Reference, is_possible, read_pace
from ...planner.cost.keys import measurable
from ...planner.cost.table import Figures, Table, roofline
from ...planner.cost.watch import is_quiet
from ...planner.ir.errors import MemplanError
from ...planner.ir.machine import Machine
from ...planner.ir.program import Op, Program
from ..eager.calls import Call, NoRoom, build
from .meters import return_memory_at_once, seconds_of, workspace_of
from .timing import Answer, Timing

KEY_LIMIT = 30.0  # seconds after which a key is given up and its worker killed
END_LIMIT = 1.0  # seconds that a worker whose pipe has closed takes to end
START_LIMIT = 120.0  # seconds for the worker to import torch
TIME_SHARE = 0.7  # of a time limit goes to times, the rest to workspaces
GROWN_THRESHOLD = (32 << 20) - 4096  # bytes, just below DEFAULT_MMAP_THRESHOLD_MAX of glibc

Progress = Callable[[int, int], None]


# The caller's side


def calibrate(
    program: Program,
    machine: Machine,
    table: Table,
    *,
    device: str | None = None,
    threads: int | None = None,
    time_limit: float | None = 60.0,
    progress: Progress | None = None,
    again: bool = False,
) -> int:
    """Measure the program's ops that the table lacks, the most expensive by roofline first, and store the figures.

    Ops whose figures were disturbed are measured again, if the machine is quieter now; else there is a warning. Of two
    figures the less disturbed one counts, then the smaller.

    Args:
        program: what is to be planned.
        machine: gives the roofline that orders the keys.
        table: is added to and saved.
        device: the torch device that measures; default: the machine's.
        threads: of torch on the CPU; default: as many as in this process.
        time_limit: seconds in all; None for no limit.
        progress: is told (measurements done, measurements to do).
        again: measure all of the program's ops, and keep that instead of what the table has.

    Returns:
        How many keys were measured. Keys that cannot be run are remembered as such and not counted; those for which there was
        no memory are left to the next plan.
    """
    where = device or machine.device
    ops = {op.key: op for op in reversed(program.ops) if measurable(op.key)}
    doubtful = {key: figures for key in ops if (figures := table.get(key)) is not None and table.doubts(figures)}
    wanted = {key for key in ops if again or key not in table}
    if again:
        table.reference.forget()
    elif doubtful:
        now = read_pace(where)
        better = table.reference.is_better
        wanted |= {key for key, figures in doubtful.items() if better(now, figures.reading, figures.disturbed)}
    found = {}
    if wanted:
        worth = dict.fromkeys((op.key for op in program.ops if op.key in wanted), 0.0)
        for op in program.ops:
            if op.key in worth:
                worth[op.key] += roofline(op, machine)
        keys = sorted(worth, key=lambda key: -worth[key])
        limits = {"threads": threads, "time_limit": time_limit}
        found = measure(keys, where, **limits, progress=progress, reference=table.reference)
        found = {key: with_work(figures, ops[key]) for key, figures in found.items() if is_plausible(figures, ops[key], where)}
        if again:
            table.replace(found)
        else:
            table.update(found)
            table.note_tries(key for key in found if key in doubtful)
            table.save()
    warn_of_doubts(program, table, list(ops))
    return sum(figures is not None for figures in found.values())


def with_work(figures: Figures | None, op: Op) -> Figures | None:
    """The figures of an op, with what it does."""
    return None if figures is None else figures._replace(work=work_of(op))


def is_plausible(figures: Figures | None, op: Op, device: str) -> bool:
    """Whether a machine of that pace can have been so fast; if not, a clock was wrong, and the op is left to the next plan."""
    return figures is None or is_possible(figures.seconds, op.flops, op.traffic, figures.reading, device)


def warn_of_doubts(program: Program, table: Table, known: Sequence[str]) -> None:
    """Say how many of a program's ops have times that are upper bounds and no more."""
    found = [figures for key in known if (figures := table.get(key)) is not None and table.doubts(figures)]
    if not found:
        return
    slow = max(table.reference.slowness(figures.reading) for figures in found)
    pace = f", or while the machine was up to {slow:.1f} times as slow as at its best" if slow > SLOW else ""
    warnings.warn(
        f"{len(found)} of {len(known)} ops of {program.name} were timed while other work held the cores{pace}: where like ops "
        "take less, that is used instead, and choices that rest on them may be worse; plan again when the machine is quiet",
        stacklevel=3,
    )


def measure(
    keys: Iterable[str],
    device: str = "cpu",
    *,
    threads: int | None = None,
    repeats: int = 3,
    time_limit: float | None = None,
    progress: Progress | None = None,
    reference: Reference | None = None,
) -> dict[str, Figures | None]:
    """Run every key on the device.

    Args:
        keys: of ops, as `Op.key` has them.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; default: as many as torch uses in this process.
        repeats: timed runs of each key at least; 2 where one run takes longer than a key's budget.
        time_limit: seconds in all; None for no limit.
        progress: is told (measurements done, measurements to do).
        reference: the fastest that the device has been seen, which is told how fast it is now; default: nothing is known.

    Returns:
        For each key its figures, or None where it was tried and cannot be run: an unknown operator, an argument that no
        key can carry, a crash, a run that takes too long on a quiet machine. Missing is a key that the time limit left out,
        and one that memory was short for, or other work in the way of: that passes.

    Raises:
        MemplanError: the worker does not start.
    """
    wanted = list(dict.fromkeys(keys))
    found: dict[str, Figures | None] = {}
    if not wanted:
        return found
    if threads is None:
        threads = torch_threads()
    report = progress or (lambda done, total: None)
    total = 2 * len(wanted)
    start = time.monotonic()
    limit = float("inf") if time_limit is None else time_limit
    with Worker(worker_command("time", device, threads, repeats)) as worker:
        timing = Timing(worker, reference or Reference(None), start + limit * TIME_SHARE)
        for index, key in enumerate(wanted):
            timing.ask(key)
            report(index + 1, total)
        timing.finish()
    found |= dict.fromkeys(timing.refused)
    with Worker(worker_command("workspace", device, threads, repeats)) as worker:
        for index, (key, (taken, reading)) in enumerate(timing.times.items()):
            answer = worker.ask(key, start + limit - time.monotonic())
            if isinstance(answer, Answer):
                found[key] = Figures(taken.value, int(answer.value), taken.disturbed, reading)
            elif answer is None:
                found[key] = None
            report(len(wanted) + index + 1, total)
    report(total, total)
    return found


def worker_command(mode: str, device: str, threads: int, repeats: int) -> list[str]:
    """The command line of a worker. `-P`: what lies in the working directory must not shadow a library."""
    return [sys.executable, "-P", "-m", "memplan.backends.measure.worker", mode, device, str(threads), str(repeats)]


def torch_threads() -> int:
    """The threads that torch uses in this process."""
    import torch

    return torch.get_num_threads()


LATER = "later"  # a key that a later plan may measure
OUT_OF_MEMORY = -9  # SIGKILL: how a process ends that the system stops because memory has run out


class Worker:
    """The measuring process, started again whenever it dies. Use as a context manager."""

    def __init__(self, command: Sequence[str]):
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.log: BinaryIO | None = None

    def __enter__(self) -> "Worker":
        self.log = tempfile.TemporaryFile()
        try:
            self.start()
        except MemplanError:
            self.log.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.log is not None:
            self.log.close()

    def start(self) -> None:
        """Start the process and wait until it answers."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": paths},
        )
        if self.exchange(b"{}", START_LIMIT) is None:
            self.stop()
            raise MemplanError(f"the measuring process does not start: {self.last_words()}")

    def stop(self) -> None:
        """End the process and close its pipes."""
        if self.process is None:
            return
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # bytes left in the buffer of a broken pipe
                    pipe.close()
        self.process.wait()
        self.process = None

    def end(self) -> int | None:
        """Stop the process, and say how it ended if it did so by itself."""
        status = None
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):  # it lives, and has answered what nobody understands
                status = self.process.wait(END_LIMIT)
        self.stop()
        return status

    def last_words(self) -> str:
        """The last line that the process wrote on standard error."""
        if self.log is None:
            return "no message"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def ask(self, key: str, limit: float) -> Answer | str | None:
        """One measurement: the figure, None where the key cannot be run, or `LATER` where that may be otherwise another time.

        It may where `limit` cut it off, where there was no memory, and where it ran into `KEY_LIMIT` beside other work. On a
        quiet machine it would do so again, and again take the time that other keys need.
        """
        if limit <= 0:
            return LATER
        if self.process is None:
            self.start()
        line = json.dumps({"key": key}).encode()
        begin = time.monotonic()
        answer = self.exchange(line, min(limit, KEY_LIMIT))
        if answer is None:
            took, status = time.monotonic() - begin, self.end()
            if took < min(limit, KEY_LIMIT):
                return LATER if status == OUT_OF_MEMORY else None
            return LATER if took >= limit or not is_quiet() else None
        if answer.get("passing"):
            return LATER
        value = answer.get("value")
        return Answer(float(value), bool(answer.get("disturbed"))) if isinstance(value, int | float) else None

    def look(self, limit: float) -> Reading | None:
        """How fast the machine is; None where the process does not say."""
        if limit <= 0:
            return None
        if self.process is None:
            self.start()
        answer = self.exchange(b'{"look": true}', min(limit, KEY_LIMIT))
        if answer is None:
            self.end()
        with suppress(KeyError, msgspec.ValidationError):
            return msgspec.convert((answer or {})["reading"], Reading)
        return None

    def exchange(self, line: bytes, limit: float) -> dict[str, Any] | None:
        """Send a line and read the answer; None where the process died or had to be killed."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(limit, process.kill)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            watch.cancel()


# The worker's side


def answer(request: dict[str, str], figure: Callable[[Call], tuple[float, bool]]) -> dict[str, Any]:
    """The figure that a request asks for, or the error that stood against it.

    Raises:
        RuntimeError: the error has broken the GPU's context, in which every later call would fail too: this process has to end.
    """
    if "look" in request:
        return {"reading": read_pace(request["device"])}
    if "key" not in request:
        return {"ready": True}
    try:
        value, disturbed = figure(build(request["key"], request["device"]))
        return {"value": value, "disturbed": disturbed}
    except Exception as error:  # kernels raise whatever they like; only this key is lost
        if request["device"] == "cuda":
            import torch

            torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {error}"[:400], "passing": is_lack_of_memory(error)}


def is_lack_of_memory(error: Exception) -> bool:
    """Whether it says that there is no memory now: torch has a class of its own for that on a GPU alone."""
    import torch

    if isinstance(error, NoRoom | MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory"))


def serve(mode: str, device: str, threads: int, repeats: int) -> None:
    """Answer requests until the input ends, with seconds or with bytes as `mode` says."""
    if mode == "workspace":
        return_memory_at_once()
    import torch

    with suppress(OSError):  # where memory runs out, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not talk into the answers
    torch.set_num_threads(threads)
    gc.disable()
    # glibc maps blocks singly from a size on that grows with each such block freed, up to 32 MiB: a process that has
    # run a step or two has grown it, and gets the pages of a freed block back without page faults
    torch.empty(GROWN_THRESHOLD, dtype=torch.uint8)

    def figure(call: Call) -> tuple[float, bool]:
        return seconds_of(call, repeats, device, call.bytes) if mode == "time" else (workspace_of(call, device), False)

    with torch.no_grad():
        for line in sys.stdin:
            reply = answer({"device": device, **json.loads(line)}, figure)
            answers.write(json.dumps(reply).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""The tiers behind the device: what is put comes back, space is used again, and every way for a disk to fail is an error."""

import copy
import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.backends.tiers import filetier, pinnedtier, spacefile
from memplan.backends.tiers.filetier import FileJob, FileTier
from memplan.backends.tiers.pinnedtier import PinnedTier
from memplan.backends.tiers.store import Traffic, Visit
from memplan.planner.ir.errors import MemplanError

TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
    torch.int64, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t(),
    "every other column": lambda x: x[:, ::2],
    "a piece of a larger storage": lambda x: x[2:4, 1:3],
    "one row": lambda x: x[3:4],
    "expanded": lambda x: x[:1].expand(5, -1),
    "a number": lambda x: x[1, 1],
    "nothing of something": lambda x: x[:0],
}
WAIT = 30  # seconds after which a test that hangs gives up


@pytest.fixture(autouse=True)
def disks_are_disks(tmp_path, monkeypatch):
    """Where tests' files lie in memory, that counts as a disk here."""
    if spacefile.file_system(tmp_path) in spacefile.IN_MEMORY:
        monkeypatch.setattr(spacefile, "IN_MEMORY", {"ramfs"})


@pytest.fixture
def directory(tmp_path):
    """Where files may be, but are not when the test is over."""
    yield tmp_path / "offload"
    assert not (tmp_path / "offload").is_dir() or not os.listdir(tmp_path / "offload")


def noise(size: int, seed: int = 0) -> torch.Tensor:
    """Bytes that tell when something is wrong."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def content(tensor: torch.Tensor) -> bytes:
    """A whole storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


def round_trip(visit: Visit, offset: int, value: torch.Tensor) -> torch.Tensor:
    """A new tensor filled with what went out and came back."""
    visit.put(offset, value).wait()
    found = torch.zeros_like(value)
    visit.get(offset, found).wait()
    return found


class Gate:
    """A stand-in for a call of the system that does not go on until it is let.

    Attributes:
        reached: somebody has called it.
        open: it may go on.
    """

    def __init__(self, real):
        self.real, self.reached, self.open = real, threading.Event(), threading.Event()

    def __call__(self, *args):
        self.reached.set()
        assert self.open.wait(WAIT)
        return self.real(*args)


def failing(code: int):
    """A call that fails with an error number."""

    def call(*args, **options):
        raise OSError(code, os.strerror(code))

    return call


# What is put comes back


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_storages_come_back_whole(directory, dtype, layout):
    """Whatever the type and the layout, every byte of the storage is copied, also those that the tensor does not show."""
    base = noise(6 * 4 * dtype.itemsize)
    base = (base & 1 if dtype is torch.bool else base).view(dtype).view(6, 4)
    value = LAYOUTS[layout](base)
    tier = FileTier(base.untyped_storage().nbytes() + 5, directory)
    visit = tier.open()
    visit.put(5, value).wait()
    back = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
    visit.get(5, back).wait()

    assert content(back) == content(value)


def test_a_flat_tensor_of_bytes_stands_for_itself(directory):
    """A piece of an arena moves, and its neighbours stay."""
    arena, before = noise(64), noise(64)
    visit = FileTier(16, directory).open()
    visit.put(0, arena[8:24]).wait()
    arena[:] = 0
    visit.get(0, arena[8:24]).wait()

    assert torch.equal(arena[8:24], before[8:24])
    assert not arena[:8].any()
    assert not arena[24:].any()


def test_empty_storages_and_empty_tiers_work(directory):
    """A copy of nothing is complete at once."""
    visit = FileTier(0, directory).open()
    visit.put(0, torch.empty(0)).wait()
    visit.get(0, torch.empty(0, 3)).wait()


def test_short_writes_and_reads_are_continued(directory, monkeypatch):
    """The system may copy less than it was asked for."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(filetier, "CHUNK", 100)
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: write(fd, view[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:11]], at))
    value = noise(1000)

    assert torch.equal(round_trip(FileTier(1003, directory).open(), 3, value), value)


def test_visits_do_not_mix(directory):
    """Steps in several threads, each with a visit of its own, at the same offsets."""
    tier, found = FileTier(4096, directory), {}

    def step(seed: int) -> None:
        for _ in range(20):
            visit = tier.open()
            found.setdefault(seed, []).append(torch.equal(round_trip(visit, 0, noise(4096, seed)), noise(4096, seed)))
            visit.close()

    threads = [threading.Thread(target=step, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)

    assert found == {seed: [True] * 20 for seed in range(4)}
    assert len(tier.free) <= 4
    assert tier.traffic["out"].copies == 80


def test_closed_visits_are_used_again(directory):
    """One open at a time needs one file, two need two."""
    tier = FileTier(64, directory)
    first = tier.open()
    file = first.space.fd
    first.close()
    first.close()
    second, third = tier.open(), tier.open()

    assert second.space.fd == file
    assert third.space.fd != file
    with pytest.raises(MemplanError, match="call the model again"):
        first.put(0, noise(64))


def test_dropped_visits_are_used_again(directory):
    """A forward pass without a backward pass, also as part of a cycle."""
    tier = FileTier(64, directory)
    visit = tier.open()
    file = visit.space.fd
    visit.put(0, noise(64)).wait()
    del visit
    for _ in range(20):
        visit = tier.open()
        assert visit.space.fd == file
        visit.itself = visit
        del visit
        gc.collect()


def test_jobs_are_kept_by_buffer(directory):
    """`start` and `wait` go by the number of a buffer."""
    visit, back = FileTier(64, directory).open(), torch.zeros(64, dtype=torch.uint8)
    visit.start(7, visit.put(0, noise(64)))
    visit.wait(7)
    visit.start(7, visit.get(0, back))
    visit.wait(7)

    assert torch.equal(back, noise(64))


# Order


def test_a_get_waits_for_the_put_before_it(directory, monkeypatch):
    """Even if nobody else does, and only where their bytes meet."""
    visit = FileTier(128, directory).open()
    visit.put(64, noise(64, 1)).wait()
    gate = Gate(os.pwrite)
    monkeypatch.setattr(os, "pwrite", gate)
    apart, meets = (torch.zeros(64, dtype=torch.uint8) for _ in range(2))
    visit.put(0, noise(64))
    later = visit.get(0, meets)
    assert gate.reached.wait(WAIT)
    assert not later.finished
    gate.open.set()
    visit.get(64, apart).wait()
    later.wait()

    assert torch.equal(meets, noise(64))
    assert torch.equal(apart, noise(64, 1))


def test_a_put_waits_for_the_get_before_it(directory, monkeypatch):
    """A place is not written over while it is read."""
    visit, found = FileTier(64, directory).open(), torch.zeros(64, dtype=torch.uint8)
    visit.put(0, noise(64)).wait()
    gate = Gate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    read = visit.get(0, found)
    written = visit.put(0, noise(64, 1))
    assert gate.reached.wait(WAIT)
    assert not written.finished
    gate.open.set()
    written.wait()
    read.wait()

    assert torch.equal(found, noise(64))


class Model:
    """What a tier should do, with bytes in a dict."""

    def __init__(self, tier: FileTier):
        self.tier = tier
        self.visits: dict[int, tuple[Visit, bytearray]] = {}
        self.waiting: list[tuple] = []

    def visit(self, number: int) -> tuple[Visit, bytearray]:
        """An open visit, all zeros at first."""
        if number not in self.visits:
            self.visits[number] = self.tier.open(), bytearray(self.tier.size)
            self.visits[number][0].put(0, torch.zeros(self.tier.size, dtype=torch.uint8))
        return self.visits[number]

    def put(self, number: int, begin: int, end: int, seed: int) -> None:
        """Put noise."""
        visit, known = self.visit(number)
        value = noise(end - begin, seed)
        self.waiting.append((visit.put(begin, value), None, b""))
        known[begin:end] = content(value)

    def get(self, number: int, begin: int, end: int, seed: int) -> None:
        """Get something, and note what it should be."""
        visit, known = self.visit(number)
        found = torch.full((end - begin,), seed % 256, dtype=torch.uint8)
        self.waiting.append((visit.get(begin, found), found, bytes(known[begin:end])))

    def wait(self, index: int) -> None:
        """Wait for a job, not always the oldest."""
        if self.waiting:
            job, found, wanted = self.waiting.pop(index % len(self.waiting))
            job.wait()
            assert found is None or content(found) == wanted

    def leave(self, number: int, how: str) -> None:
        """Close or drop a visit when its copies are done, or in their middle, when what they copy does not matter."""
        if number in self.visits:
            visit, _ = self.visits.pop(number)
            mine = [entry for entry in self.waiting if entry[0].visit() is visit]
            self.waiting = [entry for entry in self.waiting if entry[0].visit() is not visit]
            if how == "done":
                for job, found, wanted in mine:
                    job.wait()
                    assert found is None or content(found) == wanted
            if how != "dropped":
                visit.close()


SIZE = 40
NUMBERS = st.integers(0, 2)
PAIRS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
STEPS = st.one_of(
    st.tuples(st.just("put"), NUMBERS, PAIRS, st.integers(0, 1000)),
    st.tuples(st.just("get"), NUMBERS, PAIRS, st.integers(0, 1000)),
    st.tuples(st.just("wait"), st.integers(0, 1000)),
    st.tuples(st.just("leave"), NUMBERS, st.sampled_from(["done", "closed", "dropped"])),
)


@given(st.lists(STEPS, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_any_order_of_calls_gives_what_they_say(steps, random):
    """Copies in both directions at changing speed, overlapping as they like, have the effect of one after the other."""
    naps = [random.choice([0, 0, 1e-4, 1e-3]) for _ in range(16)]
    turn = iter(range(1 << 30))

    def slowed(real):
        def call(*args):
            time.sleep(naps[next(turn) % len(naps)])
            return real(*args)

        return call

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(filetier, "CHUNK", 16)
        patch.setattr(os, "pwrite", slowed(os.pwrite))
        patch.setattr(os, "preadv", slowed(os.preadv))
        model = Model(FileTier(SIZE, place))
        for name, *rest in steps:
            flat = [item for part in rest for item in (part if isinstance(part, list) else [part])]
            getattr(model, name)(*flat)
        while model.waiting:
            model.wait(0)
        assert os.listdir(place) == []


# What it costs


def test_traffic_is_counted_each_way(directory):
    """Bytes and copies by direction, since the last reset."""
    tier = FileTier(100, directory)
    visit = tier.open()
    job = visit.put(0, noise(60))
    job.wait()
    for _ in range(2):
        visit.get(0, torch.zeros(30, dtype=torch.uint8)).wait()
    out, back = tier.traffic["out"], tier.traffic["in"]

    assert (out.bytes, out.copies, back.bytes, back.copies) == (60, 1, 60, 2)
    assert (out.busy, out.stalled) == (job.seconds, job.stalled)
    assert job.bytes == 60
    tier.reset()
    assert tier.traffic == {"out": Traffic(), "in": Traffic()}


def test_a_slow_disk_is_a_stall(directory, monkeypatch):
    """The time in `wait` is counted, and the time of the copy; what is ready when it is waited for costs nothing more."""
    tier = FileTier(64, directory)
    gate = Gate(lambda *args: time.sleep(0.05) or write(*args))
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", gate)
    visit = tier.open()
    job = visit.put(0, noise(64))
    wait = job.done.wait
    monkeypatch.setattr(job.done, "wait", lambda seconds: (gate.open.set(), wait(seconds)))
    job.wait()

    assert 0.05 <= job.stalled == tier.traffic["out"].stalled
    assert 0.05 <= job.seconds == tier.traffic["out"].busy


def test_a_finished_job_holds_no_memory(directory):
    """Nor does the thread that ran it."""
    visit, array = FileTier(64, directory).open(), np.zeros(64, dtype=np.uint8)
    gone = weakref.ref(array)
    tensor = torch.from_numpy(array)
    job = visit.put(0, tensor)
    job.wait()
    del array, tensor

    assert gone() is None
    assert job.finished


def test_a_dropped_tier_leaves_no_thread_and_no_file(directory):
    """Its threads end, its descriptors are closed."""
    tier = FileTier(64, directory)
    round_trip(tier.open(), 0, noise(64))
    threads = [worker.thread for worker in tier.workers.values()]
    fd = tier.free[0].fd
    assert len(threads) == 2
    del tier
    for thread in threads:
        thread.join(WAIT)

    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_copies_of_a_tier_are_the_tier(directory):
    """A planned module may be copied: each step has a visit of its own."""
    tier = FileTier(64, directory)

    assert copy.deepcopy(tier) is tier


# What is refused before the step begins


def test_a_full_disk_is_refused_first(directory, monkeypatch):
    """When the tier is made, and when a second visit is opened; the first visit goes on."""
    tier = FileTier(64, directory)
    visit = tier.open()
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(MemplanError, match=r"cannot reserve 64 B .* No space left on device: .* MEMPLAN_OFFLOAD"):
        tier.open()
    with pytest.raises(MemplanError, match="cannot reserve"):
        FileTier(64, directory)

    assert torch.equal(round_trip(visit, 0, noise(64)), noise(64))
    monkeypatch.undo()
    with pytest.raises(MemplanError, match=r"cannot reserve .* are free"):
        FileTier(1 << 60, directory)


def test_more_than_there_is_is_not_even_tried(directory, monkeypatch):
    """Asking for it would take the free blocks from everybody for a while."""
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EIO))
    with pytest.raises(MemplanError, match="No space left"):
        FileTier(1 << 60, directory)


def test_blocks_are_reserved(directory):
    """They are the file's before anything is written."""
    visit = FileTier(1 << 20, directory).open()

    assert os.fstat(visit.space.fd).st_blocks * 512 >= 1 << 20


def test_without_reservation_there_is_at_least_the_size(directory, monkeypatch):
    """On a file system that reserves nothing."""
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    visit = FileTier(1000, directory).open()

    assert os.fstat(visit.space.fd).st_size == 1000
    assert torch.equal(round_trip(visit, 0, noise(1000)), noise(1000))


@pytest.mark.parametrize("nameless", [True, False])
def test_files_are_private_and_nowhere_listed(directory, monkeypatch, nameless):
    """With files that never have a name, and where the file system has none."""
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **options)

    if not nameless:
        monkeypatch.setattr(os, "open", refuse)
    visit = FileTier(64, directory).open()
    found = os.fstat(visit.space.fd)

    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 0
    assert os.listdir(directory) == []
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not os.get_inheritable(visit.space.fd)


def test_the_directory_is_the_argument_or_the_variable_or_beside_the_measurements(tmp_path, monkeypatch):
    """In this order."""
    monkeypatch.delenv("MEMPLAN_OFFLOAD", raising=False)
    assert FileTier(1).directory == Path(os.environ["MEMPLAN_CACHE"]) / "offload"
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "variable"))
    assert FileTier(1).directory == tmp_path / "variable"
    assert FileTier(1, tmp_path / "argument").directory == tmp_path / "argument"
    monkeypatch.chdir(tmp_path)
    assert FileTier(1, "relative").directory == tmp_path / "relative"


def test_memory_is_no_disk():
    """A directory in memory is refused by name."""
    if spacefile.file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        patch.setattr(spacefile, "IN_MEMORY", {"tmpfs"})
        with pytest.raises(MemplanError, match=r"lies in memory \(tmpfs\).* set MEMPLAN_OFFLOAD"):
            FileTier(64, place)
        assert os.listdir(place) == []


def test_an_unknown_file_system_is_accepted(monkeypatch, tmp_path):
    """There is no list of mounts on every system."""
    monkeypatch.setattr(Path, "read_text", failing(errno.ENOENT))

    assert spacefile.file_system(tmp_path) == ""


def test_a_directory_that_is_none_is_refused(tmp_path):
    """A file is in its place."""
    (tmp_path / "file").write_text("")
    for place in ("file", "file/inner"):
        with pytest.raises(MemplanError, match=r"cannot offload tensors to .*: set MEMPLAN_OFFLOAD"):
            FileTier(64, tmp_path / place)


def test_a_directory_that_is_closed_is_refused(directory, monkeypatch):
    """No permission: a line, not a traceback of the system."""
    directory.mkdir()
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(MemplanError, match=r"cannot offload tensors to .*: Permission denied: set MEMPLAN_OFFLOAD"):
        FileTier(64, directory)


def test_bytes_outside_the_tier_are_refused(directory):
    """Before, across, and behind; the visit goes on."""
    visit = FileTier(64, directory).open()
    for offset, size in ((-1, 4), (61, 4), (65, 0), (0, 65)):
        for call in (visit.put, visit.get):
            with pytest.raises(MemplanError, match=f"bytes {offset} to {offset + size} of a tier of 64 bytes"):
                call(offset, torch.zeros(size, dtype=torch.int8))

    assert torch.equal(round_trip(visit, 0, noise(64)), noise(64))


def test_tensors_elsewhere_are_refused(directory):
    """A disk is behind the CPU's memory."""
    with pytest.raises(MemplanError, match="tensor on meta"):
        FileTier(64, directory).open().put(0, torch.empty(8, device="meta"))


# What fails in the middle


def fails(visit: Visit, match: str) -> None:
    """Every further call of the visit fails with the same message."""
    for call in (visit.put, visit.get):
        with pytest.raises(MemplanError, match=match):
            call(0, noise(8))


def test_a_disk_that_fills_up_ends_the_step(directory, monkeypatch):
    """In the middle of a write: this visit is over, another open one and new ones, in a new file, go on."""
    tier = FileTier(4096, directory)
    visit, other = tier.open(), tier.open()
    file, full = visit.space.fd, Gate(failing(errno.ENOSPC))
    real = os.pwrite
    monkeypatch.setattr(filetier, "CHUNK", 1024)
    monkeypatch.setattr(
        os, "pwrite", lambda fd, view, at: full(fd, view, at) if fd == file and at >= 2048 else real(fd, view, at)
    )
    bad, behind = visit.put(0, noise(4096)), visit.put(0, noise(8))
    full.open.set()
    for job in (bad, bad, behind):
        with pytest.raises(MemplanError, match=r"cannot write 4 KiB .*: No space left on device: .* MEMPLAN_OFFLOAD"):
            job.wait()
    fails(visit, "cannot write 4 KiB")
    assert torch.equal(round_trip(other, 0, noise(4096)), noise(4096))
    visit.close()
    assert not tier.free
    assert tier.spaces == {other.space}
    assert tier.traffic["out"].copies == 1
    monkeypatch.undo()

    assert torch.equal(round_trip(tier.open(), 0, noise(4096, 1)), noise(4096, 1))


def test_a_file_that_was_cut_off_is_a_short_read(directory):
    """Nothing is returned for what is not there."""
    visit, found = FileTier(4096, directory).open(), torch.zeros(4096, dtype=torch.uint8)
    visit.put(0, noise(4096)).wait()
    os.ftruncate(visit.space.fd, 1000)
    with pytest.raises(MemplanError, match=r"cannot read 4 KiB .*: short read at byte 1000: "):
        visit.get(0, found).wait()
    fails(visit, "short read at byte 1000")


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError("no more"), OSError("odd")])
def test_whatever_a_copy_raises_reaches_the_step(directory, monkeypatch, call, error):
    """As one line, and the thread lives on."""
    tier = FileTier(64, directory)
    visit = tier.open()

    def refuse(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(MemplanError, match=r"cannot (write|read) 64 B .*: (Input/output error|.*no more|.*odd)") as raised:
            round_trip(visit, 0, noise(64))
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None
    threads = [worker.thread for worker in tier.workers.values()]

    assert torch.equal(round_trip(tier.open(), 0, noise(64)), noise(64))
    assert all(thread.is_alive() for thread in threads)


def test_a_get_fails_with_the_put_it_waits_for(directory, monkeypatch):
    """It does not fill a tensor with what was there before."""
    visit, found = FileTier(64, directory).open(), torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(os, "pwrite", Gate(failing(errno.EIO)))
    visit.put(0, noise(64))
    job = visit.get(0, found)
    os.pwrite.open.set()
    with pytest.raises(MemplanError, match="cannot write 64 B"):
        job.wait()

    assert not found.any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_not_waited_for(directory, monkeypatch):
    """Whatever ended it, the step ends too, and the next one gets a new thread."""
    tier = FileTier(64, directory)
    visit = tier.open()
    with monkeypatch.context() as patch:
        patch.setattr(filetier, "PATIENCE", 0.01)
        patch.setattr(FileJob, "run", lambda job: sys.exit())
        jobs = [visit.put(0, noise(64)), visit.put(0, noise(64))]
        for job in jobs:
            with pytest.raises(MemplanError, match="has died"):
                job.wait()
    fails(visit, "has died")

    assert torch.equal(round_trip(tier.open(), 0, noise(64)), noise(64))


# Steps that are given up


@pytest.mark.parametrize("how", ["close", "drop"])
def test_writes_of_a_step_given_up_are_cancelled(directory, monkeypatch, how):
    """Nobody waits for the disk; the next step has the same file, and its own bytes."""
    tier = FileTier(64, directory)
    visit = tier.open()
    file = visit.space.fd
    gate = Gate(os.pwrite)
    monkeypatch.setattr(os, "pwrite", gate)
    jobs = [visit.put(0, noise(64)) for _ in range(3)]
    assert gate.reached.wait(WAIT)
    if how == "close":
        visit.close()
    del visit
    following, found = tier.open(), torch.zeros(64, dtype=torch.uint8)
    assert following.space.fd == file
    following.put(0, noise(64, 1))
    job = following.get(0, found)
    gate.open.set()
    job.wait()

    assert torch.equal(found, noise(64, 1))
    with pytest.raises(MemplanError, match="cancelled"):
        jobs[2].wait()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_memory_is_its_owners_once_the_step_is_given_up(directory, monkeypatch, how):
    """A read in the middle ends first: an arena may be used for another step right after."""
    tier, found = FileTier(4096, directory), torch.zeros(4096, dtype=torch.uint8)
    visit = tier.open()
    visit.put(0, noise(4096)).wait()
    monkeypatch.setattr(filetier, "CHUNK", 1024)
    gate = Gate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    visit.get(0, found)
    assert gate.reached.wait(WAIT)
    threading.Timer(0.05, gate.open.set).start()
    if how == "close":
        visit.close()
    del visit
    found[:] = 7
    round_trip(tier.open(), 0, noise(4096, 1))

    assert (found == 7).all()


def test_a_visit_may_die_in_the_thread_that_copies_for_it(directory, monkeypatch):
    """Where the garbage collector runs is not ours to say; nobody waits for himself."""
    tier = FileTier(64, directory)
    visit = tier.open()
    visit.put(0, noise(64)).wait()
    held, found, real = [visit], torch.zeros(64, dtype=torch.uint8), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (held.clear(), real(*args))[1])
    job = visit.get(0, found)
    del visit
    job.settle()

    assert job.finished
    assert len(tier.free) == 1


KILLED = """
import os, sys, threading, time, torch
from memplan.backends.tiers import filetier, spacefile
spacefile.IN_MEMORY = set()
filetier.CHUNK, real, writing = 4096, os.pwrite, threading.Event()

def slow(*args):
    if not writing.is_set():
        print("writing", flush=True)
        writing.set()
    time.sleep(0.01)
    return real(*args)

os.pwrite = slow
visit = filetier.FileTier(1 << 20, sys.argv[1]).open()
job = visit.put(0, torch.zeros(1 << 20, dtype=torch.uint8))
writing.wait()
if sys.argv[2] == "killed":
    job.wait()
"""


@pytest.mark.parametrize("how", ["killed", "left"])
def test_a_process_leaves_nothing_behind(directory, how):
    """Killed in the middle of writing, or at its own end with copies under way: no file, and a clean exit."""
    command = [sys.executable, "-c", KILLED, str(directory), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        assert os.listdir(directory) == []
        if how == "killed":
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=WAIT)

    assert process.returncode == (-signal.SIGKILL if how == "killed" else 0)
    assert errors == b""
    assert os.listdir(directory) == []


def in_a_child(action) -> bool:
    """Whether an action, in a child that is forked now, returns."""
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT)
        try:
            action()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_child_starts_afresh(directory):
    """It opens visits of its own, and leaves the parent's alone and their files closed."""
    tier = FileTier(64, directory)
    visit = tier.open()
    visit.put(0, noise(64)).wait()
    fd = visit.space.fd

    def child() -> None:
        fails(visit, "before the process was forked")
        assert torch.equal(round_trip(tier.open(), 0, noise(64, 1)), noise(64, 1))
        visit.close()
        assert tier.open().space.usable

    def closed() -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    assert in_a_child(child)
    found = torch.zeros(64, dtype=torch.uint8)
    visit.get(0, found).wait()
    assert torch.equal(found, noise(64))
    assert in_a_child(closed)


def test_a_child_does_not_wait_for_the_parents_threads(directory, monkeypatch):
    """A copy that was under way when the process was forked is nobody's in the child."""
    gate = Gate(os.pwrite)
    monkeypatch.setattr(os, "pwrite", gate)
    visit = FileTier(64, directory).open()
    job = visit.put(0, noise(64))
    assert gate.reached.wait(WAIT)

    def child() -> None:
        with pytest.raises(MemplanError, match="forked"):
            job.wait()

    assert in_a_child(child)
    gate.open.set()
    job.wait()


# Pinned memory


class Stream:
    """A stand-in for a stream whose work is done the moment that it is given."""

    def __init__(self, device=None):
        self.device, self.waits = torch.device("cpu"), 0

    def wait_stream(self, stream):
        self.waits += 1

    def wait_event(self, event):
        self.waits += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class Event:
    """A stand-in for an event that is over once it has been asked for `late` times."""

    late = 0

    def __init__(self, enable_timing):
        self.left, self.time = self.late, 0.0

    def record(self, stream):
        self.time = time.perf_counter()

    def query(self):
        self.left -= 1
        return self.left < 0

    def synchronize(self):
        self.left = 0

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Runtime:
    """A stand-in for CUDA's runtime: what is page-locked."""

    def __init__(self, answer: int = 0):
        self.answer, self.locked, self.idle = answer, {}, False

    def cudaHostRegister(self, pointer, size, flags):
        self.locked[pointer] = size
        return self.answer

    def cudaHostUnregister(self, pointer):
        assert self.idle, "copies may be under way"
        del self.locked[pointer]

    def synchronize(self):
        self.idle = True


@pytest.fixture
def runtime(monkeypatch):
    """A GPU that is this CPU."""
    found, compute = Runtime(), Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(pinnedtier, "cudart", lambda: found)
    monkeypatch.setattr(pinnedtier, "DEVICE", "cpu")
    return found


def test_pinned_memory_keeps_the_same_books(runtime, monkeypatch):
    """With stand-ins for streams and events: what is put comes back, counted, and a late copy is a stall."""
    tier = PinnedTier(100)
    assert list(runtime.locked.values()) == [100]
    visit = tier.open()
    value = noise(60).view(torch.int32)

    assert torch.equal(round_trip(visit, 40, value), value)
    with pytest.raises(MemplanError, match="bytes 41 to 101 of a tier of 100 bytes"):
        visit.put(41, value)
    out = tier.traffic["out"]
    assert (out.bytes, out.copies, out.stalled) == (60, 1, 0.0)
    monkeypatch.setattr(Event, "late", 4)
    job = visit.get(40, value)
    job.wait()
    for _ in range(5):
        stalled = tier.traffic["in"].stalled
    assert stalled == job.stalled > 0
    assert tier.traffic["in"].copies == 2


def test_pinned_memory_is_used_again_and_unlocked(runtime, monkeypatch):
    """Copies under way stay with the space: who has it next waits for them."""
    tier = PinnedTier(64)
    visit = tier.open()
    space = visit.space
    monkeypatch.setattr(Event, "late", 100)
    visit.get(0, noise(64))
    del visit
    following = tier.open()
    assert following.space is space
    before = tier.streams["in", torch.device("cpu")].waits
    following.put(0, noise(64))

    assert before == 1
    assert tier.streams["out", torch.device("cpu")].waits == 2
    del tier, following, space
    gc.collect()
    assert runtime.locked == {}


def test_memory_that_cannot_be_locked_is_used_with_a_warning(runtime):
    """It is slower, but the step runs."""
    runtime.answer = 2
    with pytest.warns(UserWarning, match="could not be page-locked"):
        tier = PinnedTier(64)

    assert torch.equal(round_trip(tier.open(), 0, noise(64)), noise(64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pinned_memory_wants_a_gpu():
    """On a machine without one the error says so."""
    with pytest.raises(MemplanError, match="there is none here"):
        PinnedTier(64)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_storages_come_back_from_pinned_memory(dtype):
    """Every byte, also of a tensor that shows a part; the memory is locked, and exactly as large as planned."""
    base = noise(1024)
    base = (base & 1 if dtype is torch.bool else base).cuda().view(dtype)
    tier = PinnedTier(1029)
    visit = tier.open()
    assert visit.space.memory.is_pinned()
    assert visit.space.memory.untyped_storage().nbytes() == 1029
    found = torch.zeros(1024, dtype=torch.uint8, device="cuda")
    visit.put(5, base.view(-1, 2).t()).wait()
    visit.get(5, found).wait()

    assert torch.equal(found, base.view(torch.uint8))
    with pytest.raises(MemplanError, match="tensor on cpu"):
        visit.put(0, noise(8))


@cuda
@pytest.mark.cuda
def test_the_stream_waits_and_the_host_does_not():
    """Large copies without a word to the host: what is freed and given out again behind a wait harms none of them."""
    size = 64 << 20
    tier = PinnedTier(4 * size)
    for _ in range(3):
        visit = tier.open()
        for index in range(4):
            value = torch.full((size,), index + 1, dtype=torch.uint8, device="cuda")
            visit.put(index * size, value).wait()
            del value
        for index in range(4):
            found = torch.empty(size, dtype=torch.uint8, device="cuda")
            job = visit.get(index * size, found)
            job.wait()
            assert bool((found == index + 1).all())
        visit.close()
    torch.cuda.synchronize()

    assert len(tier.free) == 1
    assert tier.traffic["out"].bytes == tier.traffic["in"].bytes == 12 * size
    assert tier.traffic["in"].busy > 0

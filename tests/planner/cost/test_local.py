"""The local machine with a disk behind it: what is asked for each time, what is measured once, what is refused."""

import os
import stat
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memplan.planner.cost import disk, local, probe
from memplan.planner.cost.disk import (
    DiskRates,
    each_chunk,
    file_system,
    offload_directory,
    probe_disk,
    usual_time,
)
from memplan.planner.cost.gauge import Reading, Reference
from memplan.planner.cost.local import PAGE, Rates, device_key, doubts_rates, local_machine, memory_available
from memplan.planner.cost.workspaces import cublas_bytes
from memplan.planner.ir.errors import MachineError

pytestmark = pytest.mark.cold

GIB = 1 << 30
QUIET = Reading(1, 1e-3, 1e-3)
MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
25 24 0:23 / /dev/shm rw,relatime shared:3 master:1 - tmpfs tmpfs rw,size=24684096k
41 31 0:2 / /old/root ro - ramfs none rw
"""


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' directories count as a disk's, whatever they lie on."""
    monkeypatch.setattr(disk, "file_system", lambda device, mounts: "ext4")


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Probes that take no time: the directories that were measured. Written twice as fast as read."""
    seen: list[Path] = []

    def measure(directory: Path) -> DiskRates:
        seen.append(directory)
        return DiskRates(2e9 / len(seen), 1e9, write_load=0.25, read_load=0.5, write_duplex=0.75, read_duplex=0.5)

    monkeypatch.setattr(local, "probe", lambda device: Rates({"default": 1e9}, bandwidth=1e9, launch=1e-6))
    monkeypatch.setattr(local, "probe_disk", measure)
    monkeypatch.setattr(local, "read_pace", lambda device: QUIET)
    return seen


def test_without_offload_there_is_one_tier_and_no_file(probes: list[Path]):
    machine = local_machine()

    assert [tier.name for tier in machine.tiers] == ["device"]
    assert machine.links == ()
    assert probes == []
    assert not (Path(os.environ["MEMPLAN_CACHE"]) / "offload").exists()


def test_with_offload_the_disk_is_behind_the_memory(probes: list[Path]):
    """Same name and memory; a queue each way at the measured rates; sizes and addresses in pages."""
    plain, machine = local_machine("cpu"), local_machine("cpu", offload=True)

    assert machine.name == plain.name == "local-cpu"
    assert machine.tiers[0] == plain.tiers[0]
    assert machine.units == plain.units
    tier = machine.tiers[1]
    assert (tier.name, tier.bandwidth, tier.rounding, tier.alignment) == ("disk", 1e9, PAGE, PAGE)
    assert [(link.source, link.target, link.bandwidth, link.load, link.duplex) for link in machine.links] == [
        ("device", "disk", 2e9, 0.25, 0.75),
        ("disk", "device", 1e9, 0.5, 0.5),
    ]


def test_rates_are_measured_once_for_a_directory(probes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither again in the same directory, nor taken from another; a file that cannot be read is written again."""
    first = local_machine(offload=True)
    assert local_machine(offload=True).links == first.links
    assert len(probes) == 1

    next(Path(os.environ["MEMPLAN_CACHE"]).glob("disk-*.json")).write_text('{"write": 0.0, "read": 1.0}')
    assert local_machine(offload=True).links[0].bandwidth == 1e9
    assert len(probes) == 2

    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "elsewhere"))
    local_machine(offload=True)
    assert probes[2] == (tmp_path / "elsewhere").resolve()


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose pace and whose probe's rates a test sets."""
    state: dict[str, Any] = {"reading": QUIET, "rates": Rates({"default": 1e11}, 1e10, 1e-6), "probes": 0}

    def take(device: str) -> Rates:
        state["probes"] += 1
        return state["rates"]

    monkeypatch.setattr(local, "probe", take)
    monkeypatch.setattr(local, "read_pace", lambda device: state["reading"])
    return state


def flops() -> float:
    """Of the machine at hand."""
    return local_machine().units[0].flops["default"]


def test_a_probe_beside_other_work_is_tried_again_in_quiet(pace: dict[str, Any]):
    """Not while it goes on; and until then no rate is believed that any such processor beats."""
    pace |= {"reading": Reading(1, 3e-3, 1e-3, disturbed=True), "rates": Rates({"default": 6e8}, 1e8, 1e-4)}
    assert flops() > 5e9
    assert local_machine().units[0].launch <= 5e-6
    assert doubts_rates("cpu")
    assert pace["probes"] == 1

    pace |= {"reading": QUIET, "rates": Rates({"default": 2e11}, 1e10, 1e-6)}
    assert flops() == 2e11
    assert flops() == 2e11
    assert not doubts_rates("cpu")
    assert pace["probes"] == 2


def test_a_probe_of_a_slow_hour_is_tried_again_once_a_faster_one_is_known(pace: dict[str, Any]):
    """What slowed the machine showed in no counter then."""
    slow = Reading(1, 3e-3, 3e-3)
    pace |= {"reading": slow, "rates": Rates({"default": 5e10}, 1e10, 1e-6)}
    assert flops() == 5e10
    pace["reading"] = QUIET
    assert flops() == 5e10
    Reference(device_key()).add([QUIET, QUIET])
    pace["rates"] = Rates({"default": 2e11}, 5e9, 1e-6)
    machine = local_machine()
    assert machine.units[0].flops["default"] == 2e11
    assert machine.tiers[0].bandwidth == 1e10  # the better of each


def test_a_probe_that_slows_the_machine_itself_is_not_repeated_for_ever(pace: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A disk that goes on writing: each probe begins in quiet, and ends not so."""
    Reference(device_key()).add([QUIET, QUIET])
    turns = iter([QUIET, Reading(1, 3e-3, 3e-3)] * 9)
    monkeypatch.setattr(local, "read_pace", lambda device: next(turns))
    for _ in range(5):
        flops()
    assert pace["probes"] == 2


def test_a_probe_can_be_asked_for_anew(pace: dict[str, Any]):
    assert flops() == 1e11
    pace["rates"] = Rates({"default": 5e10}, 1e10, 1e-6)
    assert flops() == 1e11
    assert local_machine(again=True).units[0].flops["default"] == 5e10
    assert flops() == 5e10


def test_a_probe_of_before_paces_were_known_is_not_believed(pace: dict[str, Any]):
    """It says neither when it was taken nor beside what."""
    assert flops() == 1e11
    next(Path(os.environ["MEMPLAN_CACHE"]).glob("rates-*.json")).write_text(
        '{"flops": {"default": 6e8}, "bandwidth": 1e9, "launch": 1e-5}'
    )
    assert flops() == 1e11
    assert pace["probes"] == 2


def test_disks_better_figures_count():
    one, other = DiskRates(2e9, 1e9, 0.5, 0.25, 0.75, 0.5), DiskRates(1e9, 2e9, 0.25, 0.5, 0.5, 0.75)
    assert one.better(other) == DiskRates(2e9, 2e9, 0.25, 0.25, 0.75, 0.75) == other.better(one)


def test_the_least_but_one_of_a_probes_times_counts(monkeypatch: pytest.MonkeyPatch):
    """One run that cannot be has no say."""
    now, lengths = [0.0], iter([0.05, 1e-9, 0.02, 0.03, 0.04, 0.06])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "Watch", lambda: nullcontext(SimpleNamespace(disturbed=False)))

    def action() -> None:
        now[0] += next(lengths)

    assert probe.best_time("cpu", action) == pytest.approx(0.02)


def test_capacity_is_what_is_free_now_less_a_reserve(probes: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Blocks that only root may take do not count."""
    free = SimpleNamespace(f_bavail=GIB // 4096, f_bfree=2 * GIB // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    assert local_machine(offload=True).tiers[1].capacity == int(0.95 * GIB)

    free.f_bavail //= 2
    assert local_machine(offload=True).tiers[1].capacity == int(0.95 * GIB / 2)
    assert len(probes) == 1

    free.f_bavail = 1
    with pytest.raises(MachineError, match=r"free for offload in .*: set MEMPLAN_OFFLOAD"):
        local_machine(offload=True)


def test_the_directory_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside the measurements unless the environment names one; one that exists keeps its mode."""
    own = offload_directory()
    assert own == (Path(os.environ["MEMPLAN_CACHE"]) / "offload").resolve()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700

    tmp_path.chmod(0o755)
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path))
    assert offload_directory() == tmp_path.resolve()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_memory_is_not_a_disk(monkeypatch: pytest.MonkeyPatch):
    """A file system that is memory would take from the budget what it promises to save."""
    monkeypatch.setattr(disk, "file_system", lambda device, mounts: "tmpfs")

    with pytest.raises(MachineError, match="is tmpfs, which is memory: set MEMPLAN_OFFLOAD"):
        local_machine(offload=True)


@pytest.mark.parametrize(("device", "kind"), [((254, 0), "ext4"), ((0, 23), "tmpfs"), ((0, 2), "ramfs"), ((0, 3), "")])
def test_file_systems_are_told_by_their_device(device: tuple[int, int], kind: str):
    """The optional fields before the dash vary in number."""
    assert file_system(os.makedev(*device), MOUNTS) == kind


def test_what_is_no_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMPLAN_OFFLOAD", str(tmp_path / "file"))

    with pytest.raises(MachineError, match=r"cannot offload to .*file: .*; set MEMPLAN_OFFLOAD"):
        local_machine(offload=True)
    with pytest.raises(MachineError, match="cannot offload to"):
        probe_disk(tmp_path / "missing")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int, reserved: int = 0) -> None:
    """A GPU of the Hopper kind with so many bytes; probing it takes no time."""
    facts = {
        "is_available": True,
        "mem_get_info": (free, total),
        "memory_reserved": reserved,
        "get_device_name": "a card",
        "get_device_capability": (9, 0),
    }
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    rates = Rates({"default": 1e12}, bandwidth=1e12, launch=1e-6, link=1e10, back=1e10)
    monkeypatch.setattr(local, "known_rates", lambda device, again=False: rates)


def test_a_gpu_is_not_filled_to_the_last_byte(monkeypatch: pytest.MonkeyPatch):
    """3 % of it and 1 GiB are left to libraries and cuBLAS gets its own; what torch holds already may be used again."""
    pretend_gpu(monkeypatch, free=60 * GIB, total=80 * GIB, reserved=10 * GIB)
    monkeypatch.setattr(local, "memory_limit", lambda: 64 * GIB)
    monkeypatch.setattr(local, "memory_available", lambda: 40 * GIB)

    device, host = local_machine("cuda").tiers

    assert device.capacity == 70 * GIB - int(0.03 * 80 * GIB) - GIB - cublas_bytes(9)
    assert host.capacity == int(0.95 * 40 * GIB)  # not what others have, and not the last of the rest


def test_a_gpu_that_is_full_is_refused(monkeypatch: pytest.MonkeyPatch):
    pretend_gpu(monkeypatch, free=GIB // 2, total=80 * GIB)
    with pytest.raises(MachineError, match=r"512 MiB free on a card, and .* are left to libraries: end what else uses it"):
        local_machine("cuda")


def test_what_the_host_has_left_is_known():
    assert 0 < memory_available()


def test_only_the_cpu_and_the_gpu_are_local():
    with pytest.raises(MachineError, match="no local machine for device 'tpu'"):
        local_machine("tpu", offload=True)


def test_the_probe_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even while it runs has the file a name, and nobody else may open it. It is written alone, and while it is read."""
    monkeypatch.setattr(disk, "LENGTH", 3 * PAGE)
    monkeypatch.setattr(disk, "CHUNK", 2 * PAGE)
    monkeypatch.setattr(disk, "PROBE_TIME", 0.0)
    write, seen = os.pwrite, []

    def watched(handle: int, data: memoryview, at: int) -> int:
        status = os.fstat(handle)
        seen.append((at, len(data), list(tmp_path.iterdir()), status.st_nlink, stat.S_IMODE(status.st_mode)))
        return write(handle, data, at)

    monkeypatch.setattr(os, "pwrite", watched)
    rates = probe_disk(tmp_path)

    assert rates.sound
    assert 0 < rates.write_duplex <= 1
    assert 0 < rates.read_duplex <= 1
    assert seen == [(0, 2 * PAGE, [], 0, 0o600), (2 * PAGE, PAGE, [], 0, 0o600)] * (disk.PASSES * disk.ROUNDS * 2)
    assert list(tmp_path.iterdir()) == []


def test_calls_that_move_less_than_asked_are_continued(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "LENGTH", 10)
    monkeypatch.setattr(disk, "CHUNK", 4)
    asked: list[tuple[int, int]] = []

    each_chunk(lambda low, high: asked.append((low, high)) or min(3, high - low))

    assert asked == [(0, 4), (3, 7), (6, 10), (9, 10)]


def test_the_median_of_several_times_counts(monkeypatch: pytest.MonkeyPatch):
    """Passes are taken until the time is over, and four at least; the first one is left out."""
    now, lengths = [0.0], iter([0.5, 0.125, 0.25, 0.75, 9.0])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: now[0])

    def action() -> None:
        now[0] += next(lengths)

    assert usual_time(action) == 0.25
    assert now[0] == 1.625
    lengths = iter([7.0, 6.0, 5.0, 4.0])
    assert usual_time(action) == 5.0

"""Keys rebuilt into calls, and the worker: its figures, and what it survives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from memplan.backends.eager.calls import NoRoom, Unmeasurable, build, free_bytes
from memplan.backends.measure import meters, timing
from memplan.backends.measure import worker as measuring
from memplan.backends.measure.meters import allocator_extra, cuda_environment, seconds_of
from memplan.backends.measure.worker import answer, calibrate, measure
from memplan.planner.cost.estimate import Work
from memplan.planner.cost.gauge import Reading, Reference
from memplan.planner.cost.table import Figures, Table
from memplan.planner.cost.watch import Watch, is_quiet, waited
from memplan.planner.ir.errors import MemplanError
from memplan.planner.ir.machine import Machine, Tier, Unit
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program

MACHINE = Machine("toy", "cpu", (Tier("device", 1 << 30, 1e9),), (Unit("core", "device", {"default": 1e9}),))


def tensor(*shape: int, dtype: str = "float32", **rest: object) -> dict:
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return {"t": dtype, "s": list(shape), "st": strides, **rest}


def key(op: str, *args: object, **kwargs: object) -> str:
    return json.dumps({"op": f"aten.{op}", "args": args, "kwargs": kwargs})


BIG = tensor(1024, 1024)
ADD = key("add.Tensor", BIG, BIG)
SLOW = key("mm.default", tensor(512, 2048), tensor(2048, 512))
DROPOUT = key("native_dropout.default", BIG, 0.1, True)  # makes its mask as floats beside the outputs
WRONG = key("mm.default", tensor(2, 3), tensor(2, 3))
UNKNOWN = key("no_such_operator.default", BIG)
CRASH = key("crash.default")


def test_tensors_have_the_layout_of_the_key() -> None:
    call = build(key("add.Tensor", tensor(3, 4, st=[1, 5], o=7), 2.5, alpha=3), "cpu")
    made = call.args[0]
    assert (made.shape, made.stride(), made.storage_offset()) == ((3, 4), (1, 5), 7)
    assert made.untyped_storage().nbytes() == 4 * (7 + 1 + 2 + 3 * 5)
    assert torch.equal(call(), made + 7.5)


def test_every_form_of_argument() -> None:
    call = build(
        key(
            "full.default",
            [2, 3],
            {"f": "-inf"},
            dtype={"dtype": "float16"},
            layout={"layout": "strided"},
            device={"device": "cuda"},
            pin_memory=False,
        ),
        "cpu",
    )
    assert torch.equal(call(), torch.full((2, 3), float("-inf"), dtype=torch.float16))
    copy = build(key("clone.default", tensor(1, 2, 3, 4), memory_format={"memory_format": "channels_last"}), "cpu")
    assert copy().is_contiguous(memory_format=torch.channels_last)
    assert build(key("sum.default", tensor(0, 4)), "cpu")().item() == 0


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "complex64", "bool", "int64", "float64"])
def test_every_type_of_element(dtype: str) -> None:
    made = build(key("clone.default", tensor(300, 300, dtype=dtype)), "cpu").args[0]
    assert made.dtype is getattr(torch, dtype)
    assert made.shape == (300, 300)


INDEX = tensor(64, dtype="int64")


@pytest.mark.parametrize(
    ("text", "argument", "bound"),
    [
        (key("embedding.default", tensor(10, 4), INDEX), 1, 10),
        (key("embedding_dense_backward.default", tensor(64, 4), INDEX, 10, -1, False), 1, 10),
        (key("nll_loss_forward.default", tensor(64, 5), INDEX, None, 1, -100), 1, 5),
        (key("gather.default", tensor(64), 0, INDEX), 2, 64),
        (key("index_select.default", tensor(3, 9), 1, INDEX), 2, 9),
        (key("index_select.default", tensor(3, 9), -1, INDEX), 2, 9),
    ],
)
def test_indices_stay_inside(text: str, argument: int, bound: int) -> None:
    call = build(text, "cpu")
    call()
    indices = call.args[argument]
    assert 0 <= int(indices.min()) <= int(indices.max()) < bound
    assert int(indices.max()) > 0


def test_indices_of_several_dimensions() -> None:
    call = build(key("index.Tensor", tensor(3, 9), [None, INDEX]), "cpu")
    assert call().shape == (3, 64)
    assert 0 < int(call.args[1][1].max()) < 9


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        UNKNOWN,
        key("add", BIG, BIG),
        key("clone.default", {"x": "<object>"}),
        key("clone.default", {"t": "float7", "s": [], "st": []}),
        key("clone.default", tensor(1 << 60)),
    ],
)
def test_what_cannot_be_built(text: str) -> None:
    with pytest.raises(Unmeasurable):
        build(text, "cpu")


def test_the_allocator_sees_a_composite_op() -> None:
    call = build(DROPOUT, "cpu")
    assert allocator_extra(call, call.inputs) == pytest.approx(4 << 20, rel=0.01)


def test_worker_answers_and_loses_only_what_fails(tmp_path: Path) -> None:
    told = []
    found = measure([ADD, WRONG, UNKNOWN, SLOW, DROPOUT], threads=1, progress=lambda *at: told.append(at))
    assert found[WRONG] is None
    assert found[UNKNOWN] is None
    add, slow, dropout = found[ADD], found[SLOW], found[DROPOUT]
    assert add is not None
    assert slow is not None
    assert dropout is not None
    assert 0 < add[0] < 1
    assert 0 < slow[0] < 5
    assert add[1] == 0
    assert dropout[1] == pytest.approx(4 << 20, rel=0.15)
    assert told[-1] == (10, 10)


FAKE = """
import json, os, sys, time
for line in sys.stdin:
    key = json.loads(line).get("key", "")
    if "crash" in key:
        os._exit(1)
    if "killed" in key:
        os.kill(os.getpid(), 9)
    if "full" in key:
        print(json.dumps({"error": "no memory", "passing": True}), flush=True)
        continue
    if "hang" in key:
        time.sleep(60)
    print(json.dumps({"value": 4096.0}), flush=True)
"""


def test_a_crash_loses_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "worker_command", lambda *_: [sys.executable, "-c", FAKE])
    found = measure([ADD, CRASH, SLOW], threads=1)
    assert found == {ADD: Figures(4096.0, 4096), CRASH: None, SLOW: Figures(4096.0, 4096)}


PACED = """
import json, sys
paces = iter([1.0, 3.0, 1.0, 1.0, 1.0])
seconds = {"one": [3.0, 1.0], "two": [3.0]}
for line in sys.stdin:
    request = json.loads(line)
    if "look" in request:
        print(json.dumps({"reading": [7, next(paces), 1.0, False]}), flush=True)
    else:
        print(json.dumps({"value": seconds.get(request.get("key"), [4096.0]).pop(0)}), flush=True)
"""


def test_what_was_timed_in_a_slow_moment_is_timed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each time has the slower of the readings around it, and the better one counts; other processes take the workspaces."""
    commands = iter([[sys.executable, "-c", PACED], [sys.executable, "-c", FAKE]])
    monkeypatch.setattr(measuring, "worker_command", lambda *_: next(commands))
    monkeypatch.setattr(timing, "SPAN", 0.0)
    reference = Reference("a device", tmp_path)
    reference.add([Reading(1, 1.0, 1.0)] * 2)
    found = measure(["one"], threads=1, reference=reference)
    assert found == {"one": Figures(1.0, 4096, False, Reading(7, 1.0, 1.0))}


def test_a_hanging_kernel_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For good on a quiet machine; beside other work it may have been that."""
    monkeypatch.setattr(measuring, "worker_command", lambda *_: [sys.executable, "-c", FAKE])
    monkeypatch.setattr(measuring, "KEY_LIMIT", 0.5)
    monkeypatch.setattr(measuring, "is_quiet", lambda: True)
    assert measure(["hang", ADD], threads=1) == {"hang": None, ADD: Figures(4096.0, 4096)}
    monkeypatch.setattr(measuring, "is_quiet", lambda: False)
    assert measure(["hang", ADD], threads=1) == {ADD: Figures(4096.0, 4096)}


@pytest.mark.parametrize("short", ["killed", "full"])
def test_a_lack_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch, short: str) -> None:
    """Whether the system ended the worker, or the worker said that its kernel had none."""
    monkeypatch.setattr(measuring, "worker_command", lambda *_: [sys.executable, "-c", FAKE])
    assert measure([ADD, short, SLOW], threads=1) == {ADD: Figures(4096.0, 4096), SLOW: Figures(4096.0, 4096)}


def test_the_worker_says_what_passes() -> None:
    """A kernel or its arguments that find no memory, in each of the ways to say so; not what is wrong with a key."""

    def fails(error: Exception) -> bool:
        def raising(_: object) -> tuple[float, bool]:
            raise error

        return answer({"key": ADD, "device": "cpu"}, raising)["passing"]

    assert fails(torch.OutOfMemoryError("CUDA out of memory"))
    assert fails(MemoryError())
    assert fails(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(NoRoom):
        build(key("clone.default", tensor(1 << 60)), "cpu")
    assert not answer({"key": UNKNOWN, "device": "cpu"}, lambda _: (0.0, False))["passing"]


def test_a_gpus_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (7, 100), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert free_bytes("cuda") == 37


def test_segments_grow_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert cuda_environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert cuda_environment() == {}


def test_the_time_limit_leaves_keys_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "worker_command", lambda *_: [sys.executable, "-c", FAKE])
    assert measure([ADD, "hang", SLOW], threads=1, time_limit=1.0) == {ADD: Figures(4096.0, 4096)}


def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such library')"]
    monkeypatch.setattr(measuring, "worker_command", lambda *_: command)
    with pytest.raises(MemplanError, match="no such library"):
        measure([ADD], threads=1)


def one_op_program() -> Program:
    buffers = Buffer("in", 8, Kind.TEMPORARY), Buffer("out", 8, Kind.TEMPORARY)
    return Program("toy", buffers, (Op("add", "t", ADD, Phase.FORWARD, (0,), (1,)),), ())


def test_disturbed_figures_are_told_and_taken_again_in_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [{ADD: Figures(2.0, 0, True)}, {ADD: Figures(1.0, 0)}]
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: answers.pop(0))
    now = Reading(1, 1e-3, 1e-3)
    monkeypatch.setattr(measuring, "read_pace", lambda device: now)
    program = one_op_program()
    with pytest.warns(UserWarning, match="1 of 1 ops of toy were timed while other work held the cores"):
        assert calibrate(program, MACHINE, Table("a device", tmp_path)) == 1
    now = now._replace(disturbed=True)
    with pytest.warns(UserWarning, match="timed while other work"):
        assert calibrate(program, MACHINE, Table("a device", tmp_path)) == 0
    now = now._replace(disturbed=False)
    assert calibrate(program, MACHINE, Table("a device", tmp_path)) == 1
    found = Table("a device", tmp_path).get(ADD)
    assert found is not None
    assert found[:3] == (1.0, 0, False)
    assert found.work == Work("t", "float32", 0.0, 0)


def test_figures_of_a_slow_hour_are_taken_again_in_a_faster_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing waited for a core then; the readings alone tell. As slow as then, they stay, and are told."""
    slow, fast = Reading(1, 2e-3, 1e-3), Reading(2, 1e-3, 1e-3)
    answers = [{ADD: Figures(2.0, 0, reading=slow)}, {ADD: Figures(1.0, 0, reading=fast)}]
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: answers.pop(0))
    program, table, now = one_op_program(), Table("a device", tmp_path), slow
    monkeypatch.setattr(measuring, "read_pace", lambda device: now)
    assert calibrate(program, MACHINE, table) == 1
    table.reference.add([fast, fast])
    with pytest.warns(UserWarning, match=r"timed while .* or while the machine was up to 2\.0 times as slow as at its best"):
        assert calibrate(program, MACHINE, table) == 0
    now = fast
    assert calibrate(program, MACHINE, table) == 1
    assert calibrate(program, MACHINE, table) == 0


def test_measuring_again_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then what was known, of the pace too, counts for nothing."""
    answers = [{ADD: Figures(1.0, 0)}, {ADD: Figures(2.0, 0)}]
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: answers.pop(0))
    table = Table("a device", tmp_path)
    table.reference.add([Reading(1, 1e-9, 1e-9)] * 2)
    calibrate(one_op_program(), MACHINE, table)
    calibrate(one_op_program(), MACHINE, table, again=True)
    found = Table("a device", tmp_path)
    assert (found.get(ADD) or Figures(0.0, 0)).seconds == 2.0
    assert found.reference.slowness(Reading(1, 1.0, 1.0)) == 1.0


def test_a_time_that_cannot_be_is_left_to_the_next_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thousand times the work of the reference in the same time."""
    reading = Reading(1, 1e-3, 1e-3)
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: {ADD: Figures(1e-6, 0, reading=reading)})
    program, table = one_op_program(), Table("a device", tmp_path)
    heavy = msgspec.structs.replace(program, ops=(msgspec.structs.replace(program.ops[0], flops=2.0 * 512**3),))
    assert calibrate(heavy, MACHINE, table) == 0
    assert ADD not in table


def scripted(monkeypatch: pytest.MonkeyPatch, runs: list[tuple[float, bool]]) -> list[float]:
    """Let runs of a call take these seconds, disturbed or not, the last for ever; returns those taken."""
    taken: list[float] = []

    def run(_: object, passing: int) -> float:
        taken.append(runs[min(len(taken), len(runs) - 1)][0])
        return taken[-1]

    class Scripted(Watch):
        @property
        def disturbed(self) -> bool:
            return runs[min(len(taken), len(runs)) - 1][1]

    monkeypatch.setattr(meters, "timed_on_cpu", run)
    monkeypatch.setattr(meters, "Watch", Scripted)
    return taken


def test_disturbed_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = scripted(monkeypatch, [(9.0, True), (0.05, True), (0.01, False), (0.04, True), (0.02, False), (0.02, False)])
    assert seconds_of(lambda: None, 3, "cpu") == (0.02, False)
    assert len(taken) > 5


def test_a_call_without_a_quiet_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = scripted(monkeypatch, [(0.1, True)])
    assert seconds_of(lambda: None, 3, "cpu") == (0.1, True)
    assert 4 < len(taken) < 20  # it waits for the other work to end, and not for ever


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="threads' waits are not counted here")
def test_waits_for_a_core_are_seen() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        before = waited()
        for _ in range(40):  # the other processes take a moment to start
            if not is_quiet():
                break
        else:
            pytest.fail("two busy processes on each core go unnoticed")
        assert waited() > before
    finally:
        for each in busy:
            each.kill()
            each.wait()


def test_calibrate_measures_what_the_table_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fake(keys: list[str], device: str, **_: object) -> dict:
        asked.append((keys, device))
        return {key: None if "crash" in key else Figures(1.0, 0) for key in keys}

    monkeypatch.setattr(measuring, "measure", fake)
    buffers = tuple(Buffer(f"b{index}", 8, Kind.TEMPORARY) for index in range(6))
    flops = {ADD: 1.0, SLOW: 5.0, CRASH: 3.0, "opaque": 9.0}
    ops = tuple(
        Op(f"op{index}", "t", text, Phase.FORWARD, (), (index,), flops=flops[text])
        for index, text in enumerate([ADD, SLOW, ADD, CRASH, "opaque"])
    )
    program = Program("toy", buffers, ops, ())
    table = Table("a device", tmp_path)
    assert calibrate(program, MACHINE, table) == 2
    assert asked == [([SLOW, CRASH, ADD], "cpu")]
    assert calibrate(program, MACHINE, Table("a device", tmp_path)) == 0
    assert len(asked) == 1


def test_a_worker_ends_with_its_gpus_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def figure(call: object) -> tuple[float, bool]:
        raise RuntimeError("some kernel's own error")

    monkeypatch.setattr(measuring, "build", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert "own error" in answer({"key": ADD, "device": "cuda"}, figure)["error"]
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        answer({"key": ADD, "device": "cuda"}, figure)


HOLES = """
import ctypes
import torch
from memplan.backends.measure.training import Meter
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(60_000) for _ in range(600)]  # below what is mapped singly: they lie in the heap
for piece in pieces:
    ctypes.memset(piece, 1, 60_000)
for piece in pieces[:500]:
    libc.free(piece)  # and leave a resident hole of 28 MiB in it
meter = Meter("cpu")
meter.reset()
tensors = [torch.ones(1 << 18) for _ in range(20)]
print(meter.peak(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is Linux's")
def test_tensors_that_find_room_in_the_heap_count_in_a_peak():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

    done = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True)

    assert 20 << 20 <= int(done.stdout) <= 23 << 20

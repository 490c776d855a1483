"""The roofline by hand, the model of workspaces, and the table on disk."""

import json
from pathlib import Path

import pytest
from memplan.planner.cost import local
from memplan.planner.cost.estimate import Work
from memplan.planner.cost.gauge import Reading
from memplan.planner.cost.keys import measurable
from memplan.planner.cost.local import control_group_limits, device_key, local_machine, memory_limit
from memplan.planner.cost.table import Figures, Table, apply_costs, coverage, roofline
from memplan.planner.cost.workspaces import cublas_bytes, modelled_workspace
from memplan.planner.ir.machine import Machine, Tier, Unit, load_machine, preset_names
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program

pytestmark = pytest.mark.cold

MACHINE = Machine(
    "toy",
    "cpu",
    (Tier("device", 1 << 30, bandwidth=1e9, rounding=512),),
    (Unit("core", "device", {"default": 1e9, "bfloat16": 4e9}, launch=1e-6, efficiency=0.5),),
)


def tensor(*shape: int, dtype: str = "float32", strides: tuple[int, ...] | None = None) -> dict:
    if strides is None:
        strides = tuple(int(stride) for stride in _compact(shape))
    return {"t": dtype, "s": list(shape), "st": list(strides)}


def _compact(shape: tuple[int, ...]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def key(op: str, *args: object, **kwargs: object) -> str:
    return json.dumps({"op": op, "args": args, "kwargs": kwargs})


def op(of: str, flops: float = 0.0, traffic: int = 0) -> Op:
    return Op("op", "aten.mm.default", of, Phase.FORWARD, (0,), (1,), flops=flops, traffic=traffic)


MM = key("aten.mm.default", tensor(8, 8), tensor(8, 8))
MM16 = key("aten.mm.default", tensor(8, 8, dtype="bfloat16"), tensor(8, 8, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("made", "seconds"),
    [
        (op(MM, flops=1e9), 2.0),
        (op(MM16, flops=1e9), 0.5),
        (op(MM, flops=1.0, traffic=3 * 10**9), 3.0),
        (op(MM, flops=1.0, traffic=1), 1e-6),
        (op("not a call", flops=1e9), 2.0),
    ],
    ids=["compute", "its own type", "memory", "launch", "unknown key"],
)
def test_roofline(made: Op, seconds: float) -> None:
    assert roofline(made, MACHINE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        (MM, True),
        ("", False),
        ("[]", False),
        ('{"op": 3}', False),
        (key("loss", 0.0, 0), False),
        (key("aten.rand.generator", [4], generator={"x": "<Generator>"}), False),
    ],
)
def test_measurable(text: str, possible: bool) -> None:
    assert measurable(text) is possible


def test_workspaces_are_modelled_for_the_device() -> None:
    image, weight = tensor(2, 8, 16, 16), tensor(8, 8, 3, 3)
    convolution = key("aten.convolution.default", image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    sizes = 2 * 8 * 16 * 16 * 4, 8 * 8 * 9 * 4
    assert modelled_workspace(convolution, sizes[0], "cpu") == int(1.1 * (2 * sizes[0] + sizes[1]))
    assert modelled_workspace(MM, 256, "cpu") == 0
    assert modelled_workspace(MM, 256, "cuda") == 0
    gaps = key("aten.mm.default", tensor(8, 8, strides=(32, 2)), tensor(8, 8))
    assert modelled_workspace(gaps, 256, "cpu") == int(1.1 * 256)
    mixed = key("aten.add.Tensor", tensor(64), tensor(64, dtype="bfloat16"))
    assert modelled_workspace(mixed, 256, "cpu") == int(1.1 * 256)
    assert modelled_workspace(mixed, 256, "cuda") == 0
    assert modelled_workspace("nonsense", 256, "cpu") == 0


def test_what_cublas_keeps_is_no_ops_workspace() -> None:
    """For a training step the workspaces of two threads, larger on Hopper; they are off the presets' capacities."""
    assert (cublas_bytes(8), cublas_bytes(9)) == (2 * (8 << 20 | 128 << 10), 2 * (32 << 20))
    assert load_machine("h100-80gb").tiers[0].capacity == 85017493504 - cublas_bytes(9)
    assert load_machine("a100-80gb").tiers[0].capacity == 84500000000 - cublas_bytes(8)


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    table = Table("a device", tmp_path)
    table.update({"one": Figures(0.5, 64), "bad": None})
    table.save()
    again = Table("a device", tmp_path)
    assert again.get("one") == Figures(0.5, 64)
    assert again.get("bad") is None
    assert "bad" in again
    assert "two" not in again
    assert len(again) == 1
    assert "one" not in Table("another device", tmp_path)


def test_writers_merge(tmp_path: Path) -> None:
    first, second = Table("a device", tmp_path), Table("a device", tmp_path)
    first.update({"one": Figures(0.5, 64)})
    second.update({"two": Figures(0.25, 0)})
    first.save()
    second.save()
    assert len(second) == len(Table("a device", tmp_path)) == 2


def test_disturbed_figures_give_way(tmp_path: Path) -> None:
    """To those taken in quiet, whichever came first, and to lower ones."""
    good, bad, worse = Figures(1.0, 0), Figures(2.0, 0, True), Figures(3.0, 0, True)
    for first, second in [(good, bad), (bad, good), (bad, worse), (worse, bad)]:
        table, other = Table("a device", tmp_path / str((first, second))), Table("a device", tmp_path / str((first, second)))
        table.update({"one": first})
        table.save()
        other.update({"one": second})
        other.save()
        assert Table("a device", tmp_path / str((first, second))).get("one") == min(first, second)
        table.update({"one": second})
        assert table.get("one") == min(first, second)


def test_figures_of_a_slow_hour_give_way(tmp_path: Path) -> None:
    """As soon as the machine has been seen to be faster, though no counter said anything: even before they are taken again."""
    slow, fast = Reading(100, 3e-3, 3e-3), Reading(200, 1e-3, 3e-3)
    table = Table("a device", tmp_path)
    table.reference.add([slow, slow])
    table.update({"one": Figures(3.0, 0, reading=slow)})
    assert not table.doubts(table.get("one"))
    table.reference.add([fast])  # a single reading might be a wrong clock's
    assert not table.doubts(table.get("one"))
    table.reference.add([fast])
    assert table.doubts(table.get("one"))
    table.save()
    again = Table("a device", tmp_path)
    assert again.doubts(again.get("one"))
    again.update({"one": Figures(3.5, 0, reading=fast)})
    assert again.get("one") == Figures(3.5, 0, reading=fast)


def test_a_machine_that_is_slow_whenever_it_works_is_believed(tmp_path: Path) -> None:
    """A processor that grows hot: readings are fast only before it has worked. What other work disturbed never is."""
    slow, fast = Reading(100, 2e-3, 2e-3), Reading(200, 1e-3, 1e-3)
    table = Table("a device", tmp_path)
    table.reference.add([fast, fast])
    table.update({"hot": Figures(2.0, 0, reading=slow), "busy": Figures(2.0, 0, True, slow)})
    for _ in range(2):
        assert table.doubts(table.get("hot"))
        table.update({"hot": Figures(2.1, 0, reading=slow)})
        table.note_tries(["hot", "busy"])
        table.save()
    again = Table("a device", tmp_path)
    assert not again.doubts(again.get("hot"))
    assert again.doubts(again.get("busy"))


def test_the_smaller_of_two_quiet_times_stays(tmp_path: Path) -> None:
    """A second measurement never replaces a smaller time by a larger one, nor any by nothing."""
    table = Table("a device", tmp_path)
    for seconds in (2.0, 1.0, 1.5):
        table.update({"one": Figures(seconds, 0)})
    table.update({"one": None})
    assert table.get("one") == Figures(1.0, 0)


def test_measuring_anew_replaces_what_is_there(tmp_path: Path) -> None:
    table = Table("a device", tmp_path)
    table.update({"one": Figures(1.0, 0), "two": Figures(1.0, 0)})
    table.save()
    table.replace({"one": Figures(2.0, 0)})
    assert Table("a device", tmp_path).get("one") == Figures(2.0, 0)
    assert Table("a device", tmp_path).get("two") == Figures(1.0, 0)


def test_what_was_measured_beside_other_work_is_bounded_by_its_kind(tmp_path: Path) -> None:
    """Ops of the kind took twice their roofline in quiet; one was timed at 460 times its own, one at 1.2 times."""
    keys = [key("aten.mm.default", tensor(8, 8), tensor(8, 8), size) for size in range(12)]
    table = Table("a device", tmp_path)
    work = Work("aten.mm.default", "float32", 1e9, 0)
    table.update({each: Figures(4.0, 8, work=work) for each in keys[:10]})
    table.update({keys[10]: Figures(920.0, 16, True, work=work), keys[11]: Figures(2.4, 24, True, work=work)})
    program = Program("toy", (Buffer("x", 512, Kind.INPUT),), tuple(op(each, flops=1e9) for each in keys), ())
    costed = apply_costs(program, MACHINE, table)
    assert [made.seconds for made in costed.ops] == pytest.approx([4.0] * 11 + [2.4])
    assert [made.workspace for made in costed.ops[10:]] == [16, 24]
    found = coverage(costed, table)
    assert found.share == 1.0
    assert found.disturbed == pytest.approx(6.4 / 46.4)


def test_what_was_not_measured_is_estimated_by_its_kind(tmp_path: Path) -> None:
    """Figures of another model correct the roofline: by kind where there are enough, by all else; too few say nothing."""
    other = [key("aten.mm.default", tensor(16, 16), tensor(16, 16), size) for size in range(8)]
    table = Table("a device", tmp_path)
    buffers = Buffer("x", 512, Kind.INPUT), Buffer("y", 512, Kind.TEMPORARY)
    program = Program("toy", buffers, (op(MM, flops=1e9), op(MM16, flops=1e9)), ())
    table.update({each: Figures(6.0, 0, work=Work("aten.mm.default", "float32", 1e9, 0)) for each in other[:7]})
    assert [made.seconds for made in apply_costs(program, MACHINE, table).ops] == pytest.approx([2.0, 0.5])
    table.update({other[7]: Figures(0.5, 0, work=Work("aten.add.Tensor", "float32", 1e8, 0))})
    costed = apply_costs(program, MACHINE, table)
    assert [made.seconds for made in costed.ops] == pytest.approx([6.0, 1.5])
    assert coverage(costed, table, alike=8).describe("toy") == (
        "times: none measured, estimated from the rates of toy, corrected by 8 measured ops; memplan calibrate measures them"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1, 2]", b'{"device": "a device", "entries": {"k": [1', b"[" * 100_000],
    ids=["empty", "binary", "another shape", "truncated", "deep"],
)
def test_a_broken_file_is_a_warning(tmp_path: Path, content: bytes) -> None:
    path = Table("a device", tmp_path).path
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="ignoring"):
        table = Table("a device", tmp_path)
    assert len(table) == 0
    table.update({"one": Figures(0.5, 64)})
    with pytest.warns(UserWarning, match="ignoring"):
        table.save()
    assert len(Table("a device", tmp_path)) == 1


def test_impossible_figures_are_left_out(tmp_path: Path) -> None:
    path = Table("a device", tmp_path).path
    path.write_text(json.dumps({"device": "a device", "entries": {"a": [-1.0, 0], "b": [1.0, 8, False]}, "format": 4}))
    with pytest.warns(UserWarning, match="impossible"):
        table = Table("a device", tmp_path)
    assert len(table) == 1


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot"):
        Table("a device", tmp_path / "file").save()


def test_costs_come_from_the_table_first(tmp_path: Path) -> None:
    program = Program(
        "toy",
        (Buffer("x", 100, Kind.INPUT), Buffer("y", 513, Kind.TEMPORARY), Buffer("z", 0, Kind.OUTPUT)),
        (
            Op("a", "aten.mm.default", MM, Phase.FORWARD, (0,), (1,), flops=1e9),
            Op("b", "aten.mm.default", MM16, Phase.FORWARD, (1,), (2,), flops=1e9),
        ),
        (2,),
    )
    table = Table("a device", tmp_path)
    table.update({MM: Figures(1.5, 77)})
    costed = apply_costs(program, MACHINE, table)
    assert [(op.seconds, op.workspace) for op in costed.ops] == [(1.5, 77), (0.5, 0)]
    assert [buffer.bytes for buffer in costed.buffers] == [512, 1024, 0]
    assert apply_costs(costed, MACHINE, table) == costed
    assert str(coverage(costed, table)) == "1 of 2 ops measured, 75.0% of 2 s"
    assert coverage(costed, None).measured == 0
    assert coverage(costed, table, runs=[0, 1, 1]).seconds == 2.5  # a run that is repeated counts again
    assert apply_costs(program, MACHINE).ops[0].seconds == pytest.approx(2.0)


def test_presets_are_sound() -> None:
    singles = {"a100-80gb", "a800-80gb", "h100-80gb", "h200", "rtx4090"}
    assert set(preset_names()) >= singles | {"a800-8x80gb", "h100-8x80gb"}
    for name in preset_names():
        assert load_machine(name).name == name
    for maker in ("a800", "h100"):
        one, eight = load_machine(f"{maker}-80gb"), load_machine(f"{maker}-8x80gb")
        assert eight.tiers[0].capacity == 8 * one.tiers[0].capacity
        assert eight.units[0].flops == {name: 8 * rate for name, rate in one.units[0].flops.items()}
        assert [link.bandwidth for link in eight.links] == [8 * link.bandwidth for link in one.links]


def test_local_machine_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(local, "read_pace", lambda device: Reading(1, 1e-3, 1e-3))
    machine = local_machine()
    assert machine.name == "local-cpu"
    assert 0 < machine.tiers[0].capacity <= memory_limit()
    assert local_machine() == machine
    next(tmp_path.glob("rates-*.json")).write_text("{")
    assert local_machine().units[0].flops.keys() == machine.units[0].flops.keys()


def test_device_key_tells_what_changes_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_key(threads=1) != device_key(threads=2)
    plain = device_key()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert device_key() != plain


def test_control_groups_limit_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert control_group_limits(tmp_path) == []
    (tmp_path / "memory.max").write_text("1048576\n")
    assert control_group_limits(tmp_path) == [1048576]

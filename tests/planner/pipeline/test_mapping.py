"""Inferences on a scratchpad: what the referee says, what is refused, and what the command prints."""

import json
import random

import memplan
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.passes.fuse import Fuse
from memplan.passes.prefetch import Prefetch
from memplan.planner.cli import app as cli
from memplan.planner.ir.errors import BudgetError, InvalidSchedule, MachineError, MemplanError
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Start
from memplan.planner.pipeline.mapping import Mapper, events_of
from memplan.solvers.face.answer import Answer, Status
from memplan.solvers.programs.names import NAMES, SolverError, why_not
from memplan.solvers.scratchpad.problem import Residency
from memplan.solvers.scratchpad.spm import peaks
from torch import nn

MACHINE = load_machine("scratchpad")


def inference(rng: random.Random, ops: int) -> Program:
    """A random inference: parameters, one input, and ops of which some are read twice."""
    buffers = [Buffer("input", 64 * rng.randint(1, 8), Kind.INPUT)]
    made = []
    values = [0]
    for number in range(ops):
        reads = {values[-1] if rng.random() < 0.7 else rng.choice(values[-4:])}
        reads |= {rng.choice(values[-4:])} if rng.random() < 0.4 else set()
        if rng.random() < 0.5:
            buffers.append(Buffer(f"weight {number}", 64 * rng.randint(1, 4), Kind.PARAMETER))
            reads.add(len(buffers) - 1)
        buffers.append(Buffer(f"value {number}", 64 * rng.randint(1, 8), Kind.TEMPORARY))
        values.append(len(buffers) - 1)
        made.append(Op(f"op{number}", "aten.op", f"k{number}", Phase.FORWARD, tuple(sorted(reads)), (values[-1],),
                       seconds=rng.randint(1, 9) * 1e-8))  # fmt: skip
    read = {buffer for op in made for buffer in op.reads}
    outputs = tuple(buffer for buffer in values[1:] if buffer not in read)
    program = Program("random", tuple(buffers), tuple(made), outputs)
    program.verify()
    return program


@pytest.mark.parametrize("solver", [name for name in NAMES if not why_not(name)])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), ops=st.integers(2, 12))
def test_a_mapping_by_any_solver_moves_as_little(solver, seed, ops):
    """As few bytes, proven so, halfway between the largest op and the smallest peak."""
    program = inference(random.Random(seed), ops)
    wanted, made = (Mapper(program, MACHINE, weights=True, solver=each) for each in (None, solver))
    capacity = wanted.landmarks["M_H"]
    wanted, made = wanted.map(capacity), made.map(capacity)
    assert made.report == referee(made.fused.program, made.machine, made.schedule)
    assert made.mapped.bytes == made.bound == wanted.bound
    assert made.noncompulsory == wanted.noncompulsory


def test_map_model_hands_its_solver_on(monkeypatch):
    """To every order that is tried; and what a solver gives up at is told in a line."""
    asked = []

    def gives_up(program, solver, *rest, **options):
        asked.append(solver)
        raise SolverError("cbc gave up: too large")

    wide = zip((4, 16, 16), (16, 16, 4), strict=True)
    skip = Skips(nn.Sequential(*[layer for width in wide for layer in (nn.Conv2d(*width, 3), nn.Sigmoid())])).eval()
    image = torch.ones(1, 4, 32, 32)
    assert memplan.map_model(skip, "M_R", (image,), solver="cbc").mapping.noncompulsory > 0
    monkeypatch.setattr("memplan.solvers.programs.linear.solve", gives_up)
    with pytest.raises(MemplanError, match="cbc gave up: too large: choose another, or leave it out"):
        memplan.map_model(skip, "M_R", (image,), solver="cbc")
    assert asked == ["cbc"]


class Skips(nn.Module):
    """Its input waits for its end, in nobody's interest."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = x.sin()
        return self.inner(y) + y[..., 3:-3, 3:-3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 20), st.booleans(), st.booleans(), st.floats(0, 1))
def test_a_mapping_moves_what_it_says(seed, ops, weights, early, share):
    """The referee's bytes are the compulsory ones and those of the residency, within the scratchpad, by address."""
    mapper = Mapper(inference(random.Random(seed), ops), MACHINE, weights=weights, prefetch=early)
    low, high = mapper.landmarks["M_R"], mapper.landmarks["M_P"]
    made = mapper.map(int(low + share * (high - low)))
    assert made.report.peak[0] <= made.capacity
    assert made.noncompulsory == made.mapped.bytes >= made.bound
    assert made.report == referee(made.fused.program, made.machine, made.schedule)
    assert made.report.time >= made.least_time * (1 - 1e-9)
    assert mapper.map(high).noncompulsory == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 20), st.booleans(), st.floats(0, 1))
def test_ops_run_again_in_place_of_loads(seed, ops, weights, share):
    """Never more bytes than without, the referee's bytes are the residency's, and its repeated runs those asked for.

    Where ops might run again a bound on mappings in which none does is not claimed, though none was run again.
    """
    program = inference(random.Random(seed), ops)
    once, again = (Mapper(program, MACHINE, weights=weights, recompute=each) for each in (False, True))
    low, high = once.landmarks["M_R"], once.landmarks["M_P"]
    room = int(low + share * (high - low))
    made = again.map(room)
    assert made.noncompulsory == made.mapped.bytes <= once.map(room).noncompulsory
    assert made.bound == 0
    assert made.report.repeated == len(made.mapped.again)
    assert made.report.peak[0] <= room
    assert made.report.time >= made.least_time * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 20), st.floats(0, 1))
def test_loads_started_early_cost_no_bytes_and_no_time(seed, ops, share):
    program = inference(random.Random(seed), ops)
    late, early = (Mapper(program, MACHINE, weights=True, prefetch=each) for each in (False, True))
    low, high = late.landmarks["M_R"], late.landmarks["M_P"]
    room = int(low + share * (high - low))
    slow, fast = late.map(room), early.map(room)
    if slow.mapped == fast.mapped:
        assert sum(fast.report.moved) == sum(slow.report.moved)
        assert fast.report.time <= slow.report.time + 1e-12


def test_prefetch_only_moves_loads_forward():
    program = inference(random.Random(3), 12)
    mapper = Mapper(program, MACHINE, weights=True)
    made = mapper.map(mapper.landmarks["M_H"])
    before = events_of(mapper.problem, made.mapped)
    tier = {**mapper.homes, **{-1 - event: 1 for event in before if event < 0}}
    after = Prefetch(made.capacity)(made.fused.program, made.machine, before, tier, mapper.homes)
    assert sorted(after) == sorted(before)
    assert [event for event in after if event >= 0] == [event for event in before if event >= 0]
    assert [event for event in after if event < 0] == [event for event in before if event < 0]
    loads = [[at for at, event in enumerate(events) if event < 0] for events in (before, after)]
    assert all(new <= old for old, new in zip(*loads, strict=True))
    assert loads[0] != loads[1]
    assert made.report.time < Mapper(program, MACHINE, weights=True, prefetch=False).map(made.capacity).report.time


def test_an_output_stays_where_its_home_is():
    """The referee wants it in the memory behind, and in no other place."""
    mapper = Mapper(inference(random.Random(1), 6), MACHINE)
    made = mapper.map(mapper.landmarks["M_P"])
    program, schedule = made.fused.program, made.schedule
    (*_, store) = [at for at, step in enumerate(schedule.instructions) if isinstance(step, Start)]
    output = schedule.instructions[store].buffer
    assert output in program.outputs

    def without(*gone):
        kept = tuple(step for at, step in enumerate(schedule.instructions) if at not in gone)
        return type(schedule)(program=schedule.program, instructions=kept, homes=schedule.homes)

    free = next(at for at, step in enumerate(schedule.instructions) if isinstance(step, Free) and step.buffer == output)
    with pytest.raises(InvalidSchedule, match="leak"):
        referee(program, made.machine, without(free))
    late = without()
    lost = type(late)(program=late.program, instructions=(*late.instructions, Free(output, 1)), homes=late.homes)
    with pytest.raises(InvalidSchedule, match="home"):
        referee(program, made.machine, lost)
    referee(program, made.machine, late)


def net() -> nn.Sequential:
    """Convolutions with normalisation and activation."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Hardswish(), nn.Flatten(),
                         nn.Linear(576, 10)).eval()  # fmt: skip


IMAGE = (torch.randn(1, 3, 16, 16),)


def test_ops_join_as_a_vector_unit_takes_them():
    """A convolution with its normalisation and activation is one op; without the pass, each is its own."""
    made = memplan.map_model(net(), "M_P", IMAGE)
    assert [op.target.split("+")[0] for op in made.mapping.fused.program.ops] == [
        "aten.convolution.default", "aten.convolution.default", "aten.addmm.default"]  # fmt: skip
    assert len(made.mapping.fused.program.ops[0].target.split("+")) == 3
    apart = Fuse(weights=True, vector=False)(made.captured.program)
    assert [op.target for op in apart.program.ops] == [op.target for op in made.captured.program.ops]
    assert len(apart.origin) == len(made.captured.program.buffers)


def test_a_value_read_twice_is_not_swallowed():
    """Its second reader would look for it in vain."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y.relu() + y

    made = memplan.map_model(Twice().eval(), "M_P", IMAGE)
    assert len(made.mapping.fused.program.ops) == 3


def test_a_result_that_is_only_returned_is_not_swallowed():
    """The other result of the op before is joined with its reader; this one is an output."""

    class Pool(nn.Module):
        def forward(self, x):
            pooled, where = nn.functional.max_pool2d(x, 2, return_indices=True)
            return pooled.relu(), where

    made = memplan.map_model(Pool().eval(), "M_P", IMAGE)
    assert len(made.mapping.fused.program.ops) == 1
    found = made.run(*IMAGE)
    assert all(torch.equal(one, other) for one, other in zip(found, Pool()(*IMAGE), strict=True))


def test_a_model_in_training_mode_is_refused():
    """Its normalisation would change statistics that a mapping does not store."""
    with pytest.raises(memplan.MemplanError, match="evaluation mode"):
        memplan.map_model(net().train(), "M_P", IMAGE)


def test_sizes_of_the_paper():
    """The largest op, the smallest peak, and halfway; with 8 bits a quarter of it all."""
    made, small = (memplan.map_model(net(), "M_R", IMAGE, bits=bits) for bits in (None, 8))
    sizes = made.mapper.landmarks
    assert sizes["M_R"] == 3 * 16 * 16 * 4 + 8 * 14 * 14 * 4
    assert sizes["M_H"] == (sizes["M_R"] + sizes["M_P"]) // 2
    assert {name: size // 4 for name, size in sizes.items()} == small.mapper.landmarks
    assert small.mapping.compulsory * 4 == made.mapping.compulsory


def test_one_byte_less_names_the_op():
    made = memplan.map_model(net(), "M_R", IMAGE)
    least = made.mapper.landmarks["M_R"]
    with pytest.raises(BudgetError, match=r"relu \(aten.convolution.default, in 0\): it needs") as caught:
        made.mapper.map(least - 1)
    assert caught.value.minimum == least


def test_without_addresses_it_says_how_many_bytes_are_enough(monkeypatch):
    """Where nothing is found by address, the number it names has been tried."""
    made = memplan.map_model(net(), "M_P", IMAGE)
    real, least = Mapper.schedule, made.mapper.landmarks["M_P"]
    monkeypatch.setattr("memplan.planner.pipeline.mapping.solve_placed", lambda *args: Answer(Status.UNKNOWN, 0))

    def short(self, mapped, room, *rest):
        return real(self, mapped, room, *rest) if room > least else None

    monkeypatch.setattr(Mapper, "schedule", short)
    with pytest.raises(BudgetError, match="are enough") as caught:
        made.mapper.map(least)
    assert caught.value.minimum is not None
    assert made.mapper.map(caught.value.minimum).noncompulsory == 0


def test_a_model_that_computes_nothing():
    made = memplan.map_model(nn.Flatten().eval(), "1KiB", (torch.ones(2, 3),))
    assert (made.mapping.noncompulsory, made.mapping.least_time, made.run(torch.ones(2, 3)).sum()) == (0, 0.0, 6)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scratchpad": "M_X"}, BudgetError, "M_R, M_H, M_P"),
        ({"scratchpad": "50%"}, BudgetError, "M_R, M_H, M_P"),
        ({"scratchpad": 64}, BudgetError, "needs"),
        ({"machine": "h100"}, MachineError, "no machine"),
        ({"machine": "rtx4090"}, None, ""),
        ({"bits": 7}, memplan.MemplanError, "8, 16, 32"),
    ],
)
def test_wrong_arguments(options, error, said):
    options = {"scratchpad": "M_R", **options}
    if error is None:
        assert memplan.map_model(net(), options.pop("scratchpad"), IMAGE, **options).mapping.machine.name == "rtx4090"
        return
    with pytest.raises(error, match=said):
        memplan.map_model(net(), options.pop("scratchpad"), IMAGE, **options)


def main(words: list[str]) -> int:
    """The command's exit status."""
    try:
        cli.main(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


FILE = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), (torch.randn(1, 3, 16, 16),)
"""


def test_the_command(tmp_path, capsys):
    """JSON has what the contract says; files are written; a run has the model's numbers."""
    (tmp_path / "net.py").write_text(FILE)
    model, text, code, picture = (str(tmp_path / name) for name in ("net.py:make", "a.txt", "a.json", "a.png"))
    assert not main(["map", model, "--scratchpad", "M_R", "--run", "-o", text, "--png", picture, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert {"scratchpad", "compulsory", "noncompulsory", "lower_bound", "status", "seconds", "baselines"} <= facts.keys()
    assert facts["equal"] is True
    assert facts["counted"] == sum(facts["moved"].values()) == facts["compulsory"] + facts["noncompulsory"]
    assert facts["counted_time"] == pytest.approx(facts["time"], rel=1e-12)
    assert "EXEC" in (tmp_path / "a.txt").read_text()
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert not main(["map", model, "--scratchpad", "1MiB", "--weights", "--bits", "8", "-o", code])
    assert json.loads((tmp_path / "a.json").read_text())["code"][0]["do"] == "copy"
    assert "proven fewest" in capsys.readouterr().out
    assert main(["map", model, "--scratchpad", "1KiB", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["minimum_budget"] == facts["sizes"]["M_R"]
    assert main(["map", model, "--scratchpad", "much"]) == 2


def test_a_saved_mapping_is_a_plan(tmp_path, capsys):
    """`show` and `check` read it, with the moves on lanes of their own; it is not for `Plan.apply`."""
    (tmp_path / "net.py").write_text(FILE)
    saved, picture = tmp_path / "map.json", tmp_path / "map.png"
    assert not main(["map", f"{tmp_path / 'net.py'}:make", "--scratchpad", "M_R", "--save", str(saved), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert not main(["check", str(saved), "--json"])
    checked = json.loads(capsys.readouterr().out)
    assert (checked["peak"], checked["time"], checked["moved"]) == (facts["peak"], facts["time"], facts["moved"])
    assert not main(["show", str(saved), "--png", str(picture), "--trace", str(tmp_path / "t.json"), "--text", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["budget"] == facts["scratchpad"]
    assert "start" in shown["text"]
    assert picture.stat().st_size > 10_000
    names = {event.get("name") for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert any("input" in str(name) for name in names)
    made = memplan.load(saved)
    with pytest.raises(MemplanError, match=r"map_model\(model, ...\).run"):
        made.apply(nn.Identity())


def test_landmarks_are_those_of_the_problem():
    """The largest op, and the peak of the best order."""
    problem = Residency((1, 2, 3, 4), ((0,), (1,), (2, 1)), ((1,), (2,), (3,)), 0, (3,))
    assert peaks(problem) == (9, 9)

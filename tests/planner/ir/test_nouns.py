"""What a program and a machine may be, how sizes are read, and what a plan counts."""

import doctest
import random

import msgspec
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memplan.passes.transfers import Transfers
from memplan.planner.ir.errors import BudgetError, InvalidSchedule, MachineError, MemplanError
from memplan.planner.ir.machine import Link, Machine, load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import check_levers
from memplan.planner.ir.units import parse_bytes
from memplan.planner.pipeline.planner import Planner
from strategies import ROOMY, events_of_program, make_program, scramble

OP = Op("relu", "relu", "relu", Phase.FORWARD, (0,), (1,), reuse=((1, 0),))
PROGRAM = Program("tiny", (Buffer("x", 8, Kind.INPUT), Buffer("y", 8, Kind.OUTPUT)), (OP,), (1,))


@pytest.mark.parametrize(
    "change",
    [
        {"workspace": -1}, {"seconds": -1.0}, {"seconds": float("nan")}, {"seconds": float("inf")}, {"flops": -1.0},
        {"traffic": -1}, {"reuse": ((0, 0),)}, {"reuse": ((1, 1),)}, {"reads": (2,)}, {"writes": (0,)},
    ],
    ids=str,
)  # fmt: skip
def test_a_program_with_a_figure_that_cannot_be_is_refused(change):
    """Of an op; and an op writes in place only what it writes, over what it reads."""
    PROGRAM.verify()
    with pytest.raises(ValueError, match=r"relu|y"):
        msgspec.structs.replace(PROGRAM, ops=(msgspec.structs.replace(OP, **change),)).verify()


def test_a_buffer_of_less_than_no_bytes_is_refused():
    """Nor can one make room."""
    with pytest.raises(ValueError, match="x has -8 bytes"):
        msgspec.structs.replace(PROGRAM, buffers=(Buffer("x", -8, Kind.INPUT), PROGRAM.buffers[1])).verify()


MACHINE = load_machine("h100-80gb")


def changed(part: str, **change: object) -> Machine:
    """The machine with its first tier, unit or link changed."""
    first, *rest = getattr(MACHINE, part)
    return msgspec.structs.replace(MACHINE, **{part: (msgspec.structs.replace(first, **change), *rest)})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    ("part", "name"), [("tiers", "bandwidth"), ("units", "launch"), ("units", "efficiency"), ("links", "bandwidth"),
                       ("links", "latency"), ("links", "load"), ("links", "duplex")]
)  # fmt: skip
def test_a_machine_of_impossible_figures_is_refused(part, name, wrong):
    """Not a number, endless and negative ones."""
    MACHINE.verify()
    with pytest.raises(MachineError):
        changed(part, **{name: wrong}).verify()


def test_a_machine_of_two_tiers_of_one_name_or_of_endless_flops_is_refused():
    """A name must say which tier."""
    with pytest.raises(MachineError, match="two tiers"):
        msgspec.structs.replace(MACHINE, tiers=(MACHINE.tiers[0], MACHINE.tiers[0])).verify()
    with pytest.raises(MachineError, match="flops"):
        changed("units", flops={"default": float("nan")}).verify()


@pytest.mark.parametrize(
    ("text", "size"),
    [("9007199254740993B", 9007199254740993), (np.int64(5), 5), ("16GiB", 16 << 30), ("1.5kb", 1500), ("60%", 600),
     (5e8, 5 * 10**8), (".5 KiB", 512), (2**62, 2**62)],
)  # fmt: skip
def test_sizes_are_read_exactly(text, size):
    """However they are written."""
    assert parse_bytes(text, of=1000) == size


NO_SIZES = {
    "endless suffix": "9" * 400 + "GiB", "endless digits": "9" * 5000, "endless int": 10**5000, "one too many": 2**62 + 1,
    "huge": 1e300, "exponent": "1e3", "nan": float("nan"), "bool": True, "none": None, "list": [1],
}  # fmt: skip


@pytest.mark.parametrize("case", NO_SIZES)
def test_sizes_that_cannot_be_are_refused_in_one_short_line(case):
    """It says what the size is for."""
    with pytest.raises(BudgetError, match="capacity") as caught:
        parse_bytes(NO_SIZES[case], what="capacity")
    assert len(str(caught.value)) < 200


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_a_program_is_a_graph_of_networkx(seed, forward):
    """Every read of what an op makes lies on one edge, once, with its bytes; and the graph allows the base order."""
    program = make_program(random.Random(seed), forward)
    graph = program.to_networkx()
    read = {(program.producer[buffer], at, buffer)
            for at, op in enumerate(program.ops) for buffer in op.reads if program.producer[buffer] >= 0}  # fmt: skip
    found = [(one, other, buffer) for one, other, buffers in graph.edges.data("buffers") for buffer in buffers]
    assert sorted(found) == sorted(read)
    for _, _, facts in graph.edges.data():
        assert facts["bytes"] == sum(program.buffers[buffer].bytes for buffer in facts["buffers"])
    for at, op in enumerate(program.ops):
        facts = {"name": op.name, "target": op.target, "phase": op.phase.value, "flops": op.flops, "seconds": op.seconds}
        assert graph.nodes[at] == facts
    assert nx.is_directed_acyclic_graph(graph)
    assert list(nx.lexicographical_topological_sort(graph)) == list(range(len(program.ops)))


def test_what_the_graph_of_a_program_looks_like():
    """The docstring's example."""
    tests = doctest.DocTestFinder().find(Program.to_networkx, "to_networkx", globs={})
    assert sum(doctest.DocTestRunner().run(test).failed for test in tests) == 0
    assert tests[0].examples


def test_a_lever_that_does_not_exist_yet_is_refused():
    """It would turn the others off."""
    with pytest.raises(MemplanError, match="'tile' does not exist yet"):
        check_levers("tile")


@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_counts_are_of_what_the_backward_pass_reads(seed, forward, offload):
    """Kept, recomputed and moved together, whatever the schedule."""
    rng = random.Random(seed)
    program = make_program(rng, forward)
    links = (Link("device", "host", 1e4), Link("host", "device", 1e4))
    host = msgspec.structs.replace(ROOMY.tiers[0], name="host")
    machine = msgspec.structs.replace(ROOMY, tiers=(*ROOMY.tiers, host), links=links)
    planner = Planner(program, machine, offload=offload)
    events, tier = events_of_program(planner, scramble(rng, planner, 0.5))
    schedule = Transfers(1 << 50)(program, machine, events, tier, [])
    try:
        report = referee(program, unlimited(machine), schedule)
    except InvalidSchedule:
        return
    side = Side(program, schedule, report)
    plan = Plan(program, machine, None, side, side, "feasible", 0.0, 0.0, 0, 0.0, 0.0, Recipe("", True, False, None))
    late = program.ops[program.boundary :]
    used = {buffer for op in late for buffer in op.reads if 0 <= program.producer[buffer] < program.boundary}
    assert plan.counts.keep + plan.counts.recompute + plan.counts.offload == len(used)

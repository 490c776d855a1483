"""Exports open in the tools that they are for, and add up."""

import json
import pickle
import pickletools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from memplan.backends.report import exports
from memplan.planner.ir.machine import load_machine
from memplan.planner.ir.plan import Plan, Recipe, Side, unlimited
from memplan.planner.ir.program import Buffer, Kind, Op, Phase, Program
from memplan.planner.ir.referee import referee
from memplan.planner.ir.schedule import Free, Placement, Run, Schedule, Start, Wait

MIB = 1 << 20


@pytest.fixture
def plan() -> Plan:
    """A net of two layers whose first activation is made again and whose second one goes to the host and back."""
    kinds = [
        ("w<0>", Kind.PARAMETER),
        ("a", Kind.ACTIVATION),
        ("b", Kind.ACTIVATION),
        ("l", Kind.TEMPORARY),
        ("d", Kind.GRADIENT),
    ]
    ops = (
        Op("f0", "aten.mm.default", "f0", Phase.FORWARD, (0,), (1,), seconds=1e-3, where="net.0"),
        Op("f1", "aten.mm.default", "f1", Phase.FORWARD, (1, 0), (2,), seconds=1e-3, workspace=MIB // 2, where="net.1"),
        Op("loss", "loss", "loss", Phase.LOSS, (2,), (3,), repeatable=False),
        Op("g", "aten.mm.default", "g", Phase.BACKWARD, (0, 1, 2, 3), (4,), seconds=3e-3),
    )
    program = Program("net & co", tuple(Buffer(name, MIB, kind) for name, kind in kinds), ops, (4,))
    steps = (
        Run(0, (1,)),
        Run(1, (2,)),
        Free(1),
        Run(2, (3,)),
        Start(2, 0),
        Wait(2, 0),
        Free(2),
        Run(0, (1,)),
        Start(2, 1),
        Wait(2, 1),
        Free(2, 1),
        Run(3, (4,)),
        Free(1),
        Free(2),
        Free(3),
    )
    plain = (Run(0, (1,)), Run(1, (2,)), Run(2, (3,)), Run(3, (4,)), Free(1), Free(2), Free(3))
    machine = load_machine("h100-80gb")
    sides = [
        Side(program, schedule, referee(program, unlimited(machine), schedule))
        for schedule in (Schedule(program.digest, steps), Schedule(program.digest, plain))
    ]
    return Plan(program, machine, 6 * MIB, *sides, "feasible", 0.1, 1e-3, 5 * MIB, 0.1, 0.2, Recipe("{}", True, False, None))


def test_trace_has_each_run_and_copy_where_the_referee_has_it(plan: Plan, tmp_path: Path):
    exports.save_trace(plan, tmp_path / "trace.json")

    events = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["pid"] == 0]
    slices = [event for event in events if event["ph"] == "X"]
    runs = [event for event in slices if event["tid"] == exports.UNIT_TRACK]
    assert [event["cat"] for event in runs] == ["forward", "forward", "loss", "recompute", "backward"]
    starts = [
        start
        for start, step in zip(plan.planned.report.starts, plan.schedule.instructions, strict=True)
        if isinstance(step, Run)
    ]
    assert [event["ts"] / 1e6 for event in runs] == pytest.approx(starts)
    copies = [event for event in slices if event["cat"] == "copy"]
    assert [event["tid"] - exports.LINK_TRACK for event in copies] == [0, 1]
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(plan.time * 1e6)
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert max(sum(values.values()) for values in counters) == plan.peak
    assert [event["name"] for event in slices if event["cat"] == "phase"] == ["forward", "loss", "backward"]


def replayed(trace: list[dict], segment: dict) -> int:
    """The peak that a visualiser sees; checks that blocks live at once do not overlap and lie in the segment."""
    live = {block["address"]: block["size"] for block in segment["blocks"] if block["state"] == "active_allocated"}
    for event in reversed(trace):  # backwards from the final state, as the visualiser does
        if event["action"] == "alloc":
            assert live.pop(event["addr"]) == event["size"]
        elif event["action"] == "free_completed":
            live[event["addr"]] = event["size"]
    used = peak = sum(live.values())
    for event in trace:
        if event["action"] == "alloc":
            address, end = event["addr"], event["addr"] + event["size"]
            assert segment["address"] <= address
            assert end <= segment["address"] + segment["total_size"]
            assert not [other for other, size in live.items() if other < end and address < other + size]
            live[address] = event["size"]
        elif event["action"] == "free_completed":
            del live[event["addr"]]
        used = sum(live.values())
        peak = max(peak, used)
    return peak


def test_snapshot_is_what_torchs_tools_read(plan: Plan, tmp_path: Path):
    from torch.cuda import _memory_viz

    exports.save_snapshot(plan, tmp_path / "s.pickle")

    data = pickle.loads((tmp_path / "s.pickle").read_bytes())
    for trace, segment, side in zip(data["device_traces"], data["segments"], (plan.planned, plan.unplanned), strict=True):
        assert replayed(trace, segment) == side.peak
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert "total_allocated: 4.0MiB" in _memory_viz.segsum(data)  # a parameter and a gradient, twice
    assert "Device 1" in _memory_viz.trace(data)
    assert "Active Memory Timeline" in _memory_viz.trace_plot(data)


def read_as_the_viewer(raw: bytes):
    """A pickle as `unpickle` of torch/utils/viz/MemoryViz.js reads it: these opcodes, and no more."""
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def popped() -> list:
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        return taken

    for opcode, argument, _ in pickletools.genops(raw):
        match opcode.name:
            case "PROTO":
                assert 2 <= argument <= 4
            case "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "LONG1":
                assert -(2**53) < argument < 2**53  # a Number
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE" | "NONE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode.name))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                last = stack.pop()
                stack[-1].append(last)
            case "APPENDS":
                taken = popped()
                stack[-1].extend(taken)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                taken = popped()
                stack[-1].update(zip(taken[::2], taken[1::2], strict=True))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(opcode.name)
                taken = [stack.pop() for _ in range(count)]
                stack.append(taken[::-1])
            case "TUPLE":
                stack.append(popped())
            case "STOP":
                return stack.pop()
            case other:
                raise AssertionError(f"the viewer does not know the opcode {other}")
    raise AssertionError("no STOP")


def test_snapshot_opens_in_the_viewer(plan: Plan, tmp_path: Path):
    """The viewer's own reader, which knows few opcodes, gets what Python does, and every field that it then looks at."""
    exports.save_snapshot(plan, tmp_path / "s.pickle")

    raw = (tmp_path / "s.pickle").read_bytes()
    data = read_as_the_viewer(raw)
    assert data == pickle.loads(raw)
    for device, trace in enumerate(data["device_traces"]):
        for event in trace:
            assert event["action"] in {"alloc", "free_requested", "free_completed"}
            assert all(type(event[key]) is int for key in ("addr", "size", "stream", "time_us"))
            for frame in event["frames"]:  # its filter asks each string what it includes
                assert (type(frame["name"]), type(frame["filename"]), type(frame["line"])) == (str, str, int)
        (segment,) = (one for one in data["segments"] if one["device"] == device)
        address = segment["address"]
        for block in segment["blocks"]:  # the viewer adds up sizes for addresses
            assert block["address"] == address
            assert block["state"] in {"active_allocated", "inactive"}
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
    kinds = {event["frames"][0]["filename"] for trace in data["device_traces"] for event in trace}
    assert kinds >= {"activation", "recomputed", "gradient"}


def test_snapshot_refuses_what_the_viewer_cannot_read(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A value that needs a class is an error here, not a page that stays empty there; and no file is made of it."""
    monkeypatch.setattr(exports, "snapshot", lambda plan: {"segments": [Kind.GRADIENT]})
    with pytest.raises(TypeError, match="PyTorch's viewer cannot read"):
        exports.save_snapshot(plan, tmp_path / "s.pickle")
    assert not list(tmp_path.iterdir())


def test_snapshot_keeps_planned_addresses(plan: Plan):
    places = (Placement(0, 0, 0, 0, 15), Placement(1, 0, 4 * MIB, 0, 3))
    side = Side(plan.program, msgspec.structs.replace(plan.schedule, placements=places), plan.planned.report)

    data = exports.snapshot(replace(plan, planned=side))

    firsts = [event["addr"] - exports.BASE for event in data["device_traces"][0] if event["frames"][0]["name"] == "a"]
    assert firsts[0] == 4 * MIB


class Checked(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_escaped_page(plan: Plan, tmp_path: Path):
    exports.save_html(plan, tmp_path / "r.html")

    page = (tmp_path / "r.html").read_text()
    checked = Checked()
    checked.feed(page)
    assert checked.open == []
    assert "<w" not in page
    assert "w&lt;0&gt;" in page
    assert "net &amp; co" in page
    assert not re.search(r"(src|href)=.https?:", page)  # nothing is loaded from elsewhere
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])

"""Files of buffers: what is read, what is refused, and `memplan alloc` on them."""

import json
import subprocess
import sys

import pytest
from memplan.planner.cli import app as cli
from memplan.planner.ir import bufferfile as trace
from memplan.planner.ir.bufferfile import read_trace, write_trace
from memplan.planner.ir.errors import PlacementError, TraceError
from memplan.planner.pipeline.storage import approve

GOOD = "id,lower,upper,size\na,0,3,4\nb,3,9,4\nc,0,9,4\nd,9,21,4\ne,0,21,4\n"
HEAD = "id,lower,upper,size\n"
POOLS = "id,lower,upper,size,pool\na,0,3,4,fast\nb,0,3,4,fast\nc,0,3,4,slow\n"
REUSE = "id,lower,upper,size,reuse\n"
BAD = {
    "": "row 1: no column 'id'",
    "id,lower,upper\n": "row 1: no column 'size'",
    "id,id,lower,upper,size\n": "row 1: two columns are called 'id'",
    HEAD + "a,0,3\n": "row 2, column 4: 3 cells",
    HEAD + "a,0,3,4,5\n": "row 2, column 5: 5 cells",
    HEAD + "a,-1,3,4\n": "row 2, column lower: -1 is negative",
    HEAD + "a,0,3,4\nb,5,5,4\n": "row 3, column upper: the lifetime [5, 5) is empty",
    HEAD + "a,7,5,4\n": "row 2, column upper: the lifetime [7, 5)",
    HEAD + "a,0,3,0\n": "row 2, column size: 0",
    HEAD + "a,0,3,-4\n": "row 2, column size: -4 is negative",
    HEAD + "a,0,3,4.5\n": "row 2, column size: '4.5' is not a whole number",
    HEAD + "a,0,3,\n": "row 2, column size: '' is not a whole number",
    HEAD + "a,0,3,\u0664\n": "row 2, column size: '\u0664' is not a whole number",
    HEAD + "a,0,3,9223372036854775808\n": "row 2, column size: 9223372036854775808 is larger than 2^63 - 1",
    HEAD + "a,0," + "9" * 500 + ",1\n": "is larger than 2^63 - 1",
    HEAD + "a,0,3,4000000000000000000\nb,5,6,4000000000000000000\n": "row 3, column size: all sizes",
    HEAD + "a,0,3,4\na,3,4,4\n": "row 3, column id: 'a' is the id of row 2",
    "id,lower,upper,size,gaps\na,0,9,4,3\n": "row 2, column gaps: '3': write gaps as",
    "id,lower,upper,size,gaps\na,0,9,4,3-12\n": "row 2, column gaps: the gap [3, 12)",
    "id,lower,upper,size,gaps\na,0,9,4,0-9\n": "row 2, column gaps: the gaps leave nothing",
    "id,lower,upper,size,pin\na,0,9,4,x\n": "row 2, column pin: 'x' is not",
    REUSE + "a,0,9,4,b\n": "row 2, column reuse: no buffer is called 'b'",
    REUSE + "a,0,5,4,\nb,4,9,4,a\nc,4,9,4,a\n": "row 4, column reuse: 'a' is reused by 'b' already",
    REUSE + "a,0,5,5,\nb,4,9,4,a\n": "row 3, column reuse: 'a' takes 5 bytes, not 4",
    REUSE + "a,0,5,4,\nb,0,9,4,a\n": "row 3, column reuse: 'a' is live from 0 to 5",
    REUSE + "a,0,5,4,\nb,2,4,4,a\n": "row 3, column reuse: 'a' is live from 0 to 5",
    REUSE + "a,0,5,4,a\n": "row 2, column reuse: 'a' is live from 0 to 5",
    "id;lower;upper;size\na;0;3;4\n": "row 1: the columns are separated by semicolons: write commas",
    "id\tlower\tupper\tsize\n": "row 1: the columns are separated by tabs: write commas",
    "buffer,lower,upper,size\n": "the columns are buffer, lower, upper, size; 'buffer' may be it: rename it",
    "id,start,end,size\n": "no column 'lower'; the columns are id, start, end, size; 'start' may be it: rename it",
    "id,lower,end,size\n": "'end' may be it: rename it, and make it the first time at which the buffer is not live",
    "id,lower,upper,Size,size\n": "row 1: two columns are called 'size'",
    "id,lower,upper,size,start\na,0,3,4,1\n": "row 2, column start: 'start' is not supported: leave it or lower out",
    "id,lower,upper,size,hint\na,0,3,4,\nb,0,3,4,0\n": "row 3, column hint: 'hint' is not supported: fix the buffer there",
    "id,lower,upper,size,Window\na,0,3,4,0:2\n": "row 2, column Window: 'window' is not supported: leave the column out",
    "id,lower,upper,size,within\na,0,3,4,9\n": "row 2, column within: 'within' is not supported",
    "id,lower,upper,size,capacity\na,0,3,4,9\n": "row 2, column capacity: 'capacity' is not supported: give --capacity",
    "id,lower,upper,size,align\na,0,3,4,8\n": "row 2, column align: 'align' is not supported: call it alignment",
    "id,lower,upper,size,address\na,0,3,4,8\n": "row 2, column address: 'address' is not supported: call it pin where",
    "id,lower,upper,size,memory\na,0,3,4,0\n": "row 2, column memory: 'memory' is not supported: call it pool",
    "id,lower,upper,size,\na,0,3,4,5\n": "row 2, column 5: a cell in a column without a name",
    "id,lower,upper,size,alignment\na,0,9,3,1\nb,0,5,4,8\n": "'b' is to lie at a multiple of 8, another of 1, and all "
    "buffers of a pool are aligned alike: --align 8 is enough",
    "id,lower,upper,size,alignment\na,0,9,3,0\n": "row 2, column alignment: 0: write 1",
    "id,lower,upper,size,alignment\na,0,9,3,x\n": "row 2, column alignment: 'x' is not a whole number",
    "id,lower,upper,size,pin,offset\na,0,9,4,8,0\n": "row 2, column offset: 0, where the column pin says 8",
    "id,lower,upper,size,offset\na,0,9,4,-1\n": "row 2, column offset: -1 is negative",
    "id,lower,upper,size,gaps\na,0,9,4,3-5@0:2\n": "row 2, column gaps: '3-5@0:2': a gap frees all of a buffer's bytes or none",
    HEAD + "a,0,3,0x10\n": "row 2, column size: '0x10' is not a whole number",
    HEAD + "a,0,3,+4\n": "row 2, column size: '+4' is not a whole number",
    HEAD + "a,0,3,1_0\n": "row 2, column size: '1_0' is not a whole number",
    HEAD + "a,0,3,4,\n": "row 2, column 5: 5 cells",
    "id,lower,upper,size,pool,reuse\na,0,5,4,x,\nb,4,9,4,y,a\n": "row 3, column reuse: 'a' lies in the pool 'x'",
}  # fmt: skip


def call(capsys, *words):
    """Exit status, standard output and standard error of a command."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as ended:
        printed = capsys.readouterr()
        return ended.code, printed.out, printed.err
    printed = capsys.readouterr()
    return 0, printed.out, printed.err


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_named_by_row_and_column(tmp_path, capsys, text):
    """One line, status 1, no traceback."""
    path = tmp_path / "in.csv"
    path.write_text(text, encoding="utf-8")
    status, out, err = call(capsys, "alloc", path)
    assert (status, out) == (1, "")
    assert BAD[text] in err
    assert err.count("\n") == 1
    assert len(err) < 400 + len(str(path))


def test_a_file_that_is_no_text(tmp_path):
    """Bytes are refused as such."""
    path = tmp_path / "in.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not a text file"):
        read_trace(path)


def test_too_many_rows(tmp_path, monkeypatch):
    """Reading stops at the limit."""
    monkeypatch.setattr(trace, "MOST_ROWS", 3)
    path = tmp_path / "in.csv"
    path.write_text(GOOD)
    with pytest.raises(TraceError, match="row 5: more than 3 buffers"):
        read_trace(path)


def test_alloc_places_minimallocs_example(tmp_path, capsys):
    """The five buffers of its README fit 12 bytes; the file comes back with offsets, and can be read again."""
    (tmp_path / "in.csv").write_text(GOOD)
    words = ("alloc", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--png", tmp_path / "p.png", "--json")
    status, out, err = call(capsys, *words)
    assert status == 0
    assert "warning" not in err
    facts = json.loads(out)
    assert (facts["peak"], facts["lower_bound"], facts["status"]) == (12, 12, "optimal")
    assert (tmp_path / "out.csv").read_text().startswith("id,lower,upper,size,offset\na,0,3,4,")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.warns(UserWarning, match="the column offset fixes 5 of 5 buffers where they lie"):
        again = read_trace(tmp_path / "out.csv")
    write_trace(tmp_path / "again.csv", again, [int(row[-1]) for row in again.rows])
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()


@pytest.mark.parametrize(
    ("text", "words", "reason"),
    [
        (GOOD, ("--capacity", "11"), "at time 0 the 3 live buffers take 12 bytes, the capacity is 11; the largest are 'a' 4"),
        (HEAD + "a,0,3,5\nb,1,4,5\n", ("--align", "4", "--capacity", "12"), "the 2 live buffers, aligned to 4, take 13 bytes"),
        ("id,lower,upper,size,pin\na,1,3,9,0\nb,2,4,5,6\n", (), "'a' and 'b' are pinned to the same bytes"),
        ("id,lower,upper,size,pin\na,1,3,9,8\n", ("--capacity", "16"), "'a' is pinned to end at 17"),
        (REUSE + "a,0,5,4,\nb,4,9,4,a\nc,4,9,1,\n", ("--capacity", "4"), "at time 4 the 2 live buffers take 5 bytes"),
        (POOLS, ("--capacity", "fast=7"), "pool 'fast': at time 0 the 2 live buffers take 8 bytes, the capacity is 7"),
    ],
)
def test_what_cannot_be_placed_is_shown(tmp_path, capsys, text, words, reason):
    """Status 3 and the buffers and time that prove it, also in JSON."""
    (tmp_path / "in.csv").write_text(text)
    status, out, err = call(capsys, "alloc", tmp_path / "in.csv", *words, "--json")
    assert status == 3
    assert json.loads(out)["status"] == "infeasible"
    assert reason in err
    assert reason in json.loads(out)["reason"]


@pytest.mark.parametrize("method", ["auto", "cp-sat", "mip"])
def test_every_solver_places_the_example(tmp_path, capsys, method):
    """The three are behind one command, and agree."""
    (tmp_path / "in.csv").write_text(GOOD)
    status, out, _ = call(capsys, "alloc", tmp_path / "in.csv", "--method", method, "--json")
    assert (status, json.loads(out)["peak"], json.loads(out)["status"]) == (0, 12, "optimal")


def test_alignment_and_pins(tmp_path, capsys):
    """Offsets are multiples; a pin that is none is refused."""
    (tmp_path / "in.csv").write_text("id,lower,upper,size,pin\na,0,2,3,\nb,0,2,3,4\n")
    status, out, _ = call(capsys, "alloc", tmp_path / "in.csv", "--align", 4, "--json")
    assert (status, json.loads(out)["peak"]) == (0, 7)
    status, _, err = call(capsys, "alloc", tmp_path / "in.csv", "--align", 8)
    assert status == 1
    assert "pinned at 4, which is no multiple of 8" in err


ALIGNED = "id,lower,upper,size,alignment\na,0,9,3,{}\nb,0,5,4,{}\nc,3,9,2,{}\nd,0,9,1,{}\n"


@pytest.mark.parametrize("method", ["auto", "cp-sat", "mip"])
@pytest.mark.parametrize(
    ("own", "words", "aligned"),
    [
        ((8, 8, 8, 8), (), 8),
        ((1, 8, 4, 1), ("--align", 8), 8),
        (("", 8, 4, 2), ("--align", 16), 16),
        ((6,) * 4, ("--align", 4), 12),
    ],
)
def test_a_column_of_alignments_is_kept(tmp_path, capsys, own, words, aligned, method):
    """By every solver: what all buffers want alike, or what --align is a multiple of; the offsets are those of a plain file
    under that alignment."""
    (tmp_path / "in.csv").write_text(ALIGNED.format(*own))
    status, out, err = call(
        capsys, "alloc", tmp_path / "in.csv", "--method", method, "-o", tmp_path / "o.csv", "--json", *words
    )
    assert (status, err) == (0, "")
    offsets = [int(row.split(",")[-1]) for row in (tmp_path / "o.csv").read_text().splitlines()[1:]]
    assert all(offset % aligned == 0 for offset in offsets)
    (tmp_path / "plain.csv").write_text("\n".join(",".join(row.split(",")[:4]) for row in ALIGNED.splitlines()))
    _, plain, _ = call(capsys, "alloc", tmp_path / "plain.csv", "--method", method, "--align", aligned, "--json")
    assert json.loads(out)["peak"] == json.loads(plain)["peak"]
    with pytest.raises(PlacementError, match="was put at 4"):
        approve(read_trace(tmp_path / "in.csv"), [0, 4, 8, 12], 1)


@pytest.mark.filterwarnings("always")
def test_offsets_are_fixed_places(tmp_path, capsys):
    """As in MiniMalloc: a cell fixes its buffer, an empty one does not; what came out of here is checked when it goes in."""
    (tmp_path / "in.csv").write_text("id,lower,upper,size,offset\na,0,3,4,8\nb,0,3,4,\n")
    status, out, err = call(capsys, "alloc", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--json")
    assert (status, json.loads(out)["peak"]) == (0, 12)
    assert "the column offset fixes 1 of 2 buffers where they lie: leave it out" in err
    assert (tmp_path / "out.csv").read_text().startswith("id,lower,upper,size,offset\na,0,3,4,8\nb,0,3,4,")
    status, again, _ = call(capsys, "alloc", tmp_path / "out.csv", "-o", tmp_path / "again.csv", "--json")
    assert (status, json.loads(again)["peak"]) == (0, 12)
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()
    (tmp_path / "in.csv").write_text("id,lower,upper,size,offset\na,0,3,4,0\nb,2,5,4,2\n")
    status, _, err = call(capsys, "alloc", tmp_path / "in.csv")
    assert status == 3
    assert "'a' and 'b' are pinned to the same bytes, and both are live at time 2" in err


LOOSE = {
    "small and large letters": "\ufeffID,Lower,Upper,SIZE\r\na,0,3,4\r\n\r\nb,0,3,4\r\n",
    "quotes and spaces": '"id", lower ,upper,size\n"a", 0 ,"3",4\n   \nb,0,3,"4"\n',
    "a comma at the end": "id,lower,upper,size,\na,0,3,4,\nb,0,3,4,\n",
    "empty cells": "id,lower,upper,size,hint,align,end\na,0,3,4,,,\nb,0,3,4, ,,\n",
    "another order": "size,upper,lower,id\n4,3,0,a\n4,3,0,b\n",
}


@pytest.mark.parametrize("case", LOOSE)
def test_a_file_may_be_written_loosely(tmp_path, capsys, case):
    """Letters, quotes, byte order marks, line ends, empty rows and empty columns change nothing."""
    (tmp_path / "in.csv").write_bytes(LOOSE[case].encode())
    status, out, err = call(capsys, "alloc", tmp_path / "in.csv", "--json")
    assert (status, err) == (0, "")
    assert (json.loads(out)["peak"], json.loads(out)["buffers"]) == (8, 2)


@pytest.mark.filterwarnings("always")
def test_columns_that_mean_nothing_are_told_of(tmp_path, capsys):
    """Once, by name, on standard error; they come out again as they were. So is a row that looks like a comment."""
    (tmp_path / "in.csv").write_text("id,layer,lower,upper,size,Colour\na,1,0,3,4,red\n#b,2,0,3,4,\n")
    status, out, err = call(capsys, "alloc", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--json")
    assert (status, json.loads(out)["peak"]) == (0, 8)
    assert err.count("of the columns layer, Colour nothing is read; they are carried over") == 1
    assert "begins with # is a buffer as any other" in err
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "id,layer,lower,upper,size,Colour,offset"
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("a,1,0,3,4,red,")


def test_each_pool_is_a_memory_of_its_own(tmp_path, capsys):
    """Peaks by pool, and a capacity for one of them or for all."""
    (tmp_path / "in.csv").write_text(POOLS)
    words = ("alloc", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--png", tmp_path / "p.png", "--json")
    status, out, _ = call(capsys, *words, "--capacity", "fast=8")
    facts = json.loads(out)
    assert (status, facts["peak"], facts["lower_bound"], facts["status"]) == (0, 12, 12, "optimal")
    pools = {name: (pool["peak"], pool["capacity"]) for name, pool in facts["pools"].items()}
    assert pools == {"fast": (8, 8), "slow": (4, None)}
    assert (tmp_path / "out.csv").read_text().splitlines()[3] == "c,0,3,4,slow,0"
    unreadable = "cannot read the capacity"
    for wrong, code, why in (("quick=8", 1, "the pool 'quick'"), ("=8", 2, unreadable), ("8,9", 2, unreadable)):
        status, _, err = call(capsys, *words, "--capacity", wrong)
        assert (status, err.count("\n")) == (code, 1)
        assert why in err


def test_what_is_written_in_place_shares_bytes(tmp_path, capsys):
    """A chain needs the room of one; the check lets only that pair lie on the same bytes, and only whole."""
    (tmp_path / "in.csv").write_text(REUSE + "a,0,3,4,\nb,2,5,4,a\nc,4,9,4,b\nd,0,9,1,\n")
    status, out, _ = call(capsys, "alloc", tmp_path / "in.csv", "--json")
    facts = json.loads(out)
    assert (status, facts["peak"], facts["method"].split(",")[0]) == (0, 5, "2 of 2 in place")
    read = read_trace(tmp_path / "in.csv")
    approve(read, [0, 0, 0, 4], 1)
    approve(read, [0, 4, 4, 8], 1)
    for offsets in ([0, 2, 2, 8], [0, 0, 2, 8], [0, 0, 0, 3]):
        with pytest.raises(PlacementError):
            approve(read, offsets, 1)


def test_wrong_addresses_are_not_let_out(tmp_path):
    """The check of an answer fails for each kind of fault."""
    (tmp_path / "in.csv").write_text(GOOD)
    read = read_trace(tmp_path / "in.csv")
    approve(read, [8, 8, 4, 4, 0], 4)
    for offsets in ([8, 8, 4, 4, 4], [8, 8, 4, 6, 0], [8, 8, 4, 4, -4]):
        with pytest.raises(PlacementError):
            approve(read, offsets, 4)


def test_alloc_does_not_load_torch(tmp_path):
    """Placing buffers is for programs that have no torch, and starts at once."""
    (tmp_path / "in.csv").write_text(GOOD)
    said = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    code = f"{said}; from memplan.planner.cli.app import main; main()"
    words = [sys.executable, "-c", code, "alloc", str(tmp_path / "in.csv")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"

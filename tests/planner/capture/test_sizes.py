"""Captures with symbolic sizes: the program at other sizes is that of a capture there, or the sizes are not served."""

from functools import cache

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.planner.capture import sized as sized_room
from memplan.planner.capture.capture import Captured, capture
from memplan.planner.capture.sized import difference
from memplan.planner.capture.sizedcheck import check_against
from memplan.planner.ir.errors import CaptureError
from size_cases import FIXED, NAMES, REFUSED, SERVED, Case
from torch import nn

CASES = SERVED | FIXED


@cache
def traced(name: str) -> tuple[nn.Module, Captured]:
    """A model and its capture with symbols, made once."""
    case = CASES[name]
    model = case.model()
    return model, capture(model, (), case.inputs(case.base), dynamic=case.dynamic)


def at(case: Case, model: nn.Module, sizes: tuple[int, ...]) -> Captured:
    """An independent capture for one shape."""
    return capture(model, (), case.inputs(sizes))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1)
@given(data=st.data())
def test_the_program_is_that_of_a_capture_at_these_sizes(name: str, data: st.DataObject):
    """Op for op, with all literals, bytes, FLOPs and scratch space, wherever the trace holds."""
    case, (model, captured) = SERVED[name], traced(name)
    sizes = tuple(data.draw(st.integers(2, 15), label=label) for label in captured.sized.names)

    if captured.sized.holds(sizes):
        assert check_against(captured, at(case, model, sizes)) == sizes


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_served(name: str):
    """A trace that holds for its own sizes alone would pass every test above."""
    case, (_, captured) = SERVED[name], traced(name)

    assert captured.sized.holds(case.base)
    assert captured.sized.holds(tuple(size + 2 for size in case.base)), captured.sized.holds.told


@pytest.mark.parametrize("name", FIXED)
def test_the_example_is_one_of_them(name: str):
    """At its sizes the program is that of a capture for one shape."""
    case, (model, captured) = CASES[name], traced(name)

    assert not difference(captured.program, at(case, model, case.base).program)


@pytest.mark.parametrize("name", FIXED)
def test_sizes_that_become_numbers_of_python_do_not_vary(name: str):
    """Each with a trace of its own, as without symbols."""
    case, (_, captured) = FIXED[name], traced(name)

    assert captured.sized.holds(case.base)
    assert not captured.sized.holds((*case.base[:1], *(size + 1 for size in case.base[1:])))


@pytest.mark.parametrize("name", REFUSED)
def test_what_symbols_cannot_do_is_refused(name: str):
    """In one line, so that the caller traces for each shape."""
    case, message = REFUSED[name]

    with pytest.raises(CaptureError, match=message):
        capture(case.model(), (), case.inputs(case.base), dynamic=case.dynamic)


def test_a_question_about_a_size_holds_on_its_side():
    """A branch at a length of 10."""
    case = Case(
        lambda m, x: (m.a(x) if x.shape[1] > 10 else m.b(x)).sum(), lambda: {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    )
    sized = capture(case.model(), (), case.inputs(case.base), dynamic=case.dynamic).sized

    assert [sized.holds((3, length)) for length in (2, 10, 11, 500)] == [False, False, True, True]
    assert "length > 10" in sized.holds.told


def test_a_question_about_values_is_asked_again():
    """Positions: what depends on a size alone is computed with other sizes."""
    case = Case(lambda m, x: (m.a(x) * (2 if bool((torch.arange(x.shape[1]) < 20).all()) else 3)).sum())
    sized = capture(case.model(), (), case.inputs(case.base), dynamic=case.dynamic).sized

    assert [sized.holds((3, length)) for length in (2, 20, 21)] == [True, True, False]


def test_values_that_are_written_over_are_forgotten():
    """A question about them then depends on data."""

    def run(m, x):
        place = torch.arange(x.shape[1])
        place += x[0, :, 0].long()
        return (m.a(x) * (2 if bool((place < 20).all()) else 3)).sum()

    with pytest.raises(CaptureError, match="takes a number out of a tensor"):
        capture(Case(run).model(), (), Case(run).inputs((4, 12)), dynamic=Case(run).dynamic)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 4), (4, 1), (4,), (4, 4, 4)])
def test_sizes_of_0_and_1_are_never_served(sizes: tuple[int, ...]):
    """Nor too many or too few."""
    assert not traced("mlp")[1].sized.holds(sizes)


def test_a_lost_expression_is_found(monkeypatch: pytest.MonkeyPatch):
    """A pass that forgets that a number depends on a size: the comparison with another capture tells."""
    monkeypatch.setattr(sized_room, "symbolic", lambda leaf: leaf)
    case = Case(lambda m, x: m.a(x).sum(1).unsqueeze(1).expand(-1, x.shape[1], -1).contiguous().div(x.shape[1]).sum())
    model = case.model()
    captured = capture(model, (), case.inputs(case.base), dynamic=case.dynamic)

    with pytest.raises(CaptureError, match=r"another one at .*: key of"):
        check_against(captured, at(case, model, (3, 9)))


def test_a_whole_slice_that_stays_is_found(monkeypatch: pytest.MonkeyPatch):
    """Eager PyTorch leaves it out."""
    monkeypatch.setattr(sized_room, "drop_whole_slices", lambda graph: None)
    case = SERVED["whole slice"]
    model = case.model()
    captured = capture(model, (), case.inputs(case.base), dynamic=case.dynamic)

    with pytest.raises(CaptureError, match="another one at"):
        check_against(captured, at(case, model, (3, 9)))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({}, "names no dimension"),
        ({"y": {0: "batch"}}, "the call has x"),
        ({3: {0: "batch"}}, "no tensor"),
        ({"x": {3: "batch"}}, "dimension 3 of x, which has 3"),
        ({"x": {0: "size", 1: "size"}}, "two sizes 'size', and they are 4 and 12"),
    ],
)
def test_sizes_that_are_not_there_are_refused(dynamic: dict, message: str):
    """Before anything is traced."""
    case = SERVED["mlp"]

    with pytest.raises(CaptureError, match=message):
        capture(case.model(), (), case.inputs(case.base), dynamic=dynamic)


def test_an_example_of_size_1_is_refused():
    """Torch would take it for a number."""
    case = SERVED["mlp"]

    with pytest.raises(CaptureError, match="which is 1"):
        capture(case.model(), (), case.inputs((1, 4)), dynamic=case.dynamic)


def test_what_is_not_dense_is_refused():
    """Its strides would be sizes of their own."""
    with pytest.raises(CaptureError, match=r"pass \.contiguous\(\)"):
        capture(SERVED["mlp"].model(), (torch.randn(4, 20, 8)[:, :12],), dynamic=SERVED["mlp"].dynamic)


def test_one_tensor_given_twice_is_one():
    """With the same names; with others it is refused."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, y):
            return (self.a(x) * y).sum()

    same = torch.randn(4, 4, 8)
    found = capture(Twice(), (same, same), dynamic={"x": {0: "batch"}, "y": {0: "batch"}})
    assert sum(buffer.kind == "input" for buffer in found.program.buffers) == 1
    with pytest.raises(CaptureError, match="otherwise than those of the leaf"):
        capture(Twice(), (same, same), dynamic={"x": {0: "batch"}, "y": {0: "rows"}})


def test_a_call_has_its_sizes():
    """None where one size is two numbers, or a tensor is missing."""
    _, captured = traced("mlp")

    assert captured.sized.of([torch.randn(3, 7, 8)]) == (3, 7)
    assert captured.sized.of([torch.randn(3)]) is None
    assert captured.sized.of([]) is None


def test_the_loss_of_the_caller_has_sizes_too():
    """Its cost is that of a capture at the same sizes."""
    model = nn.Linear(8, 5)

    def loss(out):
        return nn.functional.cross_entropy(out.flatten(0, 1), torch.zeros(out.shape[0] * out.shape[1], dtype=torch.long))

    captured = capture(model, (torch.randn(4, 6, 8),), loss=loss, dynamic={"input": {0: "batch", 1: "length"}})

    assert check_against(captured, capture(model, (torch.randn(3, 9, 8),), loss=loss)) == (3, 9)


def test_nothing_but_pairs_that_agree_by_chance_may_differ():
    """Another capture may write in place where layouts agree at its sizes alone, not elsewhere."""
    model, captured = traced("mlp")
    other = at(SERVED["mlp"], model, (3, 9))
    fewer = tuple(msgspec.structs.replace(op, reuse=()) for op in other.program.ops)
    object.__setattr__(other, "program", msgspec.structs.replace(other.program, ops=fewer))

    with pytest.raises(CaptureError, match="reuse of"):
        check_against(captured, other)

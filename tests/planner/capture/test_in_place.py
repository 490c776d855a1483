"""Kernels that `planner.capture.in_place` writes over an operand give, written so, the bits of the ordinary call."""

import pytest
import torch
from memplan.planner.capture.in_place import ROWWISE, InPlace, in_place_form, out_overload
from torch import fx

ATEN = torch.ops.aten
SHAPES = [(1, 1), (5, 1), (1, 100_000), (7, 33), (64, 1000), (1023, 4097), (8, 4, 256, 256)]
TYPES = [torch.float32, torch.bfloat16, torch.float64]


def written_over(target, args: list, operand: int) -> torch.Tensor:
    """The call with its result written over one of its operands."""
    out = out_overload(target)
    mine = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
    result = out(*mine, **{out._schema.arguments[-1].name: mine[operand]})
    assert result.data_ptr() == mine[operand].data_ptr()
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax_over_its_input(name, shape, dtype):
    """Forward: the input is read row by row before its row is written."""
    torch.manual_seed(0)
    target = getattr(ATEN, name).default
    args = [5 * torch.randn(shape).to(dtype), -1, False]

    assert torch.equal(target(*args), written_over(target, args, 0))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax_backward_over_either_operand(name, shape, dtype):
    """Backward: over the gradient or over the forward's result."""
    torch.manual_seed(0)
    value = getattr(ATEN, name).default(5 * torch.randn(shape).to(dtype), -1, False)
    target = getattr(ATEN, f"{name}_backward_data").default
    args = [torch.randn(shape).to(dtype), value, -1, dtype]
    wanted = target(*args)

    for operand in (0, 1):
        assert torch.equal(wanted, written_over(target, args, operand))


def tanh_over(operand: torch.Tensor, result: torch.Tensor, *others: torch.Tensor) -> InPlace | None:
    """How `tanh` can write a result over its operand; `others` are views of the operand's storage that it reads too."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(1 + len(others))]
    call = graph.call_function(ATEN.tanh.default, (nodes[0],))
    for node, value in zip([*nodes, call], [operand, *others, result], strict=True):
        node.meta["val"] = value
    return in_place_form(call, nodes[0], nodes, dict.fromkeys(nodes, 0))


WHOLE = torch.zeros(4, 6)
REFUSED = {
    "an offset": (torch.zeros(25)[1:].view(4, 6), WHOLE),
    "another layout": (torch.zeros(6, 4).t(), WHOLE),
    "another shape": (torch.zeros(24), WHOLE),
    "another type": (torch.zeros(4, 6, dtype=torch.int32), WHOLE),
    "a part of the storage": (torch.zeros(5, 6)[:4], WHOLE),
    "a result in a part of its storage": (WHOLE, torch.zeros(5, 6)[:4]),
    "a second view of the storage": (WHOLE, torch.zeros(4, 6), WHOLE.view(6, 4)),
    "a conjugate": (torch.zeros(4, 6, dtype=torch.complex64).conj(), torch.zeros(4, 6, dtype=torch.complex64)),
    "a negative": (torch._neg_view(torch.zeros(4, 6)), WHOLE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_written_over(case):
    """Where elements of result and operand would not lie at the same place, or somebody else reads them."""
    assert tanh_over(*REFUSED[case]) is None


def test_what_may():
    """The same layout, whole storages."""
    form = tanh_over(WHOLE, torch.zeros(4, 6))
    assert form is not None
    assert form.target == ATEN.tanh.out


def test_every_kernel_on_the_list_is_tested():
    """Whoever adds a kernel adds a test."""
    assert set(ROWWISE) == {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"}


NUMBER = 0.8862269254527579  # of more digits than 16 bits hold
RANDOM = {"bernoulli", "dropout", "native_dropout", "rrelu_with_noise"}


def calls_of(target, dtype: torch.dtype) -> list | None:
    """Arguments for an operator that works element by element, if they can be made up from its schema."""
    made = []
    for known in target._schema.arguments:
        kind = str(known.type)
        if kind == "Tensor":
            made.append((torch.rand(1003) * 0.8 + 0.1).to(dtype))
        elif known.has_default_value():
            made.append(known.default_value)
        elif kind in ("number", "Scalar", "float"):
            made.append(NUMBER)
        elif kind in ("int", "bool", "str"):
            made.append({"int": 1, "bool": False, "str": "none"}[kind])
        else:
            return None
    return made


def pointwise() -> list:
    """Every operator of torch that works element by element and returns its result."""
    found = []
    for name in sorted(dir(ATEN)):
        packet = getattr(ATEN, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") and not name.startswith("__") else ():
            target = getattr(packet, overload)
            known = torch.Tag.pointwise in target.tags and not target._schema.is_mutable
            if known and name not in RANDOM and str(target._schema.arguments[0].type) == "Tensor":
                found.append(target)
    return found


@pytest.mark.filterwarnings("ignore")  # of operators that torch will give up
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_pointwise_operator_written_over_an_operand_has_its_own_bits(dtype):
    """By the very form that is chosen; `mul_` with a number, for one, rounds the number to 16 bits, and `mul` does not."""
    torch.manual_seed(0)
    tested = set()
    for target in pointwise():
        args = calls_of(target, dtype)
        try:
            wanted = None if args is None else call(target, target, args)
        except (RuntimeError, TypeError, NotImplementedError):  # not for this type, or not of these arguments
            continue
        if not isinstance(wanted, torch.Tensor) or wanted.dtype != dtype:
            continue
        for operand in [at for at, value in enumerate(args) if isinstance(value, torch.Tensor)]:
            form = form_of(target, args, operand, wanted)
            if form is not None:
                mine = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
                found = call(target, form.target, mine, **({} if form.out is None else {form.out: mine[operand]}))
                assert found.data_ptr() == mine[operand].data_ptr()
                assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), (target, operand)
                tested.add(str(target))
    assert len(tested) > 80
    assert "aten.mul.Scalar" in tested


def call(schema, target, args: list, **more) -> torch.Tensor:
    """A call with arguments in the order of an operator's schema."""
    split = sum(not known.kwarg_only for known in schema._schema.arguments)
    named = {known.name: value for known, value in zip(schema._schema.arguments[split:], args[split:], strict=True)}
    return target(*args[:split], **named, **more)


def form_of(target, args: list, operand: int, result: torch.Tensor) -> InPlace | None:
    """How a call of these arguments can write its result over one of them."""
    graph, nodes, given = fx.Graph(), [], []
    for value in args:
        given.append(value)
        if isinstance(value, torch.Tensor):
            given[-1] = graph.placeholder(f"x{len(nodes)}")
            given[-1].meta["val"] = value
            nodes.append(given[-1])
    split = sum(not known.kwarg_only for known in target._schema.arguments)
    node = graph.call_function(target, tuple(given[:split]))
    node.meta["val"] = result
    return in_place_form(node, given[operand], nodes, {other: index for index, other in enumerate(nodes)})

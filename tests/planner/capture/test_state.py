"""What a model's forward stores: right after every planned call, or refused by name; and planning leaves no trace."""

import collections
import copy
import functools
import random
import weakref

import memplan
import msgspec
import numpy
import pytest
import torch
from memplan.planner.ir.errors import CaptureError, PlanMismatch
from memplan.planner.ir.machine import load_machine
from torch import nn

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
WIDTH = 4
STATISTICS: dict = {}


class Holder:
    """A plain object that a model holds."""

    def __init__(self):
        self.aux, self.model = None, None


class Net(nn.Module):
    """A layer, a frozen parameter, a buffer, attributes of all kinds, and a forward that is a function of them."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)
        self.key = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.register_buffer("mean", torch.ones(WIDTH))
        self.register_buffer("other", torch.zeros(WIDTH))
        self.count, self.table, self.aux = 0, None, None
        self.stats, self.losses, self.recent, self.holder = {}, [], collections.deque(maxlen=2), Holder()
        self.holder.model = self  # a cycle
        self.rng, self.numbers = random.Random(0), numpy.random.default_rng(0)

    def forward(self, x):
        return self.function(self, x)


def quick(model: nn.Module, x: torch.Tensor, loss=None) -> memplan.Plan:
    """A plan without a budget."""
    return memplan.plan(model, None, (x,), loss=loss, machine=QUICK, time_limit=2.0)


def attributes(model: nn.Module) -> dict:
    """What a user can see on the model beside parameters and buffers."""
    kept = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    kept |= {"holder": model.holder.aux, "parts": [part.training for part in model.modules()], "all": STATISTICS}
    for key in ("function", "rng", "numbers", "forward"):
        kept.pop(key, None)
    return kept


def same(found, wanted, path: str = "") -> None:
    """Bitwise equality, of containers element by element."""
    assert type(found) is type(wanted), path
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), path
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for key in wanted:
            same(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, list | collections.deque):
        assert len(found) == len(wanted), path
        for at, pair in enumerate(zip(found, wanted, strict=True)):
            same(*pair, f"{path}/{at}")
    else:
        assert found == wanted, path


def rebound(m, x):
    """A running mean, bound anew, whose old contents the backward pass needs."""
    h = m.layer(x)
    y = h * m.mean
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    m.other = m.other + 1
    return (y * m.mean + m.other).sum()


def momentum(m, x):
    """A key encoder's weight moves towards the query encoder's, by assignment."""
    with torch.no_grad():
        m.key.data = m.key.data * 0.9 + m.layer.weight.data * 0.1
    return (m.layer(x) @ m.key).sum()


def momentum_in_place(m, x):
    """The same, in place; and a buffer through its data."""
    m.key.data.mul_(0.9).add_(m.layer.weight.data, alpha=0.1)
    m.mean.data.copy_(m.layer.bias.data)
    return (m.layer(x) @ m.key * m.mean).sum()


def router(m, x):
    """A loss beside the model's output, and what else is kept of the step."""
    h = m.layer(x)
    m.aux, m.holder.aux = h.detach().square().mean(), h.detach()[0]
    m.last = h.detach()
    return h.sum()


def in_containers(m, x):
    """A dict, a list that grows, one that is emptied before, new containers, and a global dict."""
    h = m.layer(x)
    m.stats["mean"], m.stats["shape"] = h.detach().mean(), x.shape
    m.losses.append(h.detach().mean())
    m.recent.append(h.detach().mean())
    m.aux = {"rows": [h.detach()[0], len(x)], "name": "aux"}
    STATISTICS["norm"] = h.detach().norm()
    return h.sum()


def emptied(m, x):
    """A list of this call alone."""
    m.losses.clear()
    h = m.layer(x)
    m.losses.extend([h.detach().mean(), h.detach().amax()])
    return h.sum()


def plain(m, x):
    """Numbers, shapes and modes that are the same after every call; one is looked at first."""
    if m.count == 0:
        m.count = len(x)
    m.table = x.shape
    m.drop.eval()
    return m.drop(m.layer(x)).sum()


def the_input(m, x):
    """An input, and an output."""
    m.table = x
    m.aux = m.layer(x).sum()
    return m.aux


@pytest.mark.parametrize(
    "function",
    [rebound, momentum, momentum_in_place, router, in_containers, emptied, plain, the_input],
    ids=lambda f: f.__name__,
)
def test_a_planned_call_leaves_what_eagers_leaves(function):
    """Losses, gradients, buffers, parameters and attributes are eager's, bit for bit, over three steps."""
    torch.manual_seed(0)
    STATISTICS.clear()
    model = Net(function)
    other = copy.deepcopy(model)
    fast = quick(model, torch.randn(2, WIDTH)).apply(model)
    assert STATISTICS == {}
    for _ in range(3):
        x = torch.randn(2, WIDTH)
        found = fast(x)
        found.backward()
        states = [copy.deepcopy(attributes(each)) if function is not the_input else attributes(each) for each in (fast, model)]
        wanted = other(x)
        wanted.backward()
        for state in states:
            same(state, attributes(other))
        same(found.detach(), wanted.detach())
        same(dict(model.state_dict()), dict(other.state_dict()))
        same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


def stores_aux(m, x):
    """A loss that carries a gradient."""
    h = m.layer(x)
    m.aux = h.square().mean()
    return h


def test_a_loss_function_may_read_what_forward_stores():
    """Its gradient passes through the attribute, as in eager mode."""
    torch.manual_seed(0)
    model = Net(stores_aux)
    other = copy.deepcopy(model)
    fast = quick(model, torch.randn(2, WIDTH), loss=lambda out: out.sum() + 0.1 * model.aux).apply(model)
    for _ in range(3):
        x = torch.randn(2, WIDTH)
        for net in (fast, other):
            (net(x).sum() + 0.1 * net.aux).backward()
    same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert model.aux is fast.aux


def test_a_gradient_through_what_the_plan_leaves_out_is_refused_by_name():
    """The script adds a stored loss that the plan did not know of; read without a gradient it is right."""
    model = Net(stores_aux)
    x = torch.randn(2, WIDTH)
    fast = quick(model, x, loss=lambda out: out.sum()).apply(model)
    out = fast(x)
    assert torch.equal(model.aux.detach(), model.layer(x).square().mean())
    with pytest.raises(PlanMismatch, match="a gradient reaches aux"):
        (out.sum() + model.aux).backward()


def test_a_hook_of_a_layer_may_write_into_a_dict():
    """Features are taken so: the dict has this step's, not a tensor of the tracer's."""
    model = Net(lambda m, x: m.layer(x).sum())
    seen: dict = {}
    model.layer.register_forward_hook(lambda module, args, out: seen.__setitem__("layer", out.detach()))
    fast = quick(model, torch.randn(2, WIDTH)).apply(model)
    assert seen == {}
    x = torch.randn(2, WIDTH)
    fast(x)
    assert torch.equal(seen["layer"], nn.functional.linear(x, model.layer.weight, model.layer.bias))


def counting(m, x):
    """In an attribute."""
    m.count += 1
    return m.layer(x).sum()


def on_first_use(m, x):
    """As tables of rotary positions are made."""
    if m.count < len(x):
        m.table, m.count = torch.arange(4.0), len(x)
    return (m.layer(x) * m.table).sum()


def carried(m, x):
    """A state in an attribute."""
    h = m.layer(x) if m.aux is None else m.layer(x) + m.aux
    m.aux = h.detach()
    return h.sum()


def global_cache(m, x):
    """In a dict of the module's."""
    if "table" not in STATISTICS:
        STATISTICS["table"] = torch.arange(4.0)
    return (m.layer(x) * STATISTICS["table"]).sum()


def keeps_gradient(m, x):
    """In a buffer."""
    m.mean = m.mean + m.layer(x).mean(0)
    return m.mean.sum()


def reshaped(m, x):
    """A buffer of another shape."""
    m.mean = torch.cat([m.mean, m.mean])
    return m.layer(x).sum()


def exchanged(m, x):
    """Two buffers."""
    m.mean, m.other = m.other, m.mean
    return (m.layer(x) * m.mean).sum()


def tied_data(m, x):
    """A parameter that shares another's memory."""
    m.key.data = m.layer.weight.data
    return (m.layer(x) @ m.key).sum()


def old_name(m, x):
    """Old contents are used under another name."""
    old = m.key.data
    m.key.data = old * 2
    return (m.layer(x) @ m.key @ old).sum()


def late(m, x):
    """A parameter exchanged after it was computed with."""
    y = m.layer(x) @ m.key
    m.key.data = m.key.data * 0.5
    return (y @ m.key).sum()


def clipped(m, x):
    """A parameter that wants a gradient."""
    m.layer.weight.data = m.layer.weight.data.clamp(-0.1, 0.1)
    return m.layer(x).sum()


def new_parameter(m, x):
    """In place of one that is there."""
    m.key = nn.Parameter(m.key * 2)
    return m.layer(x).sum()


def new_buffer(m, x):
    """Registered."""
    m.register_buffer("cache", x.detach())
    return m.layer(x).sum()


def new_module(m, x):
    """A layer."""
    m.more = nn.Linear(2, 2)
    return m.layer(x).sum()


def an_object(m, x):
    """Of which tensors cannot be seen."""
    made = Holder()
    made.aux = m.layer(x)
    m.aux = made
    return made.aux.sum()


def looks_at_grad(m, x):
    """Of a parameter."""
    return m.layer(x).sum() * (1 if m.layer.weight.grad is None else 2)


def layer_drop(m, x):
    """By Python's generator."""
    return m.layer(x).sum() if random.random() < 0.5 else m.layer(m.layer(x)).sum()


def layer_drop_numpy(m, x):
    """By numpy's."""
    return m.layer(x).sum() * float(numpy.random.rand())


def own_generator(m, x):
    """By one that the model holds."""
    return m.layer(x).sum() * m.rng.random()


def own_numpy(m, x):
    """By numpy's new ones."""
    return m.layer(x).sum() * float(m.numbers.random())


def seeded(m, x):
    """Sets torch's generator."""
    torch.manual_seed(len(x))
    return m.layer(x).sum()


def drawn(m, x):
    """A number from torch's generator decides."""
    return m.layer(x).sum() if torch.rand(1).item() < 0.5 else x.sum()


REFUSED = {
    counting: r"changes count at every call \(to 1, then to 2\).*count in a buffer",
    on_first_use: "stores in count, table: call the model once",
    carried: "aux: call the model once.*belongs in buffers",
    global_cache: r"STATISTICS\['table'\]: call the model once",
    keeps_gradient: "keeps a gradient in the buffer mean",
    reshaped: "replaces the buffer mean",
    exchanged: "binds the buffer mean to another of its tensors",
    tied_data: r"assigns to key.data and uses",
    old_name: r"assigns to key.data and uses its old contents",
    late: r"assigns to key.data after it has computed with it",
    clipped: r"changes a parameter .* \(layer.weight\)",
    new_parameter: "replaces its parameter key",
    new_buffer: "registers a buffer cache.*call the model once",
    new_module: "registers a submodule more",
    an_object: "stores a Holder in aux",
    looks_at_grad: "looks at the gradient of layer.weight",
    layer_drop: "draws from Python's random",
    layer_drop_numpy: "draws from numpy.random",
    own_generator: "draws from rng",
    own_numpy: "draws from numbers",
    seeded: "draws from torch's generator",
    drawn: "takes a number out of a tensor",
}


def picture(thing, seen: dict) -> object:
    """Everything that is reachable from a model, with the identities of what is no container."""
    if id(thing) in seen:
        return seen[id(thing)]
    seen[id(thing)] = f"again {len(seen)}"
    if isinstance(thing, dict):
        return [(key, picture(value, seen)) for key, value in thing.items()]
    if isinstance(thing, list | tuple | collections.deque):
        return [picture(value, seen) for value in thing]
    if isinstance(thing, nn.Module | Holder):
        return [(key, picture(value, seen)) for key, value in vars(thing).items()]
    if isinstance(thing, torch.Tensor):
        return id(thing), thing.requires_grad, id(thing.grad), thing._version, thing.tolist()
    if isinstance(thing, random.Random):
        return thing.getstate()
    return str(thing.bit_generator.state) if isinstance(thing, numpy.random.Generator) else (id(thing), type(thing))


def whole(model: nn.Module) -> list:
    """The model, what it reaches, and the states of all generators."""
    numbers = str(numpy.random.get_state(legacy=False)), random.getstate(), torch.get_rng_state().tolist()
    return [picture(model, {}), picture(STATISTICS, {}), *numbers]


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_a_plan_cannot_do_is_refused_by_name_and_leaves_the_model_as_it_was(function):
    """One CaptureError each; the model, compared with itself before, is the same, object for object, and still runs."""
    STATISTICS.clear()
    model = Net(function)
    x = torch.randn(2, WIDTH)
    before = whole(model)
    with pytest.raises(CaptureError, match=REFUSED[function]):
        quick(model, x)
    assert whole(model) == before
    if function is not exchanged:
        assert isinstance(model(x), torch.Tensor)


@pytest.mark.parametrize("function", [rebound, momentum, router, in_containers, emptied, plain], ids=lambda f: f.__name__)
def test_planning_leaves_no_trace(function):
    """Nor does a loss function that keeps things."""
    STATISTICS.clear()
    model = Net(function)
    model.layer(torch.randn(1, WIDTH)).sum().backward()
    kept: dict = {}
    x = torch.randn(2, WIDTH)
    before = whole(model)

    def loss(out):
        kept["loss"] = out
        random.random()
        return out

    plan = quick(model, x, loss=loss)
    assert whole(model) == before
    assert kept == {}
    plan.apply(model)
    assert whole(model) == before


def test_a_table_built_on_first_use_is_planned_after_that():
    """As the refusal says: call the model once."""
    model = Net(on_first_use)
    x = torch.randn(2, WIDTH)
    wanted = model(x)
    assert torch.equal(quick(model, x).apply(model)(x), wanted)


@functools.cache
def remembered(size: int) -> torch.Tensor:
    """A table that is made once."""
    return torch.arange(float(size))


def test_a_function_that_remembers_keeps_no_tensor_of_the_tracers():
    """Planned before its first call, and eager afterwards."""
    remembered.cache_clear()
    model = Net(lambda m, x: (m.layer(x) * remembered(WIDTH)).sum())
    x = torch.randn(2, WIDTH)
    fast = quick(model, x).apply(model)
    assert type(remembered(WIDTH)) is torch.Tensor
    assert torch.equal(fast(x), model(x))


def test_a_set_that_forward_changes_is_refused():
    """It has no order in which its elements could be stored again."""
    model = Net(lambda m, x: (m.names.add("seen"), m.layer(x).sum())[1])
    model.names = set()
    with pytest.raises(CaptureError, match="changes names, a set"):
        quick(model, torch.randn(2, WIDTH))
    assert model.names == set()


def test_hooks_that_forward_installs_once_are_installed_by_the_plan_too():
    """As transformers does to take outputs of layers."""

    def install(m, x):
        if not m.count:
            m.layer.register_forward_hook(lambda module, args, out: None)
            m.count = 1
        return m.layer(x).sum()

    model = Net(install)
    x = torch.randn(2, WIDTH)
    fast = quick(model, x).apply(model)
    assert not model.layer._forward_hooks
    assert torch.equal(fast(x), fast(x))
    assert len(model.layer._forward_hooks) == model.count == 1


def test_what_forward_stores_in_its_arguments_is_refused():
    """The caller would look for it in vain; what forward takes out of them is no matter."""

    class Batched(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.layer, self.keep = nn.Linear(WIDTH, WIDTH), keep

        def forward(self, batch):
            h = self.layer(batch.pop("x"))
            if self.keep:
                batch["hidden"] = h
            return h.sum()

    x = torch.randn(2, WIDTH)
    with pytest.raises(CaptureError, match=r"stores batch\['hidden'\] in its argument"):
        memplan.plan(Batched(True), None, ({"x": x},), machine=QUICK)
    model = Batched(False)
    assert torch.equal(memplan.plan(model, None, ({"x": x},), machine=QUICK).apply(model)({"x": x}), model({"x": x}))


def test_a_stored_tensor_is_gone_before_the_next_is_made():
    """It would lie beside the step, and no plan counts it."""
    model = Net(router)
    x = torch.randn(2, WIDTH)
    fast = quick(model, x).apply(model)
    fast(x)
    known = weakref.ref(model.last)
    kept = fast.forward.code.forward
    seen = []
    object.__setattr__(fast.forward.code, "forward", lambda inputs: (seen.append(known()), kept(inputs))[1])
    fast(x)
    assert seen == [None]


def test_a_mapping_refuses_a_model_that_stores_tensors():
    """A scratchpad's run returns what the model returns."""
    with pytest.raises(memplan.MemplanError, match="stores a tensor in aux"):
        memplan.map_model(Net(router).eval(), "1MiB", (torch.randn(2, WIDTH),))

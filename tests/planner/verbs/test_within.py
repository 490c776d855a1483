"""One line that keeps a budget at every call: eager's bits for every batch, and told where nothing could be done."""

import copy
import pickle
import warnings

import memplan
import msgspec
import pytest
import torch
from memplan.planner.ir.errors import BudgetError, BudgetWarning, MemplanError, UnplannedWarning
from memplan.planner.ir.machine import load_machine
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.usefixtures("hasty")

QUICK = msgspec.structs.replace(load_machine("h100-80gb"), name="quick", device="cpu")  # where nothing needs measuring
WIDTH = 32


def net(depth: int = 6) -> nn.Module:
    """A small model."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))))


def batch(seed: int, rows: int = 64) -> torch.Tensor:
    """An input."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def total(output: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return output.float().sin().sum()


def within(model, budget="1MiB", **options):
    """A module within a budget."""
    return memplan.within(model, budget, **{"loss": total, "machine": QUICK} | options)


def gradients(model) -> dict[str, torch.Tensor | None]:
    """By name."""
    return {name: value.grad for name, value in model.named_parameters()}


def same(one, other) -> bool:
    """Whether gradients are the same, bit for bit."""
    return all((one[name] is None) == (other[name] is None) and (one[name] is None or torch.equal(one[name], other[name]))
               for name in one | other)  # fmt: skip


def step(model, x, seed=0) -> torch.Tensor:
    """One step; random numbers from a seed."""
    torch.manual_seed(seed)
    loss = total(model(x))
    loss.backward()
    return loss.detach()


def forward_of(module):
    """What plans."""
    return vars(module)["forward"]


def kinds_of(module) -> list:
    """What it has planned."""
    return [kind for form in forward_of(module).forms.values() for kind in form.kinds]


def test_every_batch_is_a_step_with_eagers_bits():
    """Of another size, the same size again, and back."""
    model = net()
    twin, kept = copy.deepcopy(model), within(model)
    for seed, rows in enumerate((64, 7, 64, 1, 7)):
        model.zero_grad()
        twin.zero_grad()
        assert torch.equal(step(kept, batch(seed, rows), seed), step(twin, batch(seed, rows), seed))
        assert same(gradients(model), gradients(twin))
    (form,) = forward_of(kept).forms.values()
    assert [type(kind).__name__ for kind in form.kinds] == ["OneShape", "OneShape", "EverySize"]  # a size of 1 is its own


def test_it_is_the_model_with_another_forward():
    """Same class, parameters, state and names; the model itself is as it was."""
    model = net()
    kept = within(model)
    step(kept, batch(0))

    assert type(kept) is type(model)
    assert list(kept.state_dict()) == list(model.state_dict())
    assert kept[0].weight is model[0].weight
    assert "forward" not in vars(model)
    pickle.loads(pickle.dumps(model))
    with pytest.raises(MemplanError, match="pickle the model itself"):
        pickle.dumps(kept)


def test_an_evaluation_runs_as_it_is():
    """Nothing is planned for it."""
    model = net().eval()
    kept = within(model)
    with torch.no_grad():
        assert torch.equal(kept(batch(0)), model(batch(0)))
    with torch.inference_mode():
        kept(batch(0))
    assert not forward_of(kept).forms


def test_an_evaluation_beside_a_call_that_waits_is_told():
    """Once: what the call holds lies beside it."""
    model = net(2)
    kept = within(model)
    loss = total(kept(batch(0)))
    with torch.no_grad(), pytest.warns(BudgetWarning, match="a call without gradients runs while 1 before it"):
        kept(batch(1))
    loss.backward()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(batch(1))


def test_accumulation_stays_within_the_budget():
    """Gradients that are there are counted, where the plan has no room for them."""
    model = net()
    alone = memplan.plan(model, None, (batch(0),), loss=total, machine=QUICK)
    budget = (alone.peak + alone.minimum) // 2
    twin, kept = copy.deepcopy(model), within(model, budget)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BudgetWarning)
        for seed in range(3):
            step(kept, batch(seed), seed)
            step(twin, batch(seed), seed)

    assert same(gradients(model), gradients(twin))
    (kind,) = kinds_of(kept)
    assert set(kind.runners) == {(1, False), (1, True)}
    assert kind.adding[False].program.resident_bytes > kind.session.program.resident_bytes


def test_gradients_that_fit_beside_a_plan_need_no_other():
    """The step that was planned alone runs again."""
    kept = within(net())
    step(kept, batch(0))
    step(kept, batch(0))
    (kind,) = kinds_of(kept)
    assert set(kind.runners) == {(1, False)}


def test_calls_before_one_backward_pass_have_room_from_the_second_step_on():
    """The first time they are told of."""
    model = net()
    twin, kept = copy.deepcopy(model), within(model)

    def triplet(each):
        torch.manual_seed(3)
        sum(total(each(batch(seed))) for seed in range(3)).backward()

    with pytest.warns(BudgetWarning, match="a call begins while 1 before it wait"):
        triplet(kept)
    triplet(twin)
    assert same(gradients(model), gradients(twin))
    model.zero_grad()
    twin.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BudgetWarning)
        triplet(kept)
    triplet(twin)

    assert same(gradients(model), gradients(twin))
    assert forward_of(kept).calls == 3


def test_a_dropped_result_waits_for_nothing():
    """It holds nothing any more."""
    kept = within(net())
    for seed in range(3):
        kept(batch(seed))
    assert forward_of(kept).calls == 1


def test_a_batch_that_does_not_fit_is_refused_with_how_much_would():
    """Before anything is run."""
    model = net()
    floor = memplan.plan(model, "99%", (batch(0),), loss=total, machine=QUICK).minimum
    with pytest.raises(BudgetError, match=r"about \d+ of the 128 rows of this batch would fit"):
        within(model, floor)(batch(0, 128))


def test_what_cannot_be_planned_runs_and_is_told_once():
    """By the reason."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    model = Asks()
    twin, kept = copy.deepcopy(model), within(model)
    with pytest.warns(UnplannedWarning, match="run unplanned, and no budget is kept: .* takes a number out of a tensor"):
        step(kept, batch(0))
    step(twin, batch(0))
    assert same(gradients(model), gradients(twin))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(kept, batch(0))


def test_a_replaced_forward_is_told_at_the_first_step():
    """The tool's runs, and nothing is kept."""
    kept = within(net())
    step(kept, batch(0))
    original = type(kept).forward
    kept.forward = lambda x: original(kept, x)
    with pytest.warns(UnplannedWarning, match="forward has been replaced"):
        step(kept, batch(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: model.double(),
        lambda model: setattr(model, "3", nn.Linear(WIDTH, WIDTH, bias=False)),
        lambda model: model.eval(),
        lambda model: setattr(model[2], "p", 0.5),
    ],
    ids=["freezing", "casting", "replacing", "eval", "setting"],
)
def test_a_changed_model_is_planned_anew(change):
    """And it keeps what was planned for what it was before."""
    model = net()
    twin, kept = copy.deepcopy(model), within(model)
    step(kept, batch(0))
    torch.manual_seed(5)
    change(kept)
    torch.manual_seed(5)
    change(twin)
    x = batch(1).to(next(kept.parameters()).dtype)
    kept.zero_grad()
    assert torch.equal(step(kept, x), step(twin, x))
    assert same(gradients(kept), gradients(twin))
    assert len(kinds_of(kept)) == 2


def test_an_attribute_of_the_module_itself_is_read_anew():
    """Set on what `within` returned, as a user would."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(WIDTH, WIDTH), 1.0

        def forward(self, x):
            return self.layer(x) * self.scale

    model = Scaled()
    twin, kept = copy.deepcopy(model), within(model)
    for scale in (1.0, 3.0, 1.0):
        kept.scale = twin.scale = scale
        assert torch.equal(step(kept, batch(0)), step(twin, batch(0)))
    assert same(gradients(kept), gradients(twin))


def test_a_copy_plans_for_itself():
    """An average of the weights, say."""
    model = net()
    kept = within(model)
    step(kept, batch(0))
    other = copy.deepcopy(kept)
    model.zero_grad()
    twin = net()
    step(other, batch(0))
    step(twin, batch(0))

    assert same(gradients(other), gradients(twin))
    assert all(value.grad is None for value in model.parameters())


def test_a_loss_outside_of_which_nothing_is_known():
    """Any, of any outputs; it is taken to need as much again as they do."""
    model = net()
    twin, kept = copy.deepcopy(model), memplan.within(model, "1MiB", machine=QUICK)
    for each in (kept, twin):
        torch.manual_seed(1)
        nn.functional.cross_entropy(each(batch(0)), torch.arange(64) % WIDTH).backward()

    assert same(gradients(model), gradients(twin))
    (kind,) = kinds_of(kept)
    loss = next(op for op in kind.session.program.ops if op.phase == "loss")
    assert loss.workspace == 64 * WIDTH * 4


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_masks_of_all_patterns(kind):
    """All ones, padded, none at all; evaluations between."""
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, use_cache=False))
    else:
        model = BertForSequenceClassification(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
        )
    model.train()
    twin, kept = copy.deepcopy(model), memplan.within(model, "64MiB", machine=QUICK)
    ids = torch.randint(64, (3, 8))
    labels = ids if kind == "gpt2" else torch.tensor([0, 1, 0])
    padded = torch.ones(3, 8, dtype=torch.long)
    padded[1, 5:] = 0
    for number, mask in enumerate((torch.ones(3, 8, dtype=torch.long), padded, None, padded.flip(0))):
        call = dict(input_ids=ids, labels=labels) | ({} if mask is None else {"attention_mask": mask})
        losses = []
        for each in (kept, twin):
            torch.manual_seed(number)
            each.zero_grad()
            losses.append(each(**call).loss)
            losses[-1].backward()
        assert torch.equal(*losses)
        assert same(gradients(model), gradients(twin))
        with torch.no_grad():
            kept(**call)
    assert len(kinds_of(kept)) == 3


def test_wrong_arguments_are_refused_at_once():
    """In one line."""
    for budget in ("60%", "lots", 0):
        with pytest.raises(BudgetError):
            memplan.within(net(), budget)
    with pytest.raises(memplan.CaptureError, match=r"needs an nn\.Module"):
        memplan.within("model", "1GiB")


def test_a_call_that_does_not_fit_forward_is_forwards_to_refuse():
    """With Python's own words."""
    with pytest.raises(TypeError, match="nonsense"):
        within(net())(batch(0), nonsense=1)


def traces(module) -> list:
    """Notes each trace that a module within a budget makes: whether its sizes vary."""
    made, forward = [], forward_of(module)
    session_of = forward.session_of

    def noted(model, args, kwargs, first, dynamic):
        made.append(dynamic is not None)
        return session_of(model, args, kwargs, first, dynamic)

    forward.session_of = noted
    return made


def shapes_of(seed: int, count: int, rows: int = 5, length: int = 24) -> list[tuple[int, int]]:
    """Random sizes, none of them 1."""
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(2, most, (1,), generator=draw).item() for most in (rows, length)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_one_trace_serves_every_length(kind):
    """Of batches with all-ones and padded masks: two traces a pattern, and three while there is nothing to compare with."""
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, use_cache=False))
    else:
        model = BertForSequenceClassification(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
        )
    model.train()
    twin, kept = copy.deepcopy(model), memplan.within(model, "64MiB", machine=QUICK)
    made = traces(kept)
    for number, (rows, length) in enumerate(shapes_of(1, 12)):
        ids = torch.randint(64, (rows, length))
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, length - (number % 2) * (length // 2) :] = 0
        call = dict(input_ids=ids, attention_mask=mask, labels=ids if kind == "gpt2" else torch.arange(rows) % 2)
        losses = []
        for each in (kept, twin):
            torch.manual_seed(number)
            each.zero_grad()
            losses.append(each(**call).loss)
            losses[-1].backward()
        assert torch.equal(*losses)
        assert same(gradients(model), gradients(twin))
    assert len(made) <= 8  # BERT's first call sets its configuration's problem_type, and is like no other
    assert [type(each).__name__ for each in kinds_of(kept)].count("EverySize") == 2


def test_every_size_keeps_the_budget_beside_gradients_and_calls():
    """Accumulation over batches of all sizes, then three calls before one backward pass."""
    model = net()
    alone = memplan.plan(model, None, (batch(0, 64),), loss=total, machine=QUICK)
    budget = (2 * alone.peak + alone.minimum) // 3
    twin, kept = copy.deepcopy(model), within(model, budget)
    for seed, rows in enumerate((64, 48, 33, 50, 64, 20)):
        step(kept, batch(seed, rows), seed)
        step(twin, batch(seed, rows), seed)
        assert same(gradients(model), gradients(twin))
    every = next(kind for kind in kinds_of(kept) if type(kind).__name__ == "EverySize")
    assert set(every.plans) == {(False, False), (True, False)}
    for chosen in every.chosen.values():
        assert chosen.peak <= budget
    model.zero_grad()
    twin.zero_grad()
    for each in (kept, twin):
        for number in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if number == 0 else "error", BudgetWarning)
                torch.manual_seed(1)
                sum(total(each(batch(seed, 9 + seed))) for seed in range(3)).backward()
            each.zero_grad()
    for (_, calls, _), chosen in every.chosen.items():
        assert chosen.peak + (calls - 1) * chosen.held <= budget


def test_a_model_that_goes_another_way_at_some_sizes():
    """Is traced for these as well."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.one(x) if x.shape[0] > 16 else self.two(x)

    model = Long()
    twin, kept = copy.deepcopy(model), within(model)
    for seed, rows in enumerate((20, 30, 40, 8, 50, 4, 9, 17)):
        assert torch.equal(step(kept, batch(seed, rows)), step(twin, batch(seed, rows)))
        assert same(gradients(model), gradients(twin))


def test_a_size_that_no_schedule_fits_is_refused_with_how_much_would():
    """Also where sizes vary."""
    model = net()
    kept = within(model, memplan.plan(model, "99%", (batch(0),), loss=total, machine=QUICK).minimum * 2)
    for seed, rows in enumerate((32, 24, 40)):
        step(kept, batch(seed, rows))
    with pytest.raises(BudgetError, match=r"about \d+ of the 4096 rows of this batch would fit"):
        kept(batch(0, 4096))
    step(kept, batch(0, 30))


def test_it_is_planned_inside_torch_compile_and_plain_inside_torch_export():
    """Compiled, the rest of the script is; exported, the model itself is."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    twin, kept = copy.deepcopy(model), within(model)
    x = batch(0)
    compiled = torch.compile(lambda x: total(kept(x)), backend="eager")
    compiled(x).backward()
    total(twin(x)).backward()
    assert same(gradients(model), gradients(twin))
    assert len(kinds_of(kept)) == 1
    program = torch.export.export(kept, (x,)).module()
    assert torch.equal(program(x), model(x))
    assert len(kinds_of(kept)) == 1


def test_numbers_that_are_others_at_every_call_are_not_planned_for_ever(monkeypatch):
    """It is told what to do; calls that are known stay planned."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, scale: float):
            return self.layer(x) * scale

    monkeypatch.setattr("memplan.backends.eager.within.FORMS", 2)
    model = Scaled()
    twin, kept = copy.deepcopy(model), within(model)

    def train():
        for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.1):
            for each in (kept, twin):
                total(each(batch(0), scale)).backward()

    with pytest.warns(UnplannedWarning, match="too many kinds of them .* pass numbers that change as tensors"):
        train()
    assert same(gradients(model), gradients(twin))
    assert len(kinds_of(kept)) == 3


def test_answers_that_are_others_at_every_call_are_not_planned_for_ever(monkeypatch):
    """As of a model that takes a number out of a mask."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask):
            return self.layer(x) / int(mask.sum())

    monkeypatch.setattr("memplan.backends.eager.within.MOST", 3)
    model = Counts()
    twin, kept = copy.deepcopy(model), within(model)

    def train():
        for count in (1, 2, 3, 4, 5, 1):
            mask = torch.arange(6) < count
            for each in (kept, twin):
                total(each(batch(0), mask)).backward()

    with pytest.warns(UnplannedWarning, match="too many kinds of them"):
        train()
    assert same(gradients(model), gradients(twin))
    assert len(kinds_of(kept)) == 3


def test_sizes_that_cannot_vary_are_told_of():
    """Each shape is traced then."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x) * (0.1 * x.shape[0])

    model = Root()
    twin, kept = copy.deepcopy(model), within(model)

    def train():
        for seed, rows in enumerate((8, 12, 9, 8)):
            step(kept, batch(seed, rows))
            step(twin, batch(seed, rows))

    with pytest.warns(memplan.MemplanWarning, match="each shape of Root's calls is traced and planned by itself"):
        train()
    assert same(gradients(model), gradients(twin))
    assert len(kinds_of(kept)) == 3


def test_a_graph_that_is_kept_has_room_from_the_second_step_on():
    """Two backward passes over one forward pass."""
    model = net()
    twin, kept = copy.deepcopy(model), within(model)

    def twice(each):
        torch.manual_seed(1)
        output = each(batch(0))
        total(output).backward(retain_graph=True)
        output.square().mean().backward()

    with pytest.warns(BudgetWarning, match="retain_graph=True"):
        twice(kept)
    twice(twin)
    model.zero_grad()
    twin.zero_grad()
    twice(kept)
    twice(twin)
    assert same(gradients(model), gradients(twin))
    (kind,) = kinds_of(kept)
    assert set(kind.runners) == {(1, False), (2, True)}

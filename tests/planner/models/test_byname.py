"""Models by name: they build, they give a loss, and whatever is wrong is said in one line."""

from pathlib import Path

import pytest
import torch
from memplan.planner.models.byname import ModelError, converted, load_model

TEXT = "hidden_size=32&intermediate_size=32&num_hidden_layers=1&num_attention_heads=2&vocab_size=50&seq=8&batch=2"
MODELS = [
    "hf:gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=50&seq=8&attn_pdrop=0",
    f"hf:llama?{TEXT}&num_key_value_heads=1",
    f"hf:qwen2?{TEXT}&num_key_value_heads=1",
    f"hf:bert?{TEXT}",
    "hf:t5?num_layers=1&d_model=32&d_ff=32&num_heads=2&d_kv=16&vocab_size=50&seq=8",
    "hf:whisper?encoder_layers=1&decoder_layers=1&d_model=32&encoder_attention_heads=2&decoder_attention_heads=2"
    "&encoder_ffn_dim=32&decoder_ffn_dim=32&max_source_positions=10&vocab_size=50&seq=8",
    "hf:vit?hidden_size=32&intermediate_size=32&num_hidden_layers=1&num_attention_heads=2&image_size=32&num_labels=3",
    "hf:resnet?depths=1,1&hidden_sizes=8,16&embedding_size=8&layer_type=basic&image=32&num_labels=3",
    "hf:clip?vision_config.hidden_size=32&vision_config.intermediate_size=32&vision_config.num_hidden_layers=1"
    "&vision_config.num_attention_heads=2&vision_config.image_size=32&vision_config.patch_size=16&image=32&num_labels=3",
]


@pytest.mark.parametrize("spec", MODELS)
def test_transformers_models_give_a_loss_with_gradients(spec: str):
    model, args, kwargs = load_model(spec, meta=False)

    loss = model(*args, **kwargs).loss
    loss.backward()

    assert model.training
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("spec", [f"{MODELS[1]}&dtype=bfloat16", f"{MODELS[6]}&dtype=bfloat16"])
def test_on_meta_nothing_takes_memory(spec: str):
    model, _, kwargs = load_model(spec, meta=True)

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {value.device.type for value in kwargs.values()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_lists_with_an_entry_for_each_layer_are_as_long_as_the_model_is_deep():
    """Qwen2's default has 32 layers; a name that is no setting is refused as ever."""
    model, _, _ = load_model(f"{MODELS[2]}&num_hidden_layers=33".replace("num_hidden_layers=1&", ""), meta=True)

    assert len(model.config.layer_types) == model.config.num_hidden_layers == 33
    with pytest.raises(ModelError, match="hf:gpt2 has no setting 'num_layers'"):
        load_model("hf:gpt2?num_layers=3", meta=True)


def test_the_same_spec_gives_the_same_model_and_batch():
    (first, _, one), (second, _, two) = (load_model(MODELS[3], meta=False) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "cannot read the model 'gpt2'"),
        ("no.py:factory", "no file no.py"),
        ("no_such_package.at_all:factory", "no module no_such_package"),
        ("torch.nn:functional", "has no function 'functional'"),
        ("hf:lama", "no model type 'lama'; did you mean llama"),
        ("hf:", "no model type ''"),
        ("hf:llama?num_hiden_layers=2", "no setting 'num_hiden_layers'; did you mean num_hidden_layers"),
        ("hf:blt?encoder.hidden_size=8", "no part 'encoder'; did you mean encoder_config"),
        ("hf:blt?encoder_config.hiden_size=8", "no setting 'encoder_config.hiden_size'; did you mean hidden_size"),
        ("hf:llama?num_hidden_layers=two", "num_hidden_layers=two does not fit: it must be int"),
        ("hf:llama?num_hidden_layers=1.5", "does not fit"),
        ("hf:llama?tie_word_embeddings=maybe", "must be bool"),
        ("hf:llama?dtype=int8", "unknown dtype 'int8'"),
        ("hf:llama?batch=0", "must be positive"),
        ("hf:llama?seq", "write name=value"),
        ("hf:gpt2?seq=5000", "longer than the 1024 positions"),
        ("hf:bert?hidden_size=33&num_hidden_layers=1", "failed at .*ValueError"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spec: str, message: str):
    with pytest.raises(ModelError, match=message) as raised:
        load_model(spec, meta=True)

    assert "\n" not in str(raised.value)


FACTORIES = """
import torch
from neighbour import width

def good():
    return torch.nn.Linear(width, 1), (torch.ones(2, width),)

def named():
    return torch.nn.Linear(width, 1), [], {"input": torch.ones(2, width)}

def bare():
    return torch.nn.Linear(width, 1)

def tensor():
    return torch.nn.Linear(width, 1), torch.ones(2, width)

def raising():
    raise KeyError("a\\nb")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of factories, which imports its neighbour."""
    (tmp_path / "neighbour.py").write_text("width = 4\n")
    (tmp_path / "factories_of_models.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("def f(:\n")
    return tmp_path


def test_factories_of_a_file(folder: Path):
    model, args, kwargs = load_model(f"{folder}/factories_of_models.py:good", meta=False)
    other, none, named = load_model(f"{folder}/factories_of_models.py:named", meta=False)

    assert model(*args, **kwargs).shape == (2, 1)
    assert none == ()
    assert other(**named).shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("factories_of_models.py:godo", "has no function 'godo'; did you mean good"),
        ("factories_of_models.py:bare", r"must return .* not \(Linear\)"),
        ("factories_of_models.py:tensor", r"must return .* not \(Linear, Tensor\)"),
        ("factories_of_models.py:raising", r"factories_of_models\.py:18: KeyError: 'a\\nb'"),
        ("broken.py:f", "SyntaxError"),
    ],
)
def test_a_bad_factory_is_named_with_its_line(folder: Path, name: str, message: str):
    with pytest.raises(ModelError, match=message) as raised:
        load_model(f"{folder}/{name}", meta=False)

    assert "\n" not in str(raised.value)


def test_without_transformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)

    with pytest.raises(ModelError, match=r"pip install 'memplan\[hf\]'"):
        load_model("hf:gpt2", meta=True)


@pytest.mark.parametrize(
    ("text", "default", "hint", "value"),
    [
        ("3", 1, "int", 3),
        ("0.5", 0, "float | int", 0.5),
        ("true", False, bool, True),
        ("none", 4, "int | None", None),
        ("4", None, "int | None", 4),
        ("1,2", [3], "list[int]", [1, 2]),
        ("relu", "gelu", "str", "relu"),
    ],
)
def test_values_take_the_type_of_the_setting(text: str, default: object, hint: object, value: object):
    assert converted("name", text, default, hint) == value

"""Language and vision models of several families at sizes other than their trace's: eager's bits, and the same program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from memplan.planner.capture.capture import capture
from memplan.planner.verbs.session import Session
from memplan.planner.verbs.sizes import SizedPlans
from size_cases import equal, step

pytestmark = pytest.mark.slow
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
TEXT = {name: {0: "batch", 1: "length"} for name in ("input_ids", "labels")}


class Family(NamedTuple):
    """A model, what of its call varies, and sizes, the first of which it is traced with."""

    name: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[..., dict[str, torch.Tensor]]
    dynamic: dict[str, dict[int, str]]
    sizes: tuple[tuple[int, ...], ...]


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """A text and itself."""
    x = torch.randint(0, 99, (batch, length))
    return {"input_ids": x, "labels": x}


def images(batch: int) -> dict[str, torch.Tensor]:
    """Of one size."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.randint(0, 2, (batch,))}


def pairs(batch: int, length: int, answer: int) -> dict[str, torch.Tensor]:
    """A text and another of another length."""
    return {"input_ids": torch.randint(1, 100, (batch, length)), "labels": torch.randint(1, 100, (batch, answer))}


LENGTHS = ((4, 24), (2, 16), (3, 17), (5, 31))
FAMILIES = [
    Family("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99}, tokens, TEXT, LENGTHS),
    Family("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}, tokens, TEXT, LENGTHS),
    Family("BertForMaskedLM", "BertConfig", SMALL, tokens, TEXT, LENGTHS),
    Family("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 16, "patch_size": 8}, images,
           {"pixel_values": {0: "batch"}, "labels": {0: "batch"}}, ((4,), (2,), (7,))),
    Family("T5ForConditionalGeneration", "T5Config", {"num_layers": 1, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8,
           "vocab_size": 100, "decoder_start_token_id": 0}, pairs,
           {"input_ids": {0: "batch", 1: "length"}, "labels": {0: "batch", 1: "answer"}}, ((4, 24, 12), (2, 9, 17))),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config)
def test_a_model_has_eagers_bits_at_every_size(family: Family):
    """And at the second it is compared with a capture of its own."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family.config)(**family.settings)
    config.use_cache = False
    model = getattr(transformers, family.name)(config)
    inputs = family.inputs(*family.sizes[0])
    plans = SizedPlans(Session(model, (), inputs, machine="h100-80gb", time_limit=2, dynamic=family.dynamic))
    plans.prepare(2)
    modules = [plans.module(way) for way in plans.ways]

    assert plans.check_against(capture(model, (), family.inputs(*family.sizes[1]))) == family.sizes[1]
    for sizes in family.sizes:
        inputs = family.inputs(*sizes)
        known = step(model, model, inputs)
        assert plans.sizes_of((), inputs) == sizes
        assert all(equal(known, step(module, model, inputs)) for module in modules)

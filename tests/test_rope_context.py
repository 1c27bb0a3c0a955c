"""RoPE that follows the length of a text (dynamic, longrope): one length decides for all texts of a pair."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import tiny_model

import quantspec
from quantspec.self_check import incremental_logits

# A text of 100 tokens is not quantized.
GROUP = 64
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0 + channel / 8 for channel in range(8)],
    "long_factor": [2.0 + channel for channel in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONGROPE}

MODELS = {
    "longrope": lambda: tiny_model("llama", rope_parameters=LONGROPE),
    "dynamic": lambda: tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=ORIGINAL),
    "phi3": lambda: tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL),
    "by kind of layer": lambda: tiny_model("gemma3_text", rope_parameters=BY_LAYER),
}


def ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, num_tokens), generator=torch.Generator().manual_seed(1))


def model_of(name: str) -> torch.nn.Module:
    """A model of a kind that this transformers can read two long texts with."""
    model = MODELS[name]()
    try:
        for _ in range(2):
            own_logits(model, ids(100))
    except UnboundLocalError as error:
        pytest.skip(f"transformers {transformers.__version__} fails itself ({error}): run with a newer one")
    return MODELS[name]()


@torch.no_grad()
def own_logits(model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    return model(text, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_short_texts_are_computed_like_long_ones(name):
    """Of a text longer than the original context the model itself takes the same frequencies."""
    model = model_of(name)
    long = ids(100)
    qs = quantspec.convert(model, kv_group_size=GROUP, max_cache_len=100)
    assert qs.config.rope_context == 100
    decoded = incremental_logits(qs, long, 20, (1, 3, 36, 40))
    assert torch.allclose(decoded, own_logits(model, long)[:, 19:], atol=1e-4)
    # In the long text they came first; computed alone, the model would choose others for them.
    assert not torch.allclose(own_logits(model, long[:, :60])[:, -1], own_logits(model, long)[:, 59], atol=1e-2)


def test_rope_context_chooses_the_frequencies_of_short_texts():
    model = MODELS["longrope"]()
    short = ids(60)
    qs = quantspec.convert(model, kv_group_size=GROUP, rope_context=ORIGINAL)
    decoded = incremental_logits(qs, short, 20, (40,))
    assert torch.allclose(decoded, own_logits(model, short)[:, 19:], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_goes_on_choosing_by_length_and_the_pair_does_not_mind(name):
    model = model_of(name)
    # What a text has left behind must not decide.
    before = [own_logits(model, ids(count)) for count in (60, 100)]
    qs = quantspec.convert(model, kv_group_size=GROUP, max_cache_len=120, rope_context=60)
    text = qs.generate(ids(20), max_new_tokens=30, do_sample=False)
    after = [own_logits(model, ids(count)) for count in (100, 60)]
    assert all(map(torch.equal, before, reversed(after)))
    # The model ran since, at another length.
    own_logits(model, ids(100))
    assert torch.equal(qs.generate(ids(20), max_new_tokens=30, do_sample=False), text)
    assert torch.equal(model.generate(ids(20), max_new_tokens=30, do_sample=False), text)


def test_a_saved_pair_keeps_its_frequencies(tmp_path):
    model = MODELS["longrope"]()
    qs = quantspec.convert(model, kv_group_size=GROUP, max_cache_len=300)
    qs.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path, max_cache_len=50)
    assert loaded.config.rope_context == 300
    text = qs.generate(ids(20), max_new_tokens=30, do_sample=False)
    assert torch.equal(loaded.generate(ids(20), max_new_tokens=30, do_sample=False), text)
    with pytest.raises(ValueError, match="rope_context cannot change on loading, the saved pair was made with 300"):
        quantspec.from_pretrained(tmp_path, rope_context=50)


def test_rope_context_is_refused_where_nothing_follows_it():
    with pytest.raises(ValueError, match=r"rope_context=64 is for RoPE that depends on the length.*leave it None"):
        quantspec.convert(tiny_model("llama"), rope_context=64)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (True, TypeError), ("4096", TypeError)])
def test_rope_context_is_a_number_of_tokens(value, error):
    with pytest.raises(error, match="rope_context must be"):
        quantspec.QuantSpecConfig(rope_context=value)

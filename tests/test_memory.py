"""The plan of a cache's memory equals what is allocated, byte for byte."""

from __future__ import annotations

import pytest
import torch
from conftest import GROUP
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from quantspec.cache import HierarchicalCache
from quantspec.capture import CapturedLayer
from quantspec.memory import cache_bytes_per_token, expected_memory, full_precision_bytes


def layer(kv_heads: int = 2, key_dim: int = 64, value_dim: int = 64, window: int = 0) -> CapturedLayer:
    return CapturedLayer("", 2 * kv_heads, kv_heads, key_dim, value_dim, window, 0.0, False)


LAYERS = st.builds(layer, st.integers(1, 3), st.sampled_from([16, 80, 192]), st.sampled_from([16, 128, 256]))


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=3),
    context=st.integers(1, 3000),
    room=st.integers(0, 500),
    batch_size=st.integers(1, 3),
    kv_group_size=st.sampled_from([16, 32, 128]),
    num_speculative_tokens=st.integers(0, 15),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_plan_equals_allocation(layers, context, room, batch_size, kv_group_size, num_speculative_tokens, dtype):
    """By part, for any shape, length and batch; with a limit just above the context or beyond."""
    limit = context + room
    device = torch.device("cpu")
    cache = HierarchicalCache(layers, batch_size, kv_group_size, num_speculative_tokens, limit, dtype, device)
    cache.reserve(context)
    planned = expected_memory(
        layers,
        context,
        batch_size,
        kv_group_size=kv_group_size,
        num_speculative_tokens=num_speculative_tokens,
        dtype=dtype,
        max_cache_len=limit,
        device=device,
    )
    assert planned == cache.bytes_by_part()


def test_plan_equals_what_generate_takes(qs):
    """Of a model's captured layers, at the length that a call reserves."""
    qs.reset()
    prompt = torch.full((2, 5 * GROUP), 7)
    qs.generate(prompt, max_new_tokens=20, num_speculative_tokens=3, eos_token_id=None, do_sample=False)
    planned = expected_memory(
        qs.layers,
        5 * GROUP + 20,
        2,
        kv_group_size=GROUP,
        num_speculative_tokens=3,
        dtype=torch.float32,
        max_cache_len=qs.config.max_cache_len,
        device="cpu",
    )
    assert planned == qs.last_stats.cache_bytes


def test_bytes_per_token():
    """Worked by hand: 2 heads of 64 + 128 channels, groups of 32."""
    parts = cache_bytes_per_token([layer(2, 64, 128)], 32)
    # Keys: a float16 scale and zero for 64 channels of 32 tokens; values: one of each per token.
    assert parts == {"upper": 192, "lower": 192, "scales": 2 * (64 * 4 / 32 + 4)}
    assert cache_bytes_per_token([layer(2, 64, 128)] * 3, 32)["upper"] == 3 * 192
    # More than 128 channels of values have two groups.
    assert cache_bytes_per_token([layer(1, 64, 256)], 64)["scales"] == 4 + 8


@pytest.mark.parametrize("window", [0, 12])
def test_full_precision_is_transformers_cache(qs, window):
    """Layer by layer what Hugging Face's own cache holds after 40 tokens, windows included."""
    from tiny_models import tiny_model

    model = qs.model if not window else tiny_model("mistral")
    output = model(torch.randint(3, 96, (2, 40)), past_key_values=DynamicCache(config=model.config), use_cache=True)
    tensors = [tensor for held in output.past_key_values.layers for tensor in (held.keys, held.values)]
    layers = [layer(2, 16, 16, window)] * 2
    kept = sum(tensor.nbytes for tensor in tensors)
    # A sliding cache keeps one token less than its window: the next one is added before attention reads it.
    assert full_precision_bytes(layers, 40, 2, torch.float32) == kept

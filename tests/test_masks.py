"""Masks as intervals: each query's first visible key is that of a window, of its chunk, or none is hidden."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.llama import modeling_llama

import quantspec
from quantspec import UnsupportedModelError
from quantspec.capture import capture

CHUNK = 12


@pytest.fixture(scope="module")
def chunked_qs():
    return quantspec.convert(tiny_model("llama4_text"), kv_group_size=64)


def test_chunks_and_full_attention_are_told_apart(chunked_qs):
    assert [(layer.window, layer.chunk) for layer in chunked_qs.layers] == [(0, CHUNK), (0, 0)]


def test_inspect_tells_chunks(run, tmp_path):
    """Without weights, too."""
    tiny_model("llama4_text").config.save_pretrained(tmp_path)
    status, out, err = run("inspect", tmp_path, "--json")
    assert (status, err) == (0, "")
    told = [(layer["kind"], layer["window"], layer["chunk"]) for layer in json.loads(out)["attention"]]
    assert told == [("chunks", None, CHUNK), ("full", None, None)]
    assert f"chunks of {CHUNK}" in run("inspect", tmp_path, "--layers")[1]


@pytest.mark.parametrize("gamma", [0, 4])
def test_a_padded_batch_counts_chunks_from_each_text(chunked_qs, gamma):
    """Nothing is quantized: the ops' own tests let chunks end inside the planes and behind them."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 96, (count,), generator=generator) for count in (53, 41)]
    ids = torch.zeros(2, 53, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "num_speculative_tokens": gamma}
    together = chunked_qs.generate(ids, mask, **options)
    for row, prompt in enumerate(prompts):
        alone = chunked_qs.generate(prompt[None], torch.ones(1, len(prompt)), **options | {"num_speculative_tokens": 0})
        assert torch.equal(together[row, 53:], alone[0, len(prompt) :])


def test_a_chunk_does_not_see_another(chunked_qs):
    """In the one layer that sees nothing else, keys of the chunk before change nothing."""
    graph = chunked_qs.pair.captured.graph_module.graph
    markers = graph.find_nodes(op="call_function", target=torch.ops.quantspec.attention.default)
    assert [marker.args[5] for marker in markers] == [-CHUNK, 0]
    query, key, value = (torch.randn(1, 2, 2 * CHUNK, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    out = torch.ops.quantspec.attention(query, key, value, 0, 0.3, -CHUNK, 0.0, None)
    key[:, :, :CHUNK] = value[:, :, :CHUNK] = 0
    changed = torch.ops.quantspec.attention(query, key, value, 0, 0.3, -CHUNK, 0.0, None)
    assert torch.equal(out[:, CHUNK:], changed[:, CHUNK:])
    assert not torch.equal(out[:, :CHUNK], changed[:, :CHUNK])


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda packed, b, h, q, kv: packed[b, q] == packed[b, kv], "more than the tokens' positions"),
        (lambda packed, b, h, q, kv: kv >= q // 4 * 3, "not causal with an optional sliding window or chunks"),
    ],
    ids=["packed sequences", "neither window nor chunk"],
)
def test_other_masks_are_refused_by_name(monkeypatch, rule, reason):
    packed = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    masks = functools.partial(modeling_llama.create_causal_mask, and_mask_function=functools.partial(rule, packed))
    monkeypatch.setattr(modeling_llama, "create_causal_mask", masks)
    with pytest.raises(UnsupportedModelError, match=f"model.layers.0.self_attn.*{reason}"):
        capture(tiny_model("llama"))

"""The memory of transformers' own cache is told as that cache holds it."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from repeats import only
from test_rings import SHARING
from tiny_models import tiny_model
from torch import Tensor

from quantspec import QuantSpecConfig
from quantspec.capture import capture, converting
from quantspec.capture.kept import kept_or_captured
from quantspec.memory import full_precision_bytes
from quantspec.pair.preview import structure_of

# Latents, a shared cache, windows, two attention calls a layer, one key head, two kinds of head dims.
MODELS = ("llama", "deepseek_v3", "mistral", "gemma2", "gemma3", "gpt_oss", "diffllama", "gpt_bigcode")
TOKENS = 40


def held_by_transformers(model) -> int:
    ids = torch.randint(3, 96, (2, TOKENS))
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.dim() > 1)


@pytest.mark.parametrize("architecture", only(set(MODELS) - {"gemma3", "gpt_oss"}, MODELS))
def test_full_precision_bytes_of_a_capture_are_transformers_own(architecture):
    model = tiny_model(architecture)
    with converting():
        layers = kept_or_captured(model, None).layers
    assert all(layer.held is not None for layer in layers)
    assert full_precision_bytes(layers, TOKENS, 2, torch.float32) == held_by_transformers(model)
    # From the config alone, in the checkpoint's dtype.
    model.config.dtype = torch.bfloat16
    structure = structure_of(model.config, QuantSpecConfig())
    assert structure.dtype == torch.bfloat16
    assert [layer.held for layer in structure.layers] == [layer.held for layer in layers]


def test_capturing_draws_no_warning_of_transformers(monkeypatch):
    """Each of them is shown once in a process, so another test may have been first."""
    warnings = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text, *_: warnings.append(text))
    with converting():
        capture(tiny_model("llama"))
    assert not warnings


def test_shared_keys_and_values_count_once():
    model = tiny_model("gemma3n_text", **SHARING)
    with converting():
        layers = kept_or_captured(model, None).layers
    assert len(layers) == 4
    assert full_precision_bytes(layers, TOKENS, 2, torch.float32) == held_by_transformers(model)


def test_a_model_without_a_known_cache_counts_keys_and_values():
    model = tiny_model("llama")
    with converting():
        layers = kept_or_captured(model, None).layers
    unknown = [dataclasses.replace(layer, held=None) for layer in layers]
    assert full_precision_bytes(unknown, TOKENS) == full_precision_bytes(layers, TOKENS)


def test_inspect_tells_where_the_cache_is_larger_than_transformers_own(run, tmp_path):
    # Too wide to be cached instead of the heads that are made of it.
    tiny_model("deepseek_v3", kv_lora_rank=64).config.save_pretrained(tmp_path / "latent")
    tiny_model("llama", max_position_embeddings=8192).config.save_pretrained(tmp_path / "plain")
    status, out, _ = run("inspect", tmp_path / "latent")
    memory = json.loads(run("inspect", tmp_path / "latent", "--json")[1])["memory"]
    times = sum(memory["cache"].values()) / memory["unconverted"]["cache"]
    assert status == 0
    assert times > 1
    assert f"{times:.1f} times what transformers' own does" in " ".join(out.split())
    assert "transformers' own" not in run("inspect", tmp_path / "plain")[1]


def test_a_model_that_reads_how_many_tokens_an_expert_gets():
    model = tiny_model("jetmoe", kv_channels=16, num_local_experts=4, num_experts_per_tok=2)
    with converting():
        layers = capture(model).layers
    assert full_precision_bytes(layers, TOKENS, 2, torch.float32) == held_by_transformers(model)
    structure = structure_of(model.config, QuantSpecConfig())
    assert [layer.held for layer in structure.layers] == [layer.held for layer in layers]

"""The sizes of plain decoders, told without torch, are those of a capture; what is not plain is left to that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from quantspec import QuantSpecConfig
from quantspec.cli._captured import captured_sizes
from quantspec.cli._plain import _DECODERS, plain_sizes
from quantspec.cli.inspect import _as_dict
from quantspec.cli.loading import Kind, Source
from quantspec.pair.preview import structure_of

TYPES = tuple(_DECODERS)
NUMBERS = {
    "hidden_size": 384,
    "intermediate_size": 640,
    "max_position_embeddings": 5000,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
# What a type's default would make no plain decoder of.
OWN = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 64},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64},
}
OPTIONS = QuantSpecConfig()


def write(folder, kind, **changes):
    """A config as the Hub has it; a change to ``...`` leaves the key out."""
    config = {
        "architectures": [_DECODERS[kind].architecture],
        "model_type": kind,
        **NUMBERS,
        **OWN.get(kind, {}),
        "torch_dtype": "bfloat16",
        "rope_theta": 1e6,
        **changes,
    }
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return Source(Kind.FOLDER, str(folder))


def captured(source, options, dtype=None):
    config = AutoConfig.from_pretrained(source.name)
    return captured_sizes(structure_of(config, options, dtype and getattr(torch, dtype)), options)


def assert_alike(source, options=OPTIONS, dtype=None):
    plain, other = plain_sizes(source, options, dtype), captured(source, options, dtype)
    for context, batch_size in ((1, 1), (200, 2), (4999, 3)):
        assert _as_dict(plain, context, batch_size, 1) == _as_dict(other, context, batch_size, 1)
    assert plain.limit == other.limit


@pytest.mark.parametrize("kind", TYPES)
def test_as_a_capture_tells(kind, tmp_path):
    assert_alike(write(tmp_path, kind))


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"kv_group_size": 16, "weight_group_size": 32},
        ),
        (
            "llama",
            {"tie_word_embeddings": True, "head_dim": 128, "torch_dtype": ...},
            {"num_speculative_tokens": 0, "quantize_lm_head": True},
        ),
        (
            "qwen2",
            {"use_sliding_window": False, "sliding_window": 300, "max_window_layers": 2, "num_key_value_heads": 6},
            {"num_speculative_tokens": 15, "max_cache_len": 6000},
        ),
        ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 128}, {}),
        # Widths that groups of 128, or of the size asked for, do not divide.
        ("llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}, {}),
        ("llama", {"hidden_size": 96}, {"weight_group_size": 256}),
        ("llama", {"intermediate_size": 600}, {"quantize_lm_head": True}),
        ("mixtral", {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5}, {}),
        # What other software wrote.
        (
            "llama",
            {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
            {},
        ),
        ("qwen2", {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096}, {}),
    ],
)
def test_what_changes_sizes(kind, changes, options, tmp_path):
    assert_alike(write(tmp_path, kind, **changes), QuantSpecConfig(**options), "float32" if options else None)


@pytest.mark.parametrize("kind", TYPES)
def test_what_transformers_writes_of_a_config_is_read_in_the_same_way(kind, tmp_path):
    source = write(tmp_path, kind)
    expected = plain_sizes(source, OPTIONS, None)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    found = plain_sizes(source, OPTIONS, None)
    assert _as_dict(found, 999, 2, 1) == _as_dict(expected, 999, 2, 1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"layer_scale": 1}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}),
        ("llama", {"architectures": ...}),
        ("llama", {"model_type": "mamba"}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"head_dim": 256}),
        ("llama", {"num_key_value_heads": ...}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"hidden_size": 385}),
        ("llama", {"vocab_size": "131"}),
        ("llama", {"num_hidden_layers": True}),
        ("llama", {"pad_token_id": -1}),
        ("llama", {"hidden_act": "no such"}),
        ("llama", {"dtype": "float32"}),
        ("llama", {"torch_dtype": "float8"}),
        ("mistral", {"sliding_window": 300}),
        ("mistral", {"sliding_window": ...}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 300}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("llama", {"torch_dtype": ["float32"]}),
        ("llama", {"head_dim": 0}),
        ("llama", {"head_dim": None, "num_attention_heads": 10}),
        ("qwen3", {"head_dim": ...}),
        ("qwen3", {"head_dim": None}),
        ("qwen3_moe", {"head_dim": ...}),
        ("mixtral", {"sliding_window": 300}),
        ("mixtral", {"num_local_experts": ...}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"num_local_experts": 5}),
    ],
)
def test_what_is_not_plain(kind, changes, tmp_path):
    assert plain_sizes(write(tmp_path, kind, **changes), OPTIONS, None) is None


def test_an_option_whose_sizes_depend_on_more(tmp_path):
    assert plain_sizes(write(tmp_path, "llama"), QuantSpecConfig(num_speculative_tokens="auto"), None) is None


@pytest.mark.parametrize("text", [None, "[]", "{", "{}"])
def test_what_cannot_be_read_is_left_to_transformers(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert plain_sizes(Source(Kind.FOLDER, str(tmp_path)), OPTIONS, None) is None


def test_inspect_of_a_plain_decoder_imports_neither_torch_nor_transformers(tmp_path):
    write(tmp_path, "llama")
    code = (
        "import sys; from quantspec.cli import main; status = main(['inspect', sys.argv[1], '--gpu', '24']); "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); sys.exit(status)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "It fits: " in ended.stdout

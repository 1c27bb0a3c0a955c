"""GGUF files: whatever their quantization, their weights become dense before they are converted."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
import transformers
from step_by_step import random_prompt

import quantspec
from quantspec.cli.loading import find_source, load_model
from quantspec.evals.adapter import QuantSpecLM

HIDDEN, VOCAB = 256, 96
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp stores their rows in another order.
REORDERED = ("attn_q", "attn_k")


def random_q4_k(rows: int, seed: str) -> np.ndarray:
    """``(rows, 144)`` bytes, a block of 256 weights each: two float16 scales, their 6-bit factors, codes."""
    random = np.random.default_rng(list(seed.encode()))
    scales = np.array([1e-4, 7.5e-4], np.float16).view(np.uint8)  # of codes 0..15, and of what is subtracted
    return np.concatenate((np.tile(scales, (rows, 1)), random.integers(0, 256, (rows, 140), np.uint8)), 1)


@pytest.fixture(scope="module")
def q4_k_file(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A llama of one layer in Q4_K blocks, and its quantized tensors by name."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_K.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    names = {"token_embd": VOCAB, "output": VOCAB, **{f"blk.0.{name}": HIDDEN for name in LINEARS}}
    tensors = {name: random_q4_k(rows, name) for name, rows in names.items()}
    for name, blocks in tensors.items():
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_a_q4_k_file_is_dense_and_converts(q4_k_file):
    """Its weights are those that gguf itself dequantizes; greedy text is that of the model."""
    path, tensors = q4_k_file
    model = load_model(find_source(str(path)), torch.float32, torch.device("cpu"))
    layer = model.model.layers[0]
    for name, module in LINEARS.items():
        weight = layer.get_submodule(module).weight
        expected = gguf.quants.dequantize(tensors[f"blk.0.{name}"], gguf.GGMLQuantizationType.Q4_K)
        actual = weight.detach().numpy()
        if name in REORDERED:
            actual, expected = np.sort(actual, 0), np.sort(expected, 0)
        np.testing.assert_array_equal(actual, expected)
    qs = quantspec.convert(model, kv_group_size=16)
    prompt = random_prompt(20)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(qs.generate(ids, **options), model.generate(ids, **options))


def test_a_file_is_read_once_and_what_reads_it_stays_as_it_was(q4_k_file):
    read, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with mock.patch.object(gguf, "GGUFReader", wraps=read) as reader:
        with mock.patch.object(gguf, "get_tensor_name_map", wraps=names) as tables:
            load_model(find_source(str(q4_k_file[0])), torch.float32, torch.device("cpu"))
        # The patches are as they were, so that nothing is kept for another file.
        assert gguf.GGUFReader is reader
    assert reader.call_count == 1
    assert tables.call_count == 1


@pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="needs transformers 5.23 or newer")
def test_dense_weights_are_asked_for(q4_k_file, tokenizer):
    """So that they do not stay packed where a kernel that multiplies packed weights is installed."""
    source = find_source(str(q4_k_file[0]))
    loader = transformers.AutoModelForCausalLM
    with mock.patch.object(loader, "from_pretrained", wraps=loader.from_pretrained) as load:
        load_model(source, torch.float32, torch.device("cpu"))
        QuantSpecLM(source.name, gguf_file=source.gguf_file, dtype="float32", role="reference", tokenizer=tokenizer)
    assert [call.kwargs["quantization_config"].dequantize for call in load.call_args_list] == [True, True]

"""JSON by the grammar libraries on a real tokenizer: valid, and the same with and without drafts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gguf_reading import read_at_once
from tiny_models import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import quantspec
from quantspec.evals.smollm2 import gguf_path

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "green", "dark blue"]},
        "sizes": {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "colour", "sizes"],
    "additionalProperties": False,
}
Options = dict[str, Any]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer."""
    path = gguf_path()
    with read_at_once():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def pair(words) -> quantspec.QuantSpecModel:
    """A converted random llama with that vocabulary."""
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return quantspec.convert(tiny_model("llama", vocab_size=len(words), **ids), self_check=False)


def llguidance(pair: quantspec.QuantSpecModel, words: PreTrainedTokenizerBase) -> Callable[[], Options]:
    schema = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
    return lambda: {"json_schema": schema, "tokenizer": words}


def xgrammar(pair: quantspec.QuantSpecModel, words: PreTrainedTokenizerBase) -> Callable[[], Options]:
    library = pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install -e '.[dev]'")
    from xgrammar.contrib.hf import LogitsProcessor

    vocabulary = library.TokenizerInfo.from_huggingface(words, vocab_size=pair.vocab_size)
    grammar = library.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    return lambda: {"logits_processor": [LogitsProcessor(grammar)]}


def outlines(pair: quantspec.QuantSpecModel, words: PreTrainedTokenizerBase) -> Callable[[], Options]:
    library = pytest.importorskip("outlines", reason="outlines is not installed: pip install -e '.[dev]'")
    from outlines.backends import get_json_schema_logits_processor

    model = library.from_transformers(pair.model, words)
    processor = get_json_schema_logits_processor("outlines_core", model, json.dumps(SCHEMA), whitespace_pattern="")

    def options() -> Options:
        processor.reset()
        return {"logits_processor": [processor]}

    return options


@pytest.mark.parametrize("library", [llguidance, xgrammar, outlines], ids=lambda library: library.__name__)
def test_json_is_valid_and_the_same_with_drafts(pair, words, library):
    options = library(pair, words)
    inputs = words(["Describe it in JSON:", "Another one:"], return_tensors="pt", padding=True, padding_side="left")
    for count in (1, 2):
        rows = {name: tensor[:count] for name, tensor in inputs.items()}
        given = {**rows, "do_sample": False, "max_new_tokens": 60}
        expected = pair.generate(**given, **options(), num_speculative_tokens=0)
        for row in expected[:, inputs["input_ids"].shape[1] :]:
            value = json.loads(words.decode(row, skip_special_tokens=True))
            assert list(value) == ["name", "colour", "sizes"]
            assert len(value["name"]) <= 8
            assert value["colour"] in ("red", "green", "dark blue")
            assert set(value["sizes"]) <= {1, 20, 300}
        assert torch.equal(pair.generate(**given, **options(), num_speculative_tokens=4), expected)
        assert pair.last_stats.drafted > 0

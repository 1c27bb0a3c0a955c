"""JSON by the grammar libraries on a real tokenizer: valid, and the same with and without drafts."""

from __future__ import annotations

import json

import pytest
import torch
from gguf_reading import read_at_once
from tiny_models import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import quantspec
from quantspec.benchmarks.structured import LIBRARIES, follows_schema, measure
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


@pytest.mark.parametrize("library", LIBRARIES)
def test_json_is_valid_and_the_same_with_drafts(pair, words, library):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[dev]'")
    options = LIBRARIES[library](pair, words, SCHEMA)
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


def test_the_benchmark_says_whether_json_is_valid(pair, words):
    """A random model's strings have no end but the schema's."""
    rows = list(measure(pair, words, 400, ["llguidance"]))
    assert [row["num_speculative_tokens"] for row in rows] == [0, 4]
    assert all(row["valid"] and row["same_as_without_drafts"] for row in rows)
    assert rows[1]["mean_acceptance_length"] > 1 == rows[0]["mean_acceptance_length"]
    cut = next(measure(pair, words, 10, ["llguidance"]))
    assert not cut["valid"]
    assert not follows_schema('{"name": 1}')

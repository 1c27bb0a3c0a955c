"""Texts that follow a JSON schema, a regular expression or a grammar: complete, the same at every number of drafts."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doc_blocks import stand_in_tokenizer
from scipy.stats import chisquare
from step_by_step import pad_batch
from test_sampling import ALPHA
from tiny_models import tiny_model
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizer, PreTrainedTokenizerFast

import quantspec

# Random models fill strings to their end.
WORD = {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"}
PERSON = {
    "type": "object",
    "properties": {
        "name": WORD,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
NESTED = {
    "type": "object",
    "properties": {"of": {"$ref": "#/$defs/node"}},
    "required": ["of"],
    "additionalProperties": False,
    "$defs": {
        "node": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "array", "items": WORD, "maxItems": 2}]}
    },
    "x-guidance": {"whitespace_flexible": False},
}
CHOICES = [1, "deux", None, ["trois", 3]]
SUM = """
start: term ("+" term)~1..2
term: NUMBER | "(" NUMBER "-" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def is_person(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    return (
        re.fullmatch("[a-z]{0,5}", value["name"]) is not None
        and value["age"] in range(151)
        and len(value["tags"]) in (1, 2)
        and set(value["tags"]) <= {"red", "green", "blue"}
    )


def is_nested(text: str) -> bool:
    value = json.loads(text)["of"]
    return value is None or isinstance(value, bool) or all(re.fullmatch("[a-z]{0,5}", word) for word in value)


STRUCTURES: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "schema": ({"json_schema": PERSON}, is_person),
    "schema as text": ({"json_schema": json.dumps(NESTED)}, is_nested),
    "alternatives": ({"json_schema": {"enum": CHOICES}}, lambda text: json.loads(text) in CHOICES),
    "regex": ({"regex": r"[A-F]{3}-([0-9]{4}|x+y){1,3}\."}, re.compile(r"[A-F]{3}-([0-9]{4}|x+y){1,3}\.").fullmatch),
    "other letters": ({"regex": "(é|ß|日本|🙂){3}"}, re.compile("(é|ß|日本|🙂){3}").fullmatch),
    "grammar": ({"grammar": SUM}, re.compile(r"(\d+|\(\d+-\d+\))(\+(\d+|\(\d+-\d+\))){1,2}").fullmatch),
}
NEW_TOKENS = 100


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token per byte."""
    return stand_in_tokenizer()


@pytest.fixture(scope="module")
def pair(letters) -> quantspec.QuantSpecModel:
    """A converted random llama with that vocabulary and more rows than tokens, in which nothing here is quantized."""
    ids = {name: getattr(letters, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return quantspec.convert(tiny_model("llama", vocab_size=len(letters) + 21, **ids), self_check=False)


def prompts(letters: PreTrainedTokenizerFast, count: int) -> dict[str, Tensor]:
    """Prompts of different lengths, padded left."""
    rows = [letters(text).input_ids for text in ("A person:", "Somebody", "Another one, please:")[:count]]
    longest = max(map(len, rows))
    ids, mask = pad_batch(rows, [longest - len(row) for row in rows], longest)
    return {"input_ids": ids, "attention_mask": mask}


def new_texts(letters: PreTrainedTokenizerFast, ids: Tensor, prompt_len: int) -> list[str]:
    """Each row's new text; fails where a row has not ended by itself."""
    rows = ids[:, prompt_len:].tolist()
    assert all(letters.eos_token_id in row for row in rows), "a text was cut"
    return [letters.decode(row[: row.index(letters.eos_token_id)]) for row in rows]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", STRUCTURES)
def test_greedy_text_follows_its_structure_at_every_number_of_drafts(pair, letters, name, batch):
    structure, follows = STRUCTURES[name]
    inputs = prompts(letters, batch)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "tokenizer": letters, **inputs}
    expected = pair.generate(num_speculative_tokens=0, **options, **structure)
    prompt_len = inputs["input_ids"].shape[1]
    texts = new_texts(letters, expected, prompt_len)
    assert all(follows(text) for text in texts), texts
    for gamma in (1, 4):
        assert torch.equal(pair.generate(num_speculative_tokens=gamma, **options, **structure), expected), gamma
        assert pair.last_stats.drafted > 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_sampled_text_follows_its_structure(pair, letters, name):
    structure, follows = STRUCTURES[name]
    inputs = prompts(letters, 3)
    for seed in (1, 2):
        ids = pair.generate(
            **inputs,
            **structure,
            tokenizer=letters,
            do_sample=True,
            temperature=1.5,
            top_k=20,
            seed=seed,
            max_new_tokens=200,
        )
        texts = new_texts(letters, ids, inputs["input_ids"].shape[1])
        assert all(follows(text) for text in texts), texts


def test_sampled_texts_have_the_distribution_without_drafts(pair, letters):
    """How often each of a few texts comes, against the target's own probabilities among what is allowed."""
    inputs = prompts(letters, 1)
    prompt_len = inputs["input_ids"].shape[1]
    texts = [a + b for a in "abc" for b in "xy"]
    probs = []
    for text in texts:
        ids = torch.tensor([[*inputs["input_ids"][0].tolist(), *letters(text).input_ids]])
        logits = pair.model(ids).logits[0, prompt_len - 1 :].double()
        first, second = (logits[step, letters(some).input_ids] for step, some in ((0, "abc"), (1, "xy")))
        probs.append(first.softmax(-1)["abc".index(text[0])] * second.softmax(-1)["xy".index(text[1])])
    rows, seeds = 200, 3
    batch = {name: tensor.expand(rows, -1) for name, tensor in inputs.items()}
    options = {"tokenizer": letters, "do_sample": True, "top_k": 0, "max_new_tokens": 4, "num_speculative_tokens": 3}
    found: Counter[str] = Counter()
    for seed in range(seeds):
        ids = pair.generate(**batch, regex="[abc][xy]", seed=rows * seed, **options)
        found.update(new_texts(letters, ids, prompt_len))
    expected = rows * seeds * torch.tensor(probs)
    assert expected.min() > 5, "some text is too rare to count"
    assert chisquare([found[text] for text in texts], expected.numpy()).pvalue > ALPHA


class Record(LogitsProcessor):
    """Keeps which tokens have a score."""

    def __init__(self) -> None:
        self.finite: list[Tensor] = []

    def __call__(self, input_ids, scores):
        self.finite.append(scores[0].isfinite())
        return scores


def test_only_what_the_grammar_allows_has_a_score(pair, letters):
    """EOS where the text may end and nowhere else; nothing that no token stands for."""
    # A warper runs behind the grammar: what it leaves of 300 tokens is what is allowed.
    output = pair.generate(
        **prompts(letters, 1),
        regex="a(b|c)d*",
        tokenizer=letters,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        num_speculative_tokens=2,
    )
    allowed = [set(scores[0].isfinite().nonzero().flatten().tolist()) for scores in output.scores]
    (a,), (b,), (c,), (d,) = (letters(letter).input_ids for letter in "abcd")
    assert allowed[:2] == [{a}, {b, c}]
    assert all(tokens == {d, letters.eos_token_id} for tokens in allowed[2:])
    assert allowed[2:]


def test_a_processor_of_the_callers_runs_besides(pair, letters):
    """And sees the text as ever; forbidding a token leaves the grammar's others."""
    recorder = Record()
    (b,) = letters("b").input_ids
    options = {"tokenizer": letters, "regex": "[ab]{6}", "suppress_tokens": [b], "logits_processor": [recorder]}
    inputs = prompts(letters, 1)
    ids = pair.generate(**inputs, max_new_tokens=10, **options)
    assert new_texts(letters, ids, inputs["input_ids"].shape[1]) == ["aaaaaa"]
    assert len(recorder.finite) == 7


def test_what_leaves_no_token_is_an_error(pair, letters):
    for options in ({"min_new_tokens": 9}, {"suppress_tokens": letters("b").input_ids}):
        with pytest.raises(FloatingPointError, match="no token is left that the grammar allows"):
            pair.generate(**prompts(letters, 2), regex="ab{2}", tokenizer=letters, max_new_tokens=10, **options)


@pytest.mark.parametrize("pad", ["its own", "EOS"])
def test_a_row_that_has_ended_needs_no_token(pair, letters, pad):
    """By EOS, or at its own limit, beside one that goes on: what other options leave of it is of no account."""
    (one,) = letters("1").input_ids
    options = {
        "regex": "12?3?4?5?6?",
        "tokenizer": letters,
        "no_repeat_ngram_size": 1,
        "row_options": [{"sequence_bias": [[[one, letters.eos_token_id], 1e4]]}, {"max_new_tokens": 2}, {}],
        "sequence_bias": [[[letters.eos_token_id], -1e4]],
        "pad_token_id": letters.pad_token_id if pad == "its own" else letters.eos_token_id,
    }
    inputs = prompts(letters, 3)
    ids = pair.generate(**inputs, max_new_tokens=10, **options)[:, inputs["input_ids"].shape[1] :]
    assert ids[0, :2].tolist() == [one, letters.eos_token_id]
    assert ids[1, 0] == one
    assert set(ids[1, 2:].tolist()) == {options["pad_token_id"]}
    assert ids.shape[1] > 3


# --- Where the end comes from ----------------------------------------------------------------------------------------


def test_each_of_several_eos_tokens_may_end_the_text(pair, letters):
    inputs = prompts(letters, 1)
    ends = [letters.eos_token_id, letters.pad_token_id]
    found = set()
    for seed in range(12):
        ids = pair.generate(
            **inputs,
            regex="ab",
            tokenizer=letters,
            eos_token_id=ends,
            do_sample=True,
            seed=seed,
            temperature=3.0,
            top_k=0,
        )
        text = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert letters.decode(text[:2]) == "ab"
        assert len(text) == 3
        found.add(text[2])
    assert found == set(ends)


def test_an_eos_token_that_there_is_not_ends_no_text(pair, letters):
    """Beside one that there is."""
    inputs = prompts(letters, 1)
    for none in (-1, len(letters) + 3, 2**40):
        ids = pair.generate(**inputs, regex="abc", tokenizer=letters, eos_token_id=[none, letters.eos_token_id])
        assert new_texts(letters, ids, inputs["input_ids"].shape[1]) == ["abc"]
    with pytest.raises(ValueError, match=r"regex ends the text with EOS, .* pass eos_token_id="):
        pair.generate(**inputs, regex="abc", tokenizer=letters, eos_token_id=-1)


@pytest.mark.parametrize("place", ["keyword", "config"])
def test_without_eos_in_the_options_the_tokenizers_ends_the_text(pair, letters, place, monkeypatch):
    monkeypatch.setattr(pair.model, "generation_config", GenerationConfig(pad_token_id=0))
    options = {"eos_token_id": None} if place == "keyword" else {}
    inputs = prompts(letters, 2)
    ids = pair.generate(**inputs, regex="abc", tokenizer=letters, max_new_tokens=20, **options)
    assert new_texts(letters, ids, inputs["input_ids"].shape[1]) == ["abc", "abc"]


def test_a_text_may_be_cut_and_several_may_come_of_a_prompt(pair, letters):
    inputs = prompts(letters, 1)
    prompt_len = inputs["input_ids"].shape[1]
    options = {"regex": "[xyz]{20}", "tokenizer": letters, "do_sample": True, "seed": 1}
    texts = pair.generate(**inputs, max_new_tokens=7, num_return_sequences=3, **options)[:, prompt_len:]
    assert all(re.fullmatch("[xyz]{7}", text) for text in letters.batch_decode(texts))
    assert len(set(letters.batch_decode(texts))) > 1


def test_each_turn_of_a_conversation_has_a_structure_of_its_own(pair, letters):
    inputs = prompts(letters, 1)
    first = pair.generate(**inputs, regex="one", tokenizer=letters)
    longer = torch.cat((first, torch.tensor([letters(" and ").input_ids])), 1)
    second = pair.generate(longer, regex="two", tokenizer=letters, continue_cache=True)
    assert new_texts(letters, second, longer.shape[1]) == ["two"]
    assert pair.last_stats.continued_tokens > 0


def test_tokens_that_were_added_to_a_tokenizer_are_known(pair):
    """To one that has been used for a grammar before."""
    grown = stand_in_tokenizer()
    inputs = prompts(grown, 1)
    prompt_len = inputs["input_ids"].shape[1]
    assert new_texts(grown, pair.generate(**inputs, regex="ab", tokenizer=grown), prompt_len) == ["ab"]
    grown.add_tokens("ab")
    added = grown.convert_tokens_to_ids("ab")
    found = pair.generate(**inputs, regex="ab", tokenizer=grown, sequence_bias=[[[added], 1e4]])
    assert found[0, prompt_len:].tolist() == [added, grown.eos_token_id]


def test_the_view_takes_a_structure_too(pair, letters):
    inputs = prompts(letters, 1)
    ids = pair.as_pretrained_model().generate(**inputs, json_schema={"const": 7}, tokenizer=letters)
    assert new_texts(letters, ids, inputs["input_ids"].shape[1]) == ["7"]


# --- What is refused, before any work --------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two": ({"regex": "a", "json_schema": {}}, ValueError, "json_schema and regex are different structures"),
    "list": ({"json_schema": [1]}, TypeError, "json_schema must be a dict or JSON text, not list"),
    "class": ({"json_schema": GenerationConfig}, TypeError, r"a pydantic model has model_json_schema\(\)"),
    "no JSON": ({"json_schema": "{'type': 'string'}"}, ValueError, "json_schema is no JSON: Expecting property name"),
    "set": ({"json_schema": {"enum": {1}}}, ValueError, "json_schema is no JSON: .*set"),
    "no schema": ({"json_schema": "[1]"}, ValueError, "json_schema cannot be used: .*object schema"),
    "type": ({"json_schema": {"type": "objekt"}}, ValueError, "json_schema cannot be used: Invalid type: objekt"),
    "keyword": ({"json_schema": {"uniqueItems": True}}, ValueError, "json_schema cannot be used: Unimplemented keys"),
    "regex of bytes": ({"regex": b"a"}, TypeError, "regex must be a str, not bytes"),
    "open group": ({"regex": "(a"}, ValueError, "regex cannot be used: .*unclosed group"),
    "look-ahead": ({"regex": "a(?=b)"}, ValueError, "regex cannot be used: .*look-around"),
    "no text at all": ({"regex": r"a[^\s\S]"}, ValueError, "regex cannot be used: NoExtensionBias"),
    "grammar of a dict": ({"grammar": {}}, TypeError, "grammar must be a str, not dict"),
    "unknown rule": ({"grammar": "start: other"}, ValueError, 'grammar cannot be used: .*unknown name: "other"'),
    "no grammar": ({"grammar": "nothing"}, ValueError, "grammar cannot be used: "),
    "infinity": ({"json_schema": {"maximum": math.inf}}, ValueError, "json_schema cannot be used: expected value"),
    "half a letter": ({"json_schema": {"const": "\ud800"}}, ValueError, "json_schema cannot be used: .*escape"),
    "regex of half a letter": ({"regex": "\ud800"}, ValueError, "regex cannot be used: .*surrogates"),
    "empty grammar": ({"grammar": ""}, ValueError, "grammar cannot be used: Empty grammar"),
}


@pytest.fixture
def idle(pair, monkeypatch):
    """The pair, which must do no work."""

    def forward(*arguments: object, **options: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(type(pair.pair), "forward", forward)
    return pair


@pytest.mark.parametrize("name", BAD)
def test_a_bad_structure_is_refused(idle, letters, name):
    structure, kind, message = BAD[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        idle.generate(**prompts(letters, 1), **structure, tokenizer=letters)


def test_a_row_has_no_eos_of_its_own_beside_a_structure(idle, letters):
    with pytest.raises(ValueError, match=r"row_options\[1\] cannot set eos_token_id beside regex, which ends all rows"):
        idle.generate(**prompts(letters, 2), regex="a", tokenizer=letters, row_options=[{}, {"eos_token_id": 5}])


@pytest.mark.parametrize("structure", [{"json_schema": {}}, {"regex": "a"}, {"grammar": 'start: "a"'}], ids=str)
def test_a_structure_without_a_usable_tokenizer_is_refused(idle, letters, tokenizer, structure):
    (name,) = structure
    inputs = prompts(letters, 1)
    with pytest.raises(ValueError, match=rf"{name} needs the tokenizer: pass tokenizer=... to generate\(\)"):
        idle.generate(**inputs, **structure)

    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    for other in (Slow(eos_token="e"), object()):
        with pytest.raises(TypeError, match=f"{name} needs a fast tokenizer, .* not {type(other).__name__}"):
            idle.generate(**inputs, **structure, tokenizer=other)
    with pytest.raises(ValueError, match="llguidance cannot read the tokenizer: "):
        idle.generate(**inputs, **structure, tokenizer=tokenizer)


def test_a_structure_without_eos_is_refused(idle, letters, monkeypatch):
    monkeypatch.setattr(idle.model, "generation_config", GenerationConfig(pad_token_id=0))
    endless = stand_in_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"regex ends the text with EOS, and neither .* pass eos_token_id="):
        idle.generate(**prompts(letters, 1), regex="a", tokenizer=endless)


def test_without_llguidance_the_extra_is_named(idle, letters, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"json_schema is followed by llguidance: pip install .*\[structured\]'"):
        idle.generate(**prompts(letters, 1), json_schema={}, tokenizer=letters)


def test_a_grammar_beyond_llguidances_limits_is_an_error(pair, letters):
    wide = "any: " + " | ".join(f"rule{number}" for number in range(2100))
    wide += "".join(f'\nrule{number}: "a" "{number}"' for number in range(2100))
    options = {"tokenizer": letters, "max_new_tokens": 5, **prompts(letters, 1)}
    with pytest.raises(RuntimeError, match=r"llguidance cannot follow the grammar any further: .* items; max is 2000"):
        pair.generate(grammar=f'start: "x" any\n{wide}', **options)

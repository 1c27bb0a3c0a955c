"""Where an option of a call comes from, what stands in for it, and what a failed call leaves to others."""

from __future__ import annotations

import copy
import threading

import numpy
import pytest
import torch
from conftest import GROUP
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import quantspec

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
OPTIONS = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}


@pytest.fixture
def own_config(qs, monkeypatch):
    """A generation config of the model's own for one test."""
    config = copy.deepcopy(qs.model.generation_config)
    monkeypatch.setattr(qs.model, "generation_config", config)
    return config


# --- Lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_length": 12}, {"max_new_tokens": 3}, {"max_new_tokens": 40}])
@pytest.mark.parametrize("lengths", [(20,), (9,), (8,), (24, 17)])
def test_a_callers_length_criterion_takes_the_place_of_the_options(qs, lengths, options):
    def criteria() -> StoppingCriteriaList:
        return StoppingCriteriaList([MaxLengthCriteria(length) for length in lengths])

    options = {"do_sample": False, "eos_token_id": None, **options}
    expected = qs.model.generate(IDS, stopping_criteria=criteria(), **options)
    assert torch.equal(qs.generate(IDS, stopping_criteria=criteria(), **options), expected)
    theirs = qs.model.generate(IDS, stopping_criteria=criteria(), custom_generate=qs.decode, **options)
    assert torch.equal(theirs, expected)


def test_a_callers_length_criterion_counts_for_the_cache(qs):
    with pytest.raises(quantspec.CacheFullError, match="600 tokens are more than max_cache_len=512"):
        qs.generate(IDS, stopping_criteria=[MaxLengthCriteria(600)], **OPTIONS)


# --- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["eos_token_id", "suppress_tokens", "bad_words_ids", "stop_strings"])
def test_a_views_config_fills_what_the_call_leaves_open(qs, tokenizer, field):
    text = qs.model.generate(IDS, **OPTIONS)[0, 8:].tolist()
    value = {
        "eos_token_id": text[2],
        "suppress_tokens": text[:2],
        "bad_words_ids": [text[:1]],
        "stop_strings": tokenizer.decode(text[2:3]),
    }[field]
    outputs = []
    for model in (qs.as_pretrained_model(), copy.copy(qs.model)):
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.eos_token_id = None
        setattr(model.generation_config, field, value)
        given = GenerationConfig(max_new_tokens=6, do_sample=False)
        outputs.append(model.generate(IDS, generation_config=given, tokenizer=tokenizer))
    assert torch.equal(*outputs)
    assert outputs[0][0, 8:].tolist() != text


def test_a_given_config_goes_over_a_views(qs):
    view = qs.as_pretrained_model()
    view.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert view.generate(IDS, generation_config=GenerationConfig(max_new_tokens=5)).shape == (1, 13)
    assert view.generate(IDS, None, GenerationConfig(max_new_tokens=4)).shape == (1, 12)


@pytest.mark.parametrize("name", ["cache_implementation", "token_healing", "stop_strings", "watermarking_config"])
def test_none_as_a_keyword_overrides_the_configs(qs, own_config, name):
    value = {"cache_implementation": "static", "token_healing": True, "stop_strings": "x"}.get(name, {"bias": 9.0})
    expected = qs.generate(IDS, **OPTIONS)
    assert torch.equal(
        qs.generate(IDS, generation_config=GenerationConfig(**{name: value}), **OPTIONS, **{name: None}), expected
    )
    setattr(own_config, name, value)
    assert torch.equal(qs.generate(IDS, **OPTIONS, **{name: None}), expected)


@pytest.mark.parametrize("name", ["dynamic", "hybrid"])
def test_the_dynamic_cache_asks_for_nothing(qs, own_config, name):
    expected = qs.generate(IDS, **OPTIONS)
    assert torch.equal(qs.generate(IDS, cache_implementation=name, **OPTIONS), expected)
    own_config.cache_implementation = name
    assert torch.equal(qs.generate(IDS, **OPTIONS), expected)


@pytest.mark.parametrize("name", ["static", "offloaded", "quantized", "paged"])
@pytest.mark.parametrize("given", ["keyword", "config", "model"])
def test_other_caches_are_refused_before_one_is_made(qs, own_config, given, name):
    options = {"cache_implementation": name} if given == "keyword" else {}
    if given == "config":
        options["generation_config"] = GenerationConfig(cache_implementation=name)
    if given == "model":
        own_config.cache_implementation = name
    with pytest.raises(ValueError, match=r"generate\(\) does not take cache_implementation: the pair keeps its own"):
        qs.generate(IDS, **options, **OPTIONS)


# --- Seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [numpy.int64(7), numpy.uint8(7), torch.tensor(7)], ids=str)
def test_integers_of_other_libraries_are_seeds(qs, seed):
    options = {**OPTIONS, "do_sample": True}
    assert torch.equal(qs.generate(IDS, seed=seed, **options), qs.generate(IDS, seed=7, **options))


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_smallest_and_the_largest_seed(qs, seed):
    assert qs.generate(IDS, seed=seed, **OPTIONS).shape == (1, 14)


@pytest.mark.parametrize("seed", [1.5, "7", numpy.float32(7)])
def test_other_seeds_are_refused(qs, seed):
    with pytest.raises(TypeError, match="seed must be an int, or a list with an int for each row, not"):
        qs.generate(IDS, seed=seed, **OPTIONS)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_out_of_range_are_refused(qs, seed):
    with pytest.raises(ValueError, match=f"seed must be between .* not {seed}"):
        qs.generate(IDS, seed=seed, **OPTIONS)


# --- Models whose generate is a pair's -------------------------------------------------------------------------------


def test_a_model_may_be_given_the_pairs_generate(qs, monkeypatch):
    expected = qs.generate(IDS, **OPTIONS)
    monkeypatch.setitem(vars(qs.model), "generate", qs.generate)
    qs.session.last_stats = None
    assert torch.equal(qs.model.generate(IDS, **OPTIONS), expected)
    assert qs.last_stats.drafted > 0


def test_a_view_can_be_converted(qs):
    pair = quantspec.convert(qs.as_pretrained_model(), kv_group_size=GROUP, self_check=False)
    assert torch.equal(pair.generate(IDS, **OPTIONS), qs.generate(IDS, **OPTIONS))
    assert torch.equal(pair.as_pretrained_model().generate(IDS, **OPTIONS), qs.generate(IDS, **OPTIONS))


# --- Prompts of padding ----------------------------------------------------------------------------------------------


def test_a_prompt_of_padding_is_told_as_such(qs):
    ids = torch.tensor([[5, 6, 7], [0, 0, 0]])
    for generate in (qs.generate, lambda ids, **o: qs.model.generate(ids, custom_generate=qs.decode, **o)):
        with pytest.raises(ValueError, match=r"a prompt holds nothing but padding \(token 0\)"):
            generate(ids, **OPTIONS)
    with pytest.raises(ValueError, match="attention_mask hides every token"):
        qs.generate(ids, (ids > 0).long(), **OPTIONS)
    assert qs.generate(ids, torch.ones_like(ids), **OPTIONS).shape == (2, 9)


# --- Streamers -------------------------------------------------------------------------------------------------------


class Fails(LogitsProcessor):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 10:
            raise self.error
        return scores


FAILURES = {
    "our check": {"num_speculative_tokens": 99},
    "the seed": {"seed": "7"},
    "an unknown argument": {"temprature": 1.0},
    "Hugging Face's check": {"max_new_tokens": -3},
    "an option": {"num_beams": 3},
    "the cache": {"max_new_tokens": 5000},
    "a processor": {"logits_processor": [Fails(RuntimeError("broken"))]},
    "an interrupt": {"logits_processor": [Fails(KeyboardInterrupt())]},
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_streamers_reader_does_not_wait_for_a_call_that_failed(qs, tokenizer, name):
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            qs.generate(IDS, streamer=streamer, **{**OPTIONS, **FAILURES[name]})
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    # queue.Empty is raised here if nothing more comes.
    "".join(streamer)
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_streamer_is_ended_once(qs, fails):
    class Counting:
        ends = 0

        def put(self, value):
            if fails:
                raise OSError("full disk")

        def end(self):
            self.ends += 1

    streamer = Counting()
    if fails:
        with pytest.raises(OSError, match="full disk"):
            qs.generate(IDS, streamer=streamer, **OPTIONS)
    else:
        qs.generate(IDS, streamer=streamer, **OPTIONS)
    assert streamer.ends == 1


def test_an_error_of_end_does_not_hide_the_reason(qs):
    class Broken:
        def put(self, value):
            raise OSError("full disk")

        def end(self):
            raise ValueError("closed")

    with pytest.raises(OSError, match="full disk"):
        qs.generate(IDS, streamer=Broken(), **OPTIONS)
    with pytest.raises(TypeError, match=r"streamer must have put\(\) and end\(\)"):
        qs.generate(IDS, streamer=print, **OPTIONS)

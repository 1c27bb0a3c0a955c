"""Calls of one pair from several threads, and from within each other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model
from transformers.generation.streamers import BaseStreamer

import quantspec
from quantspec.cycle_times import cycle_times
from quantspec.evals.scoring import score_continuations
from quantspec.passes import Role

OPTIONS = {"max_new_tokens": 2 * GROUP, "eos_token_id": None, "do_sample": False}
PROMPTS = [torch.tensor([random_prompt(length, length)]) for length in (5 * GROUP, 3 * GROUP + 4)]


def together(*calls: Callable[[], object], times: int = 3) -> list:
    """Results of ``calls``, each in a thread of its own and some times over."""
    results: list[list] = [[] for _ in calls]

    def repeat(index: int) -> None:
        for _ in range(times):
            results[index].append(calls[index]())

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_get_the_texts_that_they_get_alone(qs):
    alone = [qs.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    found = together(*(lambda prompt=prompt: qs.generate(prompt, **OPTIONS) for prompt in PROMPTS))
    for expected, texts in zip(alone, found, strict=True):
        assert len(texts) == 3
        assert all(torch.equal(text, expected) for text in texts)
    assert qs.last_stats.generated_tokens == OPTIONS["max_new_tokens"]


def test_scoring_and_timing_wait_for_generation(qs):
    context, continuation = random_prompt(6 * GROUP), random_prompt(20, 1)

    def score() -> float:
        return score_continuations(qs, [context], [[continuation]], Role.TARGET)[0][0].log_probability

    text, expected = qs.generate(PROMPTS[0], **OPTIONS), score()
    texts, scores, times = together(lambda: qs.generate(PROMPTS[0], **OPTIONS), score, lambda: cycle_times(qs, 2))
    assert all(torch.equal(found, text) for found in texts)
    assert scores == [expected] * 3
    assert len(times) == 3


def test_a_call_from_within_a_call_is_an_error_and_the_pair_survives(qs):
    expected = qs.generate(PROMPTS[0], **OPTIONS)

    class Nested(BaseStreamer):
        def put(self, value):
            qs.generate(PROMPTS[1], **OPTIONS)

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="the pair is generating"):
        qs.generate(PROMPTS[0], streamer=Nested(), **OPTIONS)
    assert torch.equal(qs.generate(PROMPTS[0], **OPTIONS), expected)


def test_threads_convert_one_after_the_other(qs, monkeypatch):
    """Two models, each twice: torch.export traces whatever module of the process is called meanwhile."""
    monkeypatch.setenv("QUANTSPEC_CACHE", "")
    models = [tiny_model("llama") for _ in range(2)]
    for model in models:
        model.generation_config = qs.model.generation_config
    expected = qs.generate(PROMPTS[0], **OPTIONS)
    calls = [lambda model=model: quantspec.convert(model, kv_group_size=GROUP) for model in models * 2]
    pairs = together(*calls, times=1)
    assert [len(converted) for converted in pairs] == [1] * 4
    for (pair,) in pairs:
        assert torch.equal(pair.generate(PROMPTS[0], **OPTIONS), expected)


def test_a_copy_generates(qs):
    expected = qs.generate(PROMPTS[0], **OPTIONS)
    before = qs.last_stats
    for copied in (copy.copy(qs), copy.deepcopy(qs)):
        assert isinstance(copied, quantspec.QuantSpecModel)
        assert torch.equal(copied.generate(PROMPTS[0], **OPTIONS), expected)
        assert copied.last_stats is not before
        assert qs.last_stats is before

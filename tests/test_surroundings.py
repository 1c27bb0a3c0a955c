"""What a program has set globally (autocast, default device) does not change what is converted and generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model

import quantspec

PROMPT = torch.tensor([random_prompt(3 * GROUP)])
OPTIONS = {"max_new_tokens": GROUP, "eos_token_id": None}
SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_device": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_conversion(qs, surroundings: Callable[[], AbstractContextManager]):
    model = tiny_model("llama")
    with surroundings():
        converted = quantspec.convert(model, kv_group_size=GROUP)
    assert torch.equal(converted.generate(PROMPT, **OPTIONS), qs.generate(PROMPT, **OPTIONS))


@pytest.mark.parametrize("sample", [{"do_sample": False}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_generation(qs, name, sample):
    expected = qs.generate(PROMPT, **OPTIONS, **sample)
    with SURROUNDINGS[name]():
        assert torch.equal(qs.generate(PROMPT, **OPTIONS, **sample), expected)


def test_tokens_of_options_are_checked_beside_another_default_device(qs):
    options = {**OPTIONS, "forced_eos_token_id": 9, "bad_words_ids": [[5, 6]]}
    expected = qs.generate(PROMPT, **options)
    with SURROUNDINGS["default_device"]():
        assert torch.equal(qs.generate(PROMPT, **options), expected)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "lfm2"])
def test_logits_under_autocast(architecture):
    """Experts and a hybrid's own forward included."""
    converted = quantspec.convert(tiny_model(architecture), kv_group_size=GROUP, self_check=False)
    options = {**OPTIONS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = converted.generate(PROMPT, **options).logits
    with SURROUNDINGS["autocast"]():
        output = converted.generate(PROMPT, **options).logits
    assert torch.equal(torch.stack(output), torch.stack(expected))

"""Whole multimodal classes: their text model is captured, whose config is part of another."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from quantspec import convert
from quantspec.self_check import incremental_logits

PROMPT, STEPS = 40, (1, 1, 4)


@pytest.mark.parametrize("architecture", ["gemma3", "gemma4"])
def test_text_logits_are_the_models_own_and_configs_stay(architecture):
    model = tiny_model(architecture)
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    text = model.config.text_config
    choices = text._attn_implementation, model.config._attn_implementation
    qs = convert(model, kv_group_size=32, weight_group_size=32)
    ids = torch.randint(3, 96, (1, PROMPT + sum(STEPS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 :]
    torch.testing.assert_close(incremental_logits(qs, ids, PROMPT, STEPS), expected, rtol=0, atol=1e-4)
    assert {name: getattr(module, "config", None) for name, module in model.named_modules()} == configs
    assert model.config.text_config is text
    assert (text._attn_implementation, model.config._attn_implementation) == choices

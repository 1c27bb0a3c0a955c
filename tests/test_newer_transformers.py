"""Options and arguments that a transformers newer than the tested ones may add."""

from __future__ import annotations

import pytest
import torch
from generation_options import OPTIONS as DOCUMENTED
from generation_options import REFUSED
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerationMixin

from quantspec.hugging_face.arguments import SUPPORTED_OPTIONS

IDS = torch.tensor([[5, 6, 7, 8]])
OPTIONS = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}


@pytest.fixture(params=["generate", "custom_generate"])
def generate(qs, request):
    """Both ways to generate with a pair."""
    if request.param == "generate":
        return qs.generate
    return lambda *args, **options: qs.model.generate(*args, custom_generate=qs.decode, **options)


@pytest.fixture
def newer_options(monkeypatch):
    """A GenerationConfig with two more options, one with a default of its own."""
    known = GenerationConfig.__init__

    def init(self, **options):
        self.entropy_floor, self.look_around = options.pop("entropy_floor", None), options.pop("look_around", 3)
        known(self, **options)

    monkeypatch.setattr(GenerationConfig, "__init__", init)


@pytest.fixture
def newer_arguments(monkeypatch):
    """A transformers that hands more to the decoding loop than today's."""
    known = GenerationMixin._prepare_cache_for_generation

    def prepare(self, generation_config, model_kwargs, *args):
        known(self, generation_config, model_kwargs, *args)
        cache = model_kwargs.pop("cache", None) or model_kwargs.pop("past_key_values", None)
        model_kwargs.update(states=cache, step_ids=torch.arange(3), is_first=True, plan=object())

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)


def test_unset_new_options_are_not_seen(qs, generate, newer_options):
    expected = qs.model.generate(IDS, **OPTIONS)
    assert torch.equal(generate(IDS, **OPTIONS), expected)
    assert torch.equal(generate(IDS, look_around=3, entropy_floor=None, **OPTIONS), expected)


@pytest.mark.parametrize("option", [{"entropy_floor": 0.5}, {"look_around": 4}])
def test_set_new_options_are_refused_by_name(generate, newer_options, option):
    with pytest.raises(ValueError, match=f"generation option {next(iter(option))} is not supported"):
        generate(IDS, **option, **OPTIONS)
    with pytest.raises(ValueError, match=f"generation option {next(iter(option))} is not supported"):
        generate(IDS, generation_config=GenerationConfig(**option, **OPTIONS))


def test_entries_of_a_models_own_are_not_options(qs, generate, monkeypatch):
    config = GenerationConfig(chat_format="chatml", max_window_size=24000, **OPTIONS)
    expected = qs.model.generate(IDS, **OPTIONS)
    assert torch.equal(generate(IDS, generation_config=config), expected)
    monkeypatch.setattr(qs.model, "generation_config", config)
    assert torch.equal(generate(IDS), expected)


def test_what_hugging_face_prepares_by_itself_is_no_argument_of_the_caller(qs, generate, newer_arguments):
    text = generate(IDS, **OPTIONS)
    assert text.shape == (1, 8)
    padded, mask = torch.tensor([[0, 0, *IDS[0].tolist()]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(generate(padded, attention_mask=mask, **OPTIONS)[:, 2:], text)


def test_the_callers_own_arguments_are_refused_beside_it(generate, newer_arguments):
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(IDS, inputs_embeds=torch.zeros(1, 4, 64), **OPTIONS)
    with pytest.raises(ValueError, match="model argument output_router_logits is not supported"):
        generate(IDS, output_router_logits=True, **OPTIONS)


def test_arguments_that_say_nothing_are_ignored(generate):
    assert generate(IDS, inputs_embeds=None, output_router_logits=False, **OPTIONS).shape == (1, 8)


def test_a_cache_with_tokens_is_refused_under_its_name(qs):
    cache = DynamicCache(config=qs.model.config)
    with torch.no_grad():
        qs.model(IDS[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"generate\(\) does not take (past_key_values|cache): the pair keeps its own"):
        qs.model.generate(IDS, past_key_values=cache, custom_generate=qs.decode, **OPTIONS)


def test_the_allow_list_is_the_documented_one():
    """What is neither refused nor private; one number of beams is supported."""
    documented = {name for name, option in DOCUMENTED.items() if option.status != REFUSED and name[0] != "_"}
    assert documented | {"num_beams"} == SUPPORTED_OPTIONS

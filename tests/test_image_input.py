"""Images beside a prompt, which Hugging Face encodes before it calls a decoding loop."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import quantspec

IMAGE_TOKEN = 127
IDS = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * 4, 8, 9, 10]])
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return quantspec.convert(LlavaForConditionalGeneration(config).eval(), kv_group_size=16)


@pytest.mark.parametrize(
    "generate",
    [
        lambda qs, **image: qs.generate(IDS, **image, **OPTIONS),
        lambda qs, **image: qs.model.generate(IDS, custom_generate=qs.decode, **image, **OPTIONS),
        lambda qs, **image: qs.as_pretrained_model().generate(IDS, **image, **OPTIONS),
    ],
    ids=["generate", "custom_generate", "as_pretrained_model"],
)
def test_images_are_refused_and_text_alone_is_taken(llava, generate):
    with pytest.raises(ValueError, match="is not supported by quantspec; only input_ids and attention_mask"):
        generate(llava, pixel_values=torch.randn(1, 3, 28, 28))
    assert torch.equal(generate(llava), llava.model.generate(IDS, **OPTIONS))


def test_arguments_that_hugging_face_adds_are_taken_as_it_made_them_alone(qs, monkeypatch):
    ids = torch.tensor([[5, 6, 7]])
    original = type(qs.model)._prepare_model_inputs

    def adds(model, *args, **kwargs):
        inputs, name, model_kwargs = original(model, *args, **kwargs)
        return inputs, name, {"kinds": torch.zeros(len(inputs), 3), **model_kwargs}

    monkeypatch.setattr(type(qs.model), "_prepare_model_inputs", adds)
    monkeypatch.setattr(type(qs.model), "_validate_model_kwargs", lambda *_: None)
    expected = qs.generate(ids, **OPTIONS)
    assert torch.equal(qs.generate(ids, kinds=torch.zeros(1, 3), **OPTIONS), expected)
    several = qs.generate(ids, num_return_sequences=2, **{**OPTIONS, "do_sample": True}, seed=1)
    assert several.shape == (2, expected.shape[1])
    with pytest.raises(ValueError, match="model argument kinds is not supported"):
        qs.generate(ids, kinds=torch.ones(1, 3), **OPTIONS)

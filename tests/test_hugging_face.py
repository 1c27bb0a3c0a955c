"""Pipelines, streamers, chat templates and device maps of Hugging Face, with a pair in the model's place."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

import quantspec
from quantspec import UnsupportedModelError

TEXT = "Hello"
GREEDY = {"max_new_tokens": 8, "do_sample": False}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def pipe(qs, tokenizer):
    return pipeline("text-generation", model=qs.as_pretrained_model(), tokenizer=tokenizer)


def test_pipeline_generates_with_the_pair(qs, tokenizer, pipe):
    expected = pipeline("text-generation", model=qs.model, device=qs.device, tokenizer=tokenizer)(TEXT, **GREEDY)
    qs.session.last_stats = None
    assert pipe(TEXT, **GREEDY) == expected
    assert qs.last_stats.drafted > 0


def test_pipeline_with_custom_generate(qs, tokenizer, pipe):
    other = pipeline(
        "text-generation", model=qs.model, device=qs.device, tokenizer=tokenizer, custom_generate=qs.decode
    )
    qs.session.last_stats = None
    assert other(TEXT, **GREEDY) == pipe(TEXT, **GREEDY)
    assert qs.last_stats.drafted > 0


def test_pipeline_takes_batches_and_options_of_ours(qs, pipe):
    alone = [pipe(text, **GREEDY)[0] for text in (TEXT, "Hi there")]
    together = pipe([TEXT, "Hi there"], batch_size=2, num_speculative_tokens=2, **GREEDY)
    assert [texts[0] for texts in together] == alone
    assert qs.last_stats.num_speculative_tokens == 2
    assert qs.last_stats.num_sequences == 2


def test_pipeline_stops_at_strings(tokenizer, pipe):
    text = pipe(TEXT, return_full_text=False, **GREEDY)[0]["generated_text"]
    stopped = pipe(TEXT, return_full_text=False, stop_strings=[text[3]], tokenizer=tokenizer, **GREEDY)
    assert stopped[0]["generated_text"] == text[: text.index(text[3]) + 1]


def test_pipeline_streams(tokenizer, pipe, capsys):
    text = pipe(TEXT, streamer=TextStreamer(tokenizer, skip_prompt=True), return_full_text=False, **GREEDY)
    assert capsys.readouterr().out == text[0]["generated_text"] + "\n"


def test_pipeline_streams_into_a_thread(tokenizer, pipe):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    thread = threading.Thread(target=pipe, args=(TEXT,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == pipe(TEXT, return_full_text=False, **GREEDY)[0]["generated_text"]


def test_pipeline_of_a_chat(qs, tokenizer, pipe, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    answer = pipe([{"role": "user", "content": "Hi"}], **GREEDY)[0]["generated_text"][-1]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = qs.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :]
    assert answer == {"role": "assistant", "content": tokenizer.decode(output, skip_special_tokens=True)}


def test_pipeline_does_not_move_the_model(qs, tokenizer):
    with pytest.raises(ValueError, match="cannot be moved"):
        pipeline("text-generation", model=qs.as_pretrained_model(), tokenizer=tokenizer, device="cpu")


def test_view_leaves_the_model_as_it_is(qs):
    view = qs.as_pretrained_model()
    assert type(view) is type(qs.model)
    assert view.get_input_embeddings() is qs.model.get_input_embeddings()
    assert "generate" not in vars(qs.model)
    assert not hasattr(qs.model, "hf_device_map")


def test_view_obeys_a_generation_config_of_its_own(qs):
    prompt = torch.tensor([[5, 6, 7]])
    view = qs.as_pretrained_model()
    view.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert view.generate(prompt).shape == (1, 6)
    assert view.generate(prompt, max_new_tokens=4).shape == (1, 7)
    assert qs.generate(prompt, max_new_tokens=5, eos_token_id=None).shape == (1, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_map_of_one_device(saved, device_map):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, dtype=torch.bfloat16)
    qs = quantspec.convert(model, kv_group_size=16)
    assert qs.model.dtype == torch.bfloat16
    assert qs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=None).shape == (1, 6)


def test_disk_offload_is_refused(saved, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    with pytest.raises(UnsupportedModelError, match="device_map over cpu, disk; load it on one device"):
        quantspec.convert(model)


def test_map_of_several_devices_is_refused():
    model = tiny_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(UnsupportedModelError, match="device_map over 0, 1; load it on one device"):
        quantspec.convert(model)

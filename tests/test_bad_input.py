"""Calls that cannot be honoured: each is refused by name before any work, and the object works as before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import GROUP
from step_by_step import decode_step_by_step, random_prompt
from tiny_models import tiny_model
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

import quantspec
from quantspec import CacheFullError, QuantSpecConfig, QuantSpecModel

PROMPT = random_prompt(2 * GROUP + 3)
IDS = torch.tensor([PROMPT])
TWO = torch.tensor([PROMPT, PROMPT])
MASK = torch.ones_like(IDS)


@dataclasses.dataclass(frozen=True)
class BadCall:
    """A call on the pair (and the model it came from), the error it raises and what the message says."""

    name: str
    call: Callable[[QuantSpecModel], object]
    error: type[Exception]
    message: str


def generates(name: str, error: type[Exception], message: str, ids=IDS, mask=None, **options) -> BadCall:
    """A bad ``generate`` call."""
    return BadCall(name, lambda qs: qs.generate(ids, mask, **options), error, message)


def converts(name: str, error: type[Exception], message: str, **options) -> BadCall:
    """A bad ``convert`` call."""
    return BadCall(name, lambda qs: quantspec.convert(qs.model, **options), error, message)


def _from_hugging_face(**options) -> Callable[[QuantSpecModel], object]:
    return lambda qs: qs.model.generate(IDS, custom_generate=qs.decode, max_new_tokens=3, **options)


CALLS = [
    # Conversion.
    BadCall("convert nothing", lambda qs: quantspec.convert(None), TypeError, "PreTrainedModel.*NoneType"),
    BadCall("convert a name", lambda qs: quantspec.convert("gpt2"), TypeError, "from_pretrained"),
    BadCall("convert a module", lambda qs: quantspec.convert(torch.nn.Linear(2, 2)), TypeError, "not Linear"),
    BadCall("convert a pair", lambda qs: quantspec.convert(qs), TypeError, "not QuantSpecModel"),
    BadCall(
        "model without head",
        lambda qs: quantspec.convert(qs.model.model),
        quantspec.UnsupportedModelError,
        "no language-model head",
    ),
    converts(
        "unknown option", TypeError, "unknown option 'kv_groupsize'; the options are .*kv_group_size", kv_groupsize=1
    ),
    converts("config of another kind", TypeError, "config must be a QuantSpecConfig, not dict", config={}),
    converts(
        "gamma too large", ValueError, "num_speculative_tokens must be between 0 and 15", num_speculative_tokens=16
    ),
    converts("gamma negative", ValueError, "num_speculative_tokens.*-1", num_speculative_tokens=-1),
    converts(
        "gamma a float",
        TypeError,
        "num_speculative_tokens must be an int or .auto., not 4.0",
        num_speculative_tokens=4.0,
    ),
    converts("gamma a bool", TypeError, "num_speculative_tokens must be an int", num_speculative_tokens=True),
    converts("gamma under two names", TypeError, "two names", num_speculative_tokens=1, num_assistant_tokens=1),
    converts("group not a power of two", ValueError, "kv_group_size must be a power of two", kv_group_size=48),
    converts("group too small", ValueError, "kv_group_size.*16 to 512, not 8", kv_group_size=8),
    converts("group a string", TypeError, "kv_group_size must be an int", kv_group_size="16"),
    converts("weight group", ValueError, r"weight_group_size must be one of \(32", weight_group_size=100),
    converts("weight group None", TypeError, "weight_group_size must be an int", weight_group_size=None),
    converts("quantizer", ValueError, "weight_quantizer must be one of 'tinygemm', 'hqq'", weight_quantizer="awq"),
    converts("head as a number", TypeError, "quantize_lm_head must be True or False", quantize_lm_head=1),
    converts("compile as a string", TypeError, "compile must be True, False or None", compile="max-autotune"),
    converts("cache of no length", ValueError, "max_cache_len must be at least 1", max_cache_len=0),
    converts("cache of half a token", TypeError, "max_cache_len must be an int", max_cache_len=1.5),
    BadCall(
        "config changed later",
        lambda qs: setattr(qs.config, "kv_group_size", 32),
        dataclasses.FrozenInstanceError,
        "kv_group_size",
    ),
    BadCall("bad config object", lambda qs: QuantSpecConfig(kv_group_size=0), ValueError, "kv_group_size"),
    # Prompts and masks.
    generates("ids as a list", TypeError, "input_ids must be a tensor.*not list", ids=[PROMPT]),
    generates("text", TypeError, "input_ids must be a tensor.*return_tensors", ids="hello"),
    generates("ids of one axis", ValueError, r"shape \(batch, tokens\), not \(35,\)", ids=IDS[0]),
    generates("ids of three axes", ValueError, r"shape \(batch, tokens\)", ids=IDS[None]),
    generates("ids of float", TypeError, "must hold integers, not torch.float32", ids=IDS.float()),
    generates("ids of bool", TypeError, "must hold integers, not torch.bool", ids=IDS.bool()),
    generates("no tokens", ValueError, "input_ids is empty", ids=IDS[:, :0]),
    generates("no rows", ValueError, "input_ids is empty", ids=IDS[:0]),
    generates("ids elsewhere", ValueError, "are on meta and the model on cpu", ids=IDS.to("meta")),
    generates("id too large", ValueError, r"in 0\.\.95, found 96", ids=torch.tensor([[5, 96]])),
    generates("id negative", ValueError, r"in 0\.\.95, found -1", ids=torch.tensor([[5, -1]])),
    generates("mask of another shape", ValueError, r"shape \(1, 34\), but input_ids \(1, 35\)", mask=MASK[:, 1:]),
    generates("mask of another batch", ValueError, "attention_mask has shape", ids=TWO, mask=MASK),
    generates("mask of four axes", ValueError, "attention_mask has shape", mask=MASK[None, None]),
    generates("mask as a list", TypeError, "attention_mask must be a tensor", mask=[[1] * 35]),
    generates("mask elsewhere", ValueError, "attention_mask is on meta", mask=MASK.to("meta")),
    generates("additive mask", ValueError, "0 and 1 only", mask=torch.full(IDS.shape, -1e9)),
    generates("mask that hides a row", ValueError, "hides every token", ids=TWO, mask=torch.cat((MASK, 0 * MASK))),
    generates("prompt under two names", ValueError, "input_ids", inputs=IDS),
    generates("embeddings", ValueError, "does not take inputs_embeds", inputs_embeds=torch.zeros(1, 35, 64)),
    generates("positions", ValueError, "does not take position_ids", position_ids=torch.arange(35)[None]),
    generates("a cache", ValueError, "does not take past_key_values", past_key_values=DynamicCache()),
    # Lengths.
    generates("over max_cache_len", CacheFullError, "1035 tokens are more than max_cache_len=512", max_new_tokens=1000),
    generates(
        "prompt over max_cache_len", CacheFullError, "max_cache_len=512", ids=IDS.repeat(1, 20), max_new_tokens=1
    ),
    generates("max_length within the prompt", ValueError, "max_length", max_length=10),
    generates("no new tokens", ValueError, "max_new_tokens.*greater than 0", max_new_tokens=0),
    # Options.
    generates("beams", ValueError, "num_beams=4", num_beams=4),
    generates("sampled beams", ValueError, "num_beams=2", num_beams=2, do_sample=True),
    generates("contrastive", ValueError, "penalty_alpha", penalty_alpha=0.6, top_k=4),
    generates(
        "another assistant", ValueError, "assistant_model: the draft is the model itself", assistant_model=object()
    ),
    generates("prompt lookup", ValueError, "prompt_lookup_num_tokens", prompt_lookup_num_tokens=3),
    generates("dola", ValueError, "dola_layers", dola_layers="high"),
    generates("early exit", ValueError, "assistant_early_exit", assistant_early_exit=1),
    generates("healing", ValueError, "token_healing", token_healing=True),
    generates("attentions", ValueError, "output_attentions", output_attentions=True, return_dict_in_generate=True),
    generates("hidden states", ValueError, "output_hidden_states", output_hidden_states=True),
    generates("another cache", ValueError, "cache_implementation: the pair keeps", cache_implementation="static"),
    generates("custom_generate", ValueError, "custom_generate=qs.decode", custom_generate=lambda: None),
    generates("unknown generation option", ValueError, "max_tokens", max_tokens=5),
    generates("stop strings alone", ValueError, "stop_strings need the tokenizer", stop_strings=["a"]),
    generates("a function as streamer", TypeError, "BaseStreamer.*not builtin_function", streamer=print),
    generates("two seeds", ValueError, "either generator or seed", seed=1, generator=torch.Generator()),
    generates("generator as a number", TypeError, "a number goes to seed", generator=3, do_sample=True),
    generates("two gammas", TypeError, "same option", num_assistant_tokens=2, num_speculative_tokens=2),
    generates("gamma of a call too large", ValueError, "between 0 and 15", num_speculative_tokens=40),
    generates(
        "gamma of a call a string", TypeError, "num_speculative_tokens must be an int", num_speculative_tokens="4"
    ),
    generates("several greedy outputs", ValueError, "num_return_sequences", num_return_sequences=2),
    generates("temperature of zero", ValueError, "temperature", do_sample=True, temperature=0.0),
    generates("negative top_p", ValueError, "top_p", do_sample=True, top_p=-0.5),
    # Tokens of options.
    generates(
        "forced EOS beyond", ValueError, r"forced_eos_token_id must be in 0\.\.95, found 96", forced_eos_token_id=96
    ),
    generates("forced BOS beyond", ValueError, "forced_bos_token_id must be", ids=IDS[:, :1], forced_bos_token_id=99),
    generates("biased token beyond", ValueError, "tokens of sequence_bias must be", sequence_bias=[[[5, 96], 1.0]]),
    generates("bad word beyond", ValueError, "tokens of bad_words_ids must be", bad_words_ids=[[5], [96]]),
    generates(
        "favoured EOS beyond",
        ValueError,
        "eos_token_id, with exponential_decay_length_penalty, must be",
        exponential_decay_length_penalty=(1, 2.0),
        eos_token_id=96,
    ),
    generates(
        "a row's token beyond", ValueError, "forced_eos_token_id must be", row_options=[{"forced_eos_token_id": 96}]
    ),
    generates(
        "no EOS to favour",
        ValueError,
        "there is none: pass eos_token_id",
        exponential_decay_length_penalty=(1, 2.0),
        eos_token_id=None,
    ),
    generates(
        "no EOS to favour in a row",
        ValueError,
        "there is none: pass eos_token_id",
        row_options=[{"exponential_decay_length_penalty": (1, 2.0), "eos_token_id": None}],
    ),
    generates(
        "no EOS of a list",
        ValueError,
        "eos_token_id is an empty list; pass eos_token_id=None",
        eos_token_id=[],
        pad_token_id=None,
    ),
    generates(
        "negative prompts of another batch",
        ValueError,
        "negative_prompt_ids has 1 rows and the batch 2",
        ids=TWO,
        guidance_scale=2.0,
        negative_prompt_ids=IDS,
    ),
    generates(
        "negative prompt as a list",
        ValueError,
        "negative_prompt_ids must be a tensor",
        guidance_scale=2.0,
        negative_prompt_ids=[PROMPT],
    ),
    generates(
        "negative prompt beyond",
        ValueError,
        r"negative_prompt_ids must be in 0\.\.95, found 96",
        guidance_scale=2.0,
        negative_prompt_ids=IDS.new_tensor([[96]]),
    ),
    # From Hugging Face's side.
    BadCall("beams, other side", _from_hugging_face(num_beams=2), ValueError, "num_beams=2"),
    BadCall("mask, other side", _from_hugging_face(attention_mask=0 * MASK), ValueError, "hides every token"),
    BadCall("continued, other side", _from_hugging_face(continue_cache=3), TypeError, "continue_cache must be True"),
    BadCall("gamma, other side", _from_hugging_face(num_speculative_tokens=-2), ValueError, "num_speculative_tokens"),
    BadCall(
        "another model's loop",
        lambda qs: type(qs.model)(qs.model.config).generate(IDS, custom_generate=qs.decode, max_new_tokens=3),
        ValueError,
        "belongs to another model",
    ),
    generates("config as a dict", TypeError, "GenerationConfig, not dict", generation_config={"max_new_tokens": 3}),
]


@pytest.fixture(scope="module")
def expected(qs) -> list[int]:
    return decode_step_by_step(qs, PROMPT, 5)


def test_the_table_is_long_enough():
    assert len(CALLS) >= 25
    assert len({bad.name for bad in CALLS}) == len(CALLS)


@pytest.mark.parametrize("bad", CALLS, ids=lambda bad: bad.name)
def test_bad_call(qs, expected, monkeypatch, bad):
    """The error's type and message, no forward pass, and a right answer to the next good call."""
    stats = qs.last_stats
    forward, calls = type(qs.pair).forward, []
    defaults = qs.model.generation_config.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(type(qs.pair), "forward", lambda *args, **options: calls.append(args))
        with pytest.raises(bad.error, match=bad.message) as caught:
            bad.call(qs)
    assert type(caught.value) is bad.error
    assert not calls, "work was done before the call was refused"
    assert type(qs.pair).forward is forward
    assert qs.last_stats is stats
    assert qs.model.generation_config.to_dict() == defaults
    output = qs.generate(IDS, max_new_tokens=5, eos_token_id=None)
    assert output[0, len(PROMPT) :].tolist() == expected


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_cache_longer_than_the_learned_positions_is_refused(architecture):
    model = tiny_model(architecture)
    with pytest.raises(ValueError, match="max_cache_len=513 is more than the 512 positions that the model has learned"):
        quantspec.convert(model, max_cache_len=513)
    # The last position is there, also with an offset in the table.
    converted = quantspec.convert(model, max_cache_len=512, kv_group_size=GROUP, self_check=False)
    ids = torch.tensor([random_prompt(505)])
    assert converted.generate(ids, max_new_tokens=7, eos_token_id=None).shape == (1, 512)


def test_a_table_that_is_indexed_by_positions_bounds_the_cache():
    """Whisper's decoder reads ``table[position_ids]``, and names its limit otherwise than other configs do."""
    model = tiny_model(
        "whisper",
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        max_target_positions=64,
        decoder_start_token_id=1,
    )
    converted = quantspec.convert(model, kv_group_size=GROUP)
    assert converted.config.max_cache_len == 64
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": MASK}
    assert torch.equal(converted.generate(IDS, **options), model.generate(IDS, **options))


def test_without_learned_positions_a_cache_may_be_longer_than_the_models_context():
    assert quantspec.convert(tiny_model("llama"), max_cache_len=2000, self_check=False).config.max_cache_len == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, "cast from torch.float32 to torch.bfloat16 after conversion; convert it again"),
        ({"device": "meta"}, "moved from cpu to meta after conversion; convert it again"),
    ],
    ids=["cast", "moved"],
)
def test_a_model_changed_after_conversion_is_refused(change, message):
    converted = quantspec.convert(tiny_model("llama"), kv_group_size=GROUP, self_check=False)
    converted.model.to(**change)
    ids = IDS.to(converted.device)
    with pytest.raises(ValueError, match=message):
        converted.generate(ids, max_new_tokens=3)
    if "dtype" in change:
        with pytest.raises(ValueError, match=message):
            converted.model.generate(ids, custom_generate=converted.decode, max_new_tokens=3)
        # Cast back, its buffers are rounded ones of their own.
        converted.model.to(torch.float32)
        with pytest.raises(ValueError, match=r"buffer '.*' of the model was replaced after conversion"):
            converted.generate(ids, max_new_tokens=3)


def other_weights(model):
    model.load_state_dict(tiny_model("llama", seed=5).state_dict(), assign=True)


def other_vocabulary(model):
    model.resize_token_embeddings(128, mean_resizing=False)


@pytest.mark.parametrize("change", [other_weights, other_vocabulary])
def test_weights_replaced_after_conversion_are_refused(change):
    """The target would go on with the old ones."""
    converted = quantspec.convert(tiny_model("llama"), kv_group_size=GROUP, self_check=False)
    change(converted.model)
    with pytest.raises(ValueError, match=r"weight '.*' of the model was replaced after conversion; convert it again"):
        converted.generate(IDS, max_new_tokens=3)


def test_odd_but_good_calls(qs, expected):
    """What looks like the calls above and is fine: neutral values, empty lists, explicit None."""
    neutral = {
        "num_beams": 1,
        "guidance_scale": 1.0,
        "penalty_alpha": 0.0,
        "stop_strings": None,
        "stopping_criteria": StoppingCriteriaList(),
        "assistant_model": None,
        "past_key_values": None,
        "token_healing": False,
        "output_attentions": False,
        "use_cache": False,
        "streamer": None,
        "seed": None,
        "num_return_sequences": 1,
        "cache_implementation": None,
    }
    output = qs.generate(IDS, MASK, max_new_tokens=5, eos_token_id=None, **neutral)
    assert output[0, len(PROMPT) :].tolist() == expected
    config = GenerationConfig(max_new_tokens=5, num_beams=1)
    assert qs.generate(IDS, generation_config=config, eos_token_id=None)[0, len(PROMPT) :].tolist() == expected

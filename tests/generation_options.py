"""Every option of Hugging Face's generation, and what becomes of it here; for tests and docs/generation-options.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import LogitsProcessor, WatermarkingConfig

HONOURED, REFUSED, IRRELEVANT = "honoured", "refused", "irrelevant"
GRAPH, HOST = "in the graph", "per position on the host"


class Nothing(LogitsProcessor):
    """A processor of a caller that changes nothing."""

    def __call__(self, input_ids, scores):
        return scores


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        status: honoured, refused or irrelevant.
        note: for the documentation.
        example: a value that changes something (honoured) or that is refused.
        companions: other options without which the example means nothing.
        tier: where a call with an honoured option decides which drafts stand.
    """

    status: str
    note: str = ""
    example: Any = None
    companions: dict[str, Any] = field(default_factory=dict)
    tier: str = GRAPH


def _honoured(example: Any, note: str = "", **companions: Any) -> Option:
    return Option(HONOURED, note, example, companions)


def _on_host(example: Any, note: str = "", **companions: Any) -> Option:
    return Option(HONOURED, note, example, companions, HOST)


def _refused(example: Any, note: str, **companions: Any) -> Option:
    return Option(REFUSED, note, example, companions)


def _irrelevant(note: str) -> Option:
    return Option(IRRELEVANT, note)


_SAMPLING = {"do_sample": True}
_BEAMS = _irrelevant("read by beam search only")
_LOOKBEHIND = _irrelevant("read for an assistant with another tokenizer only")
_BOOKKEEPING = _irrelevant("bookkeeping of the file")
_BOS = "with a prompt of one token, as there"

# Fields of GenerationConfig. The tests' prompt is [5, 6, 7, 8, 9, 10, 11, 12].
OPTIONS: dict[str, Option] = {
    "max_length": _honoured(11, max_new_tokens=None),
    "max_new_tokens": _honoured(3),
    "min_length": _honoured(14, eos_token_id="first"),
    "min_new_tokens": _honoured(4, eos_token_id="first"),
    "early_stopping": _BEAMS,
    "max_time": _honoured(1e-9, "looked at after every token"),
    "stop_strings": _honoured("first", "at the exact token; needs `tokenizer`"),
    "do_sample": _honoured(True, "the distribution is the target's; random numbers follow from seed and position"),
    "num_beams": _refused(4, "only 1: greedy search and sampling"),
    "use_mtp": _refused(True, "the draft is the model itself"),
    "use_cache": _irrelevant("the pair always keeps its own cache"),
    "cache_implementation": _refused("static", "the pair keeps its own cache"),
    "cache_config": _irrelevant("read with `cache_implementation` only"),
    "max_cache_len": _irrelevant("sizes a static cache; the pair's limit is `convert(max_cache_len=...)`"),
    "temperature": _honoured(0.5, **_SAMPLING),
    "top_k": _honoured(3, **_SAMPLING),
    "top_p": _honoured(0.3, **_SAMPLING),
    "min_p": _honoured(0.3, **_SAMPLING),
    "top_h": _honoured(0.3, **_SAMPLING),
    "typical_p": _honoured(0.3, **_SAMPLING),
    "epsilon_cutoff": _honoured(0.05, top_k=0, **_SAMPLING),
    "eta_cutoff": _honoured(0.3, top_k=0, **_SAMPLING),
    "repetition_penalty": _honoured(3.0),
    "encoder_repetition_penalty": _honoured(3.0, "favours the prompt's tokens"),
    "length_penalty": _BEAMS,
    "no_repeat_ngram_size": _honoured(1),
    "bad_words_ids": _honoured("first"),
    "renormalize_logits": _honoured(True),
    "forced_bos_token_id": _honoured(9, _BOS, prompt=[[5]]),
    "forced_eos_token_id": _honoured(2),
    "remove_invalid_values": _honoured(
        True, "for infinities; NaN logits are an error", sequence_bias=[[[40], float("inf")]]
    ),
    "exponential_decay_length_penalty": _honoured((1, 5.0), eos_token_id=3),
    "suppress_tokens": _honoured("first"),
    "begin_suppress_tokens": _honoured("first"),
    "sequence_bias": _honoured([[[30], 100.0]]),
    "token_healing": _refused(True, "heal the prompt before"),
    "guidance_scale": _on_host(1.5, "a second forward pass per token, of Hugging Face's model"),
    "watermarking_config": _on_host(WatermarkingConfig(bias=5.0)),
    "num_return_sequences": _honoured(2, **_SAMPLING),
    "output_attentions": _refused(True, "the ops keep no attention weights"),
    "output_hidden_states": _refused(True, "the graphs return logits alone"),
    "output_scores": _honoured(True, "one entry per token", return_dict_in_generate=True),
    "output_logits": _honoured(True, "one entry per token", return_dict_in_generate=True),
    "return_dict_in_generate": _honoured(True, "a `GenerateOutput`, with `statistics`"),
    "pad_token_id": _honoured(
        4, prompt=[[5, 6, 7, 8, 9, 10, 11, 12], [30, 31, 32, 33, 34, 35, 36, 37]], eos_token_id="first"
    ),
    "bos_token_id": _honoured(9, "generation starts there without a prompt", prompt=None),
    "eos_token_id": _honoured("first", "at the exact token"),
    "encoder_no_repeat_ngram_size": _honoured(1, "of the prompt", prompt=[list(range(3, 96))]),
    "decoder_start_token_id": _irrelevant("for encoder-decoders"),
    "is_assistant": _refused(True, "a pair is nobody's assistant"),
    "num_assistant_tokens": _honoured(
        2, "as `num_speculative_tokens`, 0..15; as a keyword only, since Hugging Face fills 20 into configs by itself"
    ),
    "num_assistant_tokens_schedule": _irrelevant('`num_speculative_tokens="auto"` is the schedule here'),
    "assistant_confidence_threshold": _irrelevant("every cycle drafts its number of tokens"),
    "prompt_lookup_num_tokens": _refused(3, 'pass `draft="lookup"`'),
    "max_matching_ngram_size": _irrelevant("read with `prompt_lookup_num_tokens` only"),
    "assistant_early_exit": _refused(1, "the draft is the model itself"),
    "assistant_lookbehind": _LOOKBEHIND,
    "target_lookbehind": _LOOKBEHIND,
    "assistant_ensemble_weight": _refused(0.5, "the output follows the target alone"),
    "speculation_type": _refused("dflash", "the draft is the model itself"),
    "compile_config": _irrelevant("compilation is `convert(compile=...)`"),
    "disable_compile": _irrelevant("compilation is `convert(compile=...)`"),
    "continuous_batching_config": _irrelevant("read by `generate_batch` only"),
    "low_memory": _irrelevant("read by contrastive search only"),
    "penalty_alpha": _refused(0.6, "contrastive search", top_k=4),
    "dola_layers": _refused("high", "the graphs return the last layer's logits"),
    "diversity_penalty": _BEAMS,
    "num_beam_groups": _refused(2, "beam search"),
    "constraints": _refused([object()], "beam search"),
    "force_words_ids": _refused([[5]], "beam search"),
    "prefill_chunk_size": _irrelevant("prompts are read in chunks that fit the memory"),
    "_commit_hash": _BOOKKEEPING,
    "_from_model_config": _BOOKKEEPING,
    "transformers_version": _BOOKKEEPING,
}

# Arguments of model.generate that are no field of GenerationConfig.
ARGUMENTS: dict[str, Option] = {
    "inputs": _refused(object(), "the prompt is `input_ids`"),
    "generation_config": Option(HONOURED, "over the model's own; keywords over both"),
    "logits_processor": _on_host(
        [Nothing()],
        "stateless ones of transformers' own types in the graph; others are called once per token, in order",
    ),
    "stopping_criteria": Option(HONOURED, "called once per token, in order"),
    "prefix_allowed_tokens_fn": _on_host(
        lambda row, ids: list(range(3, 96)), "called once per token, in order; drafts are proposed without it"
    ),
    "synced_gpus": _irrelevant("one device"),
    "assistant_model": _refused(object(), "the draft is the model itself"),
    "streamer": Option(
        HONOURED,
        "per token; with `custom_generate=qs.decode` Hugging Face drops it: bind it, "
        "`functools.partial(qs.decode, streamer=streamer)`",
    ),
    "negative_prompt_ids": Option(HONOURED, "read with `guidance_scale`"),
    "negative_prompt_attention_mask": Option(HONOURED, "read with `guidance_scale`"),
    "custom_generate": _refused(print, "it is one itself"),
}

# Keywords of quantspec's own.
OWN: dict[str, Option] = {
    "num_speculative_tokens": Option(HONOURED, 'tokens drafted per cycle, or `"auto"`'),
    "draft": Option(HONOURED, 'where drafts come from: `"self"`, `"lookup"` or `"both"`'),
    "continue_cache": Option(HONOURED, "prefills only what is new"),
    "generator": Option(HONOURED, "of randomness"),
    "seed": Option(HONOURED, "of randomness; a list has one for each row"),
    "row_options": Option(HONOURED, "a dict of options for each row"),
    "tokenizer": Option(HONOURED, "read with `stop_strings`, `json_schema`, `regex` and `grammar`"),
    "json_schema": _on_host({"enum": [1, 2]}, "a dict or JSON text; needs `tokenizer` and the extra `structured`"),
    "regex": _on_host("a|b", "in Rust's syntax; as `json_schema`"),
    "grammar": _on_host('start: "a" | "b"', "in Lark's syntax; as `json_schema`"),
}

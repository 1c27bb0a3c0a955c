"""What a caller of ``generate`` gives: checked before any work, and refused by name where it cannot be honoured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode
from transformers.generation import logits_process as hf

from quantspec.config import ALIASES, check_draft, check_num_speculative_tokens
from quantspec.pair import Pair

from .structured import grammar_processor

# What generate() makes for model.forward in every version, and the loop has no use for.
_IGNORED_MODEL_KWARGS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep"})

# Options that the loop obeys through what Hugging Face prepares, or that greedy search and sampling do not read.
SUPPORTED_OPTIONS = frozenset(
    """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id
    cache_config compile_config continuous_batching_config decoder_start_token_id disable_compile diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale
    length_penalty low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length
    min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beams
    num_return_sequences output_logits output_scores pad_token_id prefill_chunk_size remove_invalid_values
    renormalize_logits repetition_penalty return_dict_in_generate sequence_bias stop_strings suppress_tokens
    target_lookbehind temperature top_h top_k top_p transformers_version typical_p use_cache watermarking_config
    """.split()  # noqa: SIM905 (a word a line would fill a page)
)

# Values with which other options ask for nothing.
_ASKS_FOR_NOTHING: dict[str, tuple] = {
    # The hybrid cache is an old name of the dynamic one.
    "cache_implementation": ("dynamic", "hybrid"),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
}


@dataclass(frozen=True)
class Arguments:
    """Arguments of ``generate`` sorted by who takes them: the decoding loop or Hugging Face."""

    decoding: dict[str, Any]
    hugging_face: dict[str, Any]


def prepare_arguments(
    pair: Pair,
    default_config: GenerationConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    tokenizer: Any,
    structure: Mapping[str, Any],
    num_speculative_tokens: int | str | None,
    draft: str | None,
    continue_cache: bool,
    kwargs: dict[str, Any],
) -> Arguments:
    """Check the inputs of ``generate`` and take out what Hugging Face would drop on the way to the loop."""
    options = dict(kwargs)
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, not {type(generation_config).__name__}")
    for name, reason in _UNSUPPORTED_ARGUMENTS.items():
        value = options.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"generate() does not take {name}: {reason}")
    configs = (generation_config, default_config)
    for name, reason in _UNSUPPORTED_OPTIONS.items():
        if _option(name, options, configs) not in (None, False, *_ASKS_FOR_NOTHING.get(name, ())):
            raise ValueError(f"generate() does not take {name}: {reason}")
    for alias, name in ALIASES.items():
        if alias in options:
            if num_speculative_tokens is not None:
                raise TypeError(f"{alias} and {name} are the same option; pass one of them")
            num_speculative_tokens = options.pop(alias)
    if num_speculative_tokens is not None:
        check_num_speculative_tokens(num_speculative_tokens)
    if draft is not None:
        check_draft(draft)
    if input_ids is not None:
        check_input_ids(pair, input_ids)
    if attention_mask is not None:
        check_attention_mask(input_ids, attention_mask)
        options["attention_mask"] = attention_mask
    check_eos(options, configs)
    _take_stop_strings(options, configs, tokenizer)
    _take_structure(options, configs, tokenizer, structure, pair.vocab_size)
    check_continue_cache(continue_cache)
    decoding = {
        "num_speculative_tokens": num_speculative_tokens,
        "draft": draft,
        "continue_cache": continue_cache,
    }
    return Arguments(decoding, options)


_UNSUPPORTED_ARGUMENTS = {
    "inputs": "the prompt is called input_ids",
    "custom_generate": "it is one itself; call model.generate(custom_generate=qs.decode) from the other side",
    "assistant_model": "the draft is the model itself",
    "position_ids": "positions follow from attention_mask",
    "inputs_embeds": "pass input_ids",
    "past_key_values": "the pair keeps its own cache; continue_cache=True goes on with it",
}
# Options for which Hugging Face does some work before it calls decode().
_UNSUPPORTED_OPTIONS = {
    "cache_implementation": "the pair keeps its own cache",
    "token_healing": "heal the prompt before",
}


def _option(name: str, options: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> Any:
    """What Hugging Face takes an option for: a keyword wins, also None; a config where it says something."""
    if name in options:
        return options[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def check_input_ids(pair: Pair, input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor of shape (batch, tokens), not {type(input_ids).__name__}; "
            "pass tokenizer(..., return_tensors='pt').input_ids"
        )
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, tokens), not {tuple(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integers, not {input_ids.dtype}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is empty (shape {tuple(input_ids.shape)}); pass at least one token per prompt")
    if input_ids.device != pair.device:
        raise ValueError(
            f"input_ids are on {input_ids.device} and the model on {pair.device}; use input_ids.to('{pair.device}')"
        )
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= pair.vocab_size:
        raise ValueError(f"input_ids must be in 0..{pair.vocab_size - 1}, found {low if low < 0 else high}")


def check_attention_mask(input_ids: Tensor | None, attention_mask: Tensor, pad: Tensor | None = None) -> None:
    """Refuse a mask that cannot be used; one that hides ``pad`` tokens alone may be Hugging Face's own."""
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, not {type(attention_mask).__name__}")
    if input_ids is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}"
        )
    if input_ids is not None and attention_mask.device != input_ids.device:
        raise ValueError(f"attention_mask is on {attention_mask.device}, but input_ids on {input_ids.device}")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold 0 and 1 only")
    hidden = (attention_mask == 0).all(dim=1)
    if pad is not None and input_ids is not None and bool((hidden & (input_ids == pad).all(dim=1)).any()):
        raise ValueError(
            f"a prompt holds nothing but padding (token {int(pad)}); give it another token, or pass an attention_mask "
            "that shows one"
        )
    if bool(hidden.any()):
        raise ValueError("attention_mask hides every token of a prompt; each needs at least one 1")


def check_eos(options: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> None:
    """Refuse options without the EOS token that Hugging Face looks for, and does not find by an error of its own."""
    eos = _option("eos_token_id", options, configs)
    if isinstance(eos, Sequence) and not eos and _option("pad_token_id", options, configs) is None:
        raise ValueError("eos_token_id is an empty list; pass eos_token_id=None for texts that end by their length")
    if eos is None and _option("exponential_decay_length_penalty", options, configs) is not None:
        raise ValueError("exponential_decay_length_penalty favours the EOS token, and there is none: pass eos_token_id")


def check_tokens_of(processors: LogitsProcessorList, vocab_size: int) -> None:
    """Refuse tokens beyond the vocabulary, which transformers' processors find late, and programs of them never."""
    for processor in processors:
        name, tokens = _TOKENS_OF.get(type(processor), ("", None))
        for token in [] if tokens is None else torch.as_tensor(tokens(processor), device="cpu").flatten().tolist():
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} must be in 0..{vocab_size - 1}, found {token}")


def _biased(processor: Any) -> list[int]:
    return [token for sequence in processor.sequence_bias for token in sequence]


_TOKENS_OF: dict[type, tuple[str, Callable[[Any], Any]]] = {
    hf.ForcedBOSTokenLogitsProcessor: ("forced_bos_token_id", lambda processor: processor.bos_token_id),
    hf.ForcedEOSTokenLogitsProcessor: ("forced_eos_token_id", lambda processor: processor.eos_token_id),
    hf.ExponentialDecayLengthPenalty: (
        "eos_token_id, with exponential_decay_length_penalty,",
        lambda processor: processor.eos_token_id,
    ),
    hf.SequenceBiasLogitsProcessor: ("tokens of sequence_bias", _biased),
    hf.NoBadWordsLogitsProcessor: ("tokens of bad_words_ids", _biased),
}


def check_negative_prompt(ids: Any, batch: int, vocab_size: int) -> None:
    """Refuse ``negative_prompt_ids`` that are not token ids ``(B, S)``, a row for each of the batch."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError("negative_prompt_ids must be a tensor of token ids of shape (batch, tokens)")
    if len(ids) != batch:
        raise ValueError(
            f"negative_prompt_ids has {len(ids)} rows and the batch {batch}; pass one for each (num_return_sequences "
            "makes rows too)"
        )
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"negative_prompt_ids must be in 0..{vocab_size - 1}, found {low if low < 0 else high}")


def check_streamer(streamer: Any) -> None:
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            "streamer must have put() and end() as transformers' BaseStreamer, such as TextStreamer(tokenizer), "
            f"not {type(streamer).__name__}"
        )


def check_continue_cache(continue_cache: Any) -> None:
    if not isinstance(continue_cache, bool):
        raise TypeError(f"continue_cache must be True or False, not {continue_cache!r}")


def check_generator(generator: Any, device: torch.device) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}; a number goes to seed=")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device} and the model on {device}")


def _take_stop_strings(options: dict[str, Any], configs: Sequence[GenerationConfig | None], tokenizer: Any) -> None:
    """Turn ``stop_strings`` into a criterion here: Hugging Face drops the tokenizer before it calls the loop."""
    strings = _option("stop_strings", options, configs)
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate()")
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
    criteria.extend(options.get("stopping_criteria") or [])
    options["stopping_criteria"] = criteria
    options["stop_strings"] = None


def _take_structure(
    options: dict[str, Any],
    configs: Sequence[GenerationConfig | None],
    tokenizer: Any,
    structure: Mapping[str, Any],
    vocab_size: int,
) -> None:
    """Turn a ``structure`` into a logits processor, and let EOS end the text whatever else may."""
    if not structure:
        return
    eos = _option("eos_token_id", options, configs)
    if eos is None:
        eos = options["eos_token_id"] = getattr(tokenizer, "eos_token_id", None)
    ids = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    processor = grammar_processor(structure, tokenizer, ids, vocab_size)
    options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or []), processor])


def refuse_unsupported(
    config: GenerationConfig, model_kwargs: dict[str, Any], bare_call: Callable[[], dict[str, Any]]
) -> None:
    """Refuse by name what this loop does not do, also options and arguments that it has never heard of.

    Args:
        config: as Hugging Face prepared it.
        model_kwargs: the caller's arguments for ``model.forward`` and what Hugging Face added to them.
        bare_call: makes the model arguments of the same call without any of the caller's own.
    """
    refuse_options(config)
    given = {
        name: value
        for name, value in model_kwargs.items()
        if value is not None and value is not False and not (isinstance(value, Mapping) and not value)
    }
    for name, value in given.items():
        if isinstance(value, Cache) and value.get_seq_length() > 0:
            raise ValueError(f"generate() does not take {name}: {_UNSUPPORTED_ARGUMENTS['past_key_values']}")
    unknown = {name for name, value in given.items() if not isinstance(value, Cache)} - _IGNORED_MODEL_KWARGS
    if unknown:
        bare = bare_call()
        unknown = {name for name in unknown if name not in bare or not _alike(given[name], bare[name])}
    if unknown:
        # An image comes as what its encoder made of it, in a dict by the kind of input.
        names = [
            f"{name} ({', '.join(map(str, given[name]))})" if isinstance(given[name], Mapping) else name
            for name in sorted(unknown)
        ]
        raise ValueError(
            f"model argument {', '.join(names)} is not supported by quantspec; only input_ids and attention_mask"
        )
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None and not _count_from_0(positions, mask):
        own = bare_call().get("position_ids")
        if own is None or own.shape != positions.shape or not torch.equal(own, positions):
            raise ValueError(f"generate() does not take position_ids: {_UNSUPPORTED_ARGUMENTS['position_ids']}")


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls have the same argument; objects of one type that cannot be compared count as the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_alike, one, other))
    if type(one) is not type(other) or type(one).__eq__ is object.__eq__:
        return type(one) is type(other)
    try:
        return bool(one == other)
    except ValueError:
        # That of an array has as many answers as elements.
        return True


def _count_from_0(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether each text's tokens, those that ``mask (B, S)`` shows, have the ``positions (B, S)`` 0, 1, 2, ..."""
    shown = torch.ones_like(positions) if mask is None else mask
    return shown.shape == positions.shape and torch.equal(positions * shown, (shown.cumsum(-1) - 1) * shown)


def refuse_options(config: GenerationConfig) -> None:
    """Refuse by name the options that this loop does not obey."""
    names = [
        name
        for name, default in vars(GenerationConfig()).items()
        if not name.startswith("_")
        and name not in SUPPORTED_OPTIONS
        and (value := getattr(config, name, None)) is not None
        and value is not False
        and value != default
        and value not in _ASKS_FOR_NOTHING.get(name, ())
    ]
    if names:
        raise ValueError(f"generation option {', '.join(names)} is not supported by quantspec; leave it unset")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode '{mode.value}' is not supported (num_beams={config.num_beams}); "
            "quantspec does greedy search and sampling: set num_beams=1"
        )


def bare_call_arguments(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> dict[str, Any]:
    """What Hugging Face hands to a decoding loop for the model when the caller gives it a prompt alone, by name."""
    prepared: dict[str, Any] = {}

    def note(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
        prepared.update(arguments)
        return input_ids

    config = copy.copy(config)
    # The tokenizer that stop strings need has been dropped, and the length is in max_length by now.
    config.stop_strings = config.max_new_tokens = None
    # The prompts are there as often as texts are wanted.
    config.num_return_sequences = 1
    type(model).generate(
        model, input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=note
    )
    return prepared

"""The speculative loop: prefill, then cycles of draft, verify, accept, flush.

Hugging Face's own ``generate`` prepares everything around it (defaults, logits processors, stopping criteria, lengths)
and calls :func:`decode` through ``custom_generate``, so options mean what they mean there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from .cache import HierarchicalCache, check_cache_len
from .config import ALIASES, check_num_speculative_tokens
from .cycle import Cycle, CycleResult, GraphedCycle
from .prefill import prefill
from .progress import Progress
from .sampling import sample, sample_step
from .scores import ScoreProcessor, apply_processors, stateless
from .speculation import DraftCount
from .stats import GenerationStats

if TYPE_CHECKING:
    from .model import QuantSpecModel

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
    num_return_sequences output_scores pad_token_id prefill_chunk_size remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sequence_bias stop_strings suppress_tokens target_lookbehind
    temperature top_h top_k top_p transformers_version typical_p use_cache watermarking_config
    """.split()  # noqa: SIM905 (a word a line would fill a page)
)

# Values with which other options ask for nothing.
_ASKS_FOR_NOTHING: dict[str, tuple] = {
    # The hybrid cache is an old name of the dynamic one.
    "cache_implementation": ("dynamic", "hybrid"),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
}

NAN_LOGITS = (
    "the model's logits are NaN, so no token can be chosen; check the weights, or load the model in bfloat16 or "
    "float32 if it overflows float16"
)

NO_DISTRIBUTION = (
    "no token can be sampled: after logits processors and temperature every score is -inf, or one is NaN or inf; check "
    "the processors (a constraint that leaves no token, a tiny temperature) and whether the model's logits are NaN"
)


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' ``GenerateDecoderOnlyOutput`` with the call's statistics; its fields not named here are None.

    Attributes:
        sequences: ``(B, S + new)`` int64 token ids.
        scores: with ``output_scores=True`` one ``(B, V)`` float32 per new token, after the logits processors.
        statistics: the call's :class:`GenerationStats`, a copy.
    """

    statistics: GenerationStats | None = None


@dataclass(frozen=True)
class Arguments:
    """Arguments of ``generate`` sorted by who takes them: the decoding loop or Hugging Face."""

    decoding: dict[str, Any]
    hugging_face: dict[str, Any]


def prepare_arguments(
    qs: QuantSpecModel,
    default_config: GenerationConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    tokenizer: Any,
    num_speculative_tokens: int | str | None,
    continue_cache: bool,
    kwargs: dict[str, Any],
) -> Arguments:
    """Check the inputs of ``generate`` and take out what Hugging Face would drop on the way to :func:`decode`."""
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
    if input_ids is not None:
        check_input_ids(qs, input_ids)
    if attention_mask is not None:
        check_attention_mask(input_ids, attention_mask)
        options["attention_mask"] = attention_mask
    _take_stop_strings(options, configs, tokenizer)
    if not isinstance(continue_cache, bool):
        raise TypeError(f"continue_cache must be True or False, not {continue_cache!r}")
    return Arguments({"num_speculative_tokens": num_speculative_tokens, "continue_cache": continue_cache}, options)


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


def _option(name: str, options: dict[str, Any], configs: Sequence[GenerationConfig | None]) -> Any:
    """What Hugging Face takes an option for: a keyword wins, also None; a config where it says something."""
    if name in options:
        return options[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def check_seed(seed: Any) -> int:
    """``seed`` as an int that torch takes."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an int, not {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be between -2**63 and 2**64 - 1, not {number}")
    return number


def check_input_ids(qs: QuantSpecModel, input_ids: Tensor) -> None:
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
    if input_ids.device != qs.device:
        raise ValueError(
            f"input_ids are on {input_ids.device} and the model on {qs.device}; use input_ids.to('{qs.device}')"
        )
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= qs.vocab_size:
        raise ValueError(f"input_ids must be in 0..{qs.vocab_size - 1}, found {low if low < 0 else high}")


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


def _take_stop_strings(options: dict[str, Any], configs: Sequence[GenerationConfig | None], tokenizer: Any) -> None:
    """Turn ``stop_strings`` into a criterion here: Hugging Face drops the tokenizer before it calls :func:`decode`."""
    strings = _option("stop_strings", options, configs)
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate()")
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
    criteria.extend(options.get("stopping_criteria") or [])
    options["stopping_criteria"] = criteria
    options["stop_strings"] = None


def end_quietly(streamer: Any) -> None:
    """Tell whoever reads from ``streamer`` in another thread that nothing more comes; the error goes its own way."""
    if hasattr(streamer, "end"):
        with contextlib.suppress(Exception):
            streamer.end()


@contextlib.contextmanager
def _ends_on_failure(streamer: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        end_quietly(streamer)
        raise


def refuse_unsupported(
    config: GenerationConfig, model_kwargs: dict[str, Any], bare_call: Callable[[], set[str]]
) -> None:
    """Refuse by name what this loop does not do, also options and arguments that it has never heard of.

    Args:
        config: as Hugging Face prepared it.
        model_kwargs: the caller's arguments for ``model.forward`` and what Hugging Face added to them.
        bare_call: names of the model arguments of the same call without any of the caller's own.
    """
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
    given = {name: value for name, value in model_kwargs.items() if value is not None and value is not False}
    for name, value in given.items():
        if isinstance(value, Cache) and value.get_seq_length() > 0:
            raise ValueError(f"generate() does not take {name}: {_UNSUPPORTED_ARGUMENTS['past_key_values']}")
    unknown = {name for name, value in given.items() if not isinstance(value, Cache)} - _IGNORED_MODEL_KWARGS
    if unknown and (unknown := unknown - bare_call()):
        raise ValueError(
            f"model argument {', '.join(sorted(unknown))} is not supported by quantspec; only input_ids and "
            "attention_mask"
        )


def bare_call_arguments(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> set[str]:
    """Names of what Hugging Face hands to a decoding loop for the model when the caller gives it a prompt alone."""
    names: set[str] = set()

    def note(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
        names.update(arguments)
        return input_ids

    config = copy.copy(config)
    # The tokenizer that stop strings need has been dropped, and the length is in max_length by now.
    config.stop_strings = config.max_new_tokens = None
    type(model).generate(
        model, input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=note
    )
    return names


@torch.no_grad()
def decode(
    qs: QuantSpecModel,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    num_speculative_tokens: int | str | None = None,
    continue_cache: bool = False,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Decode prepared inputs; the ``custom_generate`` callable of ``model.generate`` with ``qs`` bound.

    Args:
        qs: the pair.
        model: the Hugging Face model that calls; must be the converted one.
        input_ids: ``(B, S)`` prompts; ``model_kwargs["attention_mask"]`` tells padding.
        logits_processor, stopping_criteria, generation_config: as Hugging Face prepared them.
        streamer, generator: as in :meth:`QuantSpecModel.generate`.
        num_speculative_tokens: tokens drafted per cycle; the config's number if None.
        continue_cache: prefill only what the previous call's text does not begin with.
        synced_gpus: Hugging Face's, for several GPUs; has no effect on one.
        **model_kwargs: what Hugging Face prepared for the model's forward; only ``attention_mask`` is used.

    Returns:
        As :meth:`QuantSpecModel.generate`.

    Raises:
        ValueError, TypeError: another model than the converted one, or as :meth:`QuantSpecModel.generate`, which names
            the other errors too.
    """
    with _ends_on_failure(streamer):
        if model is not qs.model:
            raise ValueError("this decoding loop belongs to another model: convert() the one that generates")
        qs.check_unmoved()
        attention_mask = model_kwargs.get("attention_mask")
        bare_call = functools.partial(bare_call_arguments, model, input_ids, attention_mask, generation_config)
        refuse_unsupported(generation_config, model_kwargs, bare_call)
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(
                "streamer must have put() and end() as transformers' BaseStreamer, such as TextStreamer(tokenizer), "
                f"not {type(streamer).__name__}"
            )
        check_input_ids(qs, input_ids)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, not {type(generator).__name__}; a number goes to seed="
            )
        if generator is not None and generator.device.type != qs.device.type:
            raise ValueError(f"generator is on {generator.device} and the model on {qs.device}")
        if num_speculative_tokens is None:
            num_speculative_tokens = qs.config.num_speculative_tokens
        else:
            check_num_speculative_tokens(num_speculative_tokens)
        # As in Hugging Face, whose loop appends int64 tokens to whatever integers the prompt came in.
        input_ids = input_ids.long()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        pad = generation_config._pad_token_tensor
        check_attention_mask(input_ids, attention_mask, pad)
        prompts = [row[mask] for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        longest = max(map(len, prompts))
        # A caller's criterion takes the place of the config's.
        lengths = [criterion.max_length for criterion in stopping_criteria if type(criterion) is MaxLengthCriteria]
        max_new_tokens = max(1, min(lengths, default=generation_config.max_length) - input_ids.shape[1])
        assert qs.config.max_cache_len is not None
        check_cache_len(longest + max_new_tokens, qs.config.max_cache_len)

        draft_count = qs.draft_count(num_speculative_tokens, len(prompts), longest)
        stats = GenerationStats(draft_count.most, num_sequences=len(prompts), prompt_tokens=sum(map(len, prompts)))
        returns_dict = bool(generation_config.return_dict_in_generate)
        progress = Progress(
            input_ids,
            max_new_tokens,
            0 if pad is None else int(pad),
            stopping_criteria,
            streamer,
            returns_dict and bool(generation_config.output_scores),
            slack=draft_count.most + 1,
        )
        with qs.exclusive():
            try:
                with _out_of_memory_releases(qs, len(prompts), longest + max_new_tokens):
                    cache = qs.acquire_cache(prompts, draft_count.most, continue_cache)
                    cache.reserve(longest + max_new_tokens)
                    stats.continued_tokens = int(cache.length.sum())
                    do_sample = bool(generation_config.do_sample)
                    loop = SpeculativeLoop(qs, cache, progress, logits_processor, do_sample, generator, stats)
                    if streamer is not None:
                        streamer.put(input_ids.cpu())
                    loop.run(prompts, draft_count)
                qs.keep_cache(cache, [torch.cat(pair) for pair in zip(prompts, progress.new_tokens(), strict=True)])
            finally:
                qs.last_stats = stats
    if streamer is not None:
        streamer.end()
    if not returns_dict:
        return progress.output()
    return GenerateOutput(
        sequences=cast(torch.LongTensor, progress.output()),
        scores=cast("tuple[torch.FloatTensor] | None", progress.scores),
        statistics=copy.deepcopy(stats),
    )


@contextlib.contextmanager
def _out_of_memory_releases(qs: QuantSpecModel, num_sequences: int, num_tokens: int) -> Iterator[None]:
    """Turn running out of memory into an error that says what was asked for, with the cache given back."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        qs.release_cache()
        raise torch.OutOfMemoryError(
            f"out of memory with {num_sequences} sequence(s) of up to {num_tokens} tokens; use a smaller batch, a "
            f"shorter prompt or fewer max_new_tokens (the cache has been released): {error}"
        ) from error


class SpeculativeLoop:
    """The host's part of one generation: prefill, cycles, and what each cycle's result means for the output."""

    def __init__(
        self,
        qs: QuantSpecModel,
        cache: HierarchicalCache,
        progress: Progress,
        processors: LogitsProcessorList,
        do_sample: bool,
        generator: torch.Generator | None,
        stats: GenerationStats,
    ) -> None:
        self.qs = qs
        self.cache = cache
        self.progress = progress
        self.processors = processors
        self.process = ScoreProcessor(processors)
        self.do_sample = do_sample
        self.generator = generator
        self.stats = stats

    def run(self, prompts: list[Tensor], draft_count: DraftCount) -> None:
        """Generate after ``prompts`` until every sequence is done; what the cache holds of them is not prefilled.

        Raises:
            FloatingPointError: the model's logits are NaN, or no token can be sampled from the processed scores.
        """
        pending = self._prefill(prompts)
        if not any(self.progress.running):
            return
        if len(stateless(self.processors)) < len(self.processors):
            self._run_in_lockstep(pending, draft_count)
        elif self.progress.scores is None and self.qs.graphs_cycles(self.processors):
            self._run_graphed(pending, draft_count)
        else:
            self._run_eager(pending, draft_count)

    def _run_eager(self, pending: Tensor, draft_count: DraftCount) -> None:
        cycle = self._eager_cycle(pending, self.process)
        while any(self.progress.running):
            start = self._now()
            cycle.running.copy_(torch.tensor(self.progress.running, device="cpu"))
            packed, scores = cycle(min(draft_count.choose(), self.progress.remaining - 1))
            result = CycleResult.read(packed)
            if result.flush_due:
                self.cache.flush()
            self._finish(result, scores, draft_count, start, start)

    def _eager_cycle(self, pending: Tensor, process: ScoreProcessor) -> Cycle:
        cycle = Cycle(
            self.qs,
            self.cache,
            lambda logits, num_drafted: process(logits, self.progress, num_drafted),
            self.do_sample,
            self.generator,
            self.progress.write_draft if process.needs_context else None,
        )
        cycle.pending.copy_(pending)
        return cycle

    def _run_in_lockstep(self, pending: Tensor, draft_count: DraftCount) -> None:
        """Cycles in which processors see what they see in plain decoding: one call per token, for all rows at once.

        Drafts know of the stateless ones alone, which costs acceptance but leaves the target's distribution as it is.
        """
        cycle = self._eager_cycle(pending, ScoreProcessor(stateless(self.processors)))
        while any(self.progress.running):
            start = self._now()
            running = self.progress.running
            cycle.running.copy_(torch.tensor(running, device="cpu"))
            drafts, draft_probs, logits = cycle.propose(min(draft_count.choose(), self.progress.remaining - 1))
            accepted, tokens = self._walk(drafts, draft_probs, logits)
            flush_due = bool(cycle.keep(torch.full_like(tokens, accepted), tokens))
            if flush_due:
                self.cache.flush()
            counts = [accepted] * sum(running)
            draft_count.record(drafts.shape[1], counts, self._now() - start)
            self.stats.flushes += flush_due
            self.stats.record_cycle(drafts.shape[1], counts, self._clock() - start)

    def _walk(self, drafts: Tensor, draft_probs: list[Tensor], logits: Tensor) -> tuple[int, Tensor]:
        """Emit the tokens of a block one by one until one sequence rejects its draft, or all are done.

        Returns:
            How many drafts every sequence accepted, and the token ``(B,)`` of each that follows them.
        """
        for step in range(logits.shape[1]):
            running = torch.tensor(self.progress.running, device="cpu").to(logits.device)
            if bool(logits[running, step].isnan().any()):
                raise FloatingPointError(NAN_LOGITS)
            # Running sequences are equally long, and those that are done are padded.
            text = self.progress.sequences[:, : max(self.progress.context_lens)]
            scores = apply_processors(self.processors, text, logits[:, step].to(torch.float32, copy=True))
            if step < drafts.shape[1]:
                tokens = self._choose(scores, drafts[:, step], draft_probs[step] if self.do_sample else None)
                rejected = bool((tokens != drafts[:, step])[running].any())
            else:
                tokens, rejected = self._choose(scores), True
            for row, token in enumerate(tokens.tolist()):
                self.progress.append(row, [token], scores[row : row + 1])
            self._judge()
            if rejected or not any(self.progress.running):
                break
        return step, tokens

    def _run_graphed(self, pending: Tensor, draft_count: DraftCount) -> None:
        graphed: GraphedCycle | None = None
        running: list[bool] = []
        try:
            while any(self.progress.running):
                start = self._clock()
                chosen, is_new = self.qs.graphed_cycle(
                    self.cache, draft_count.choose(), self.processors, self.do_sample
                )
                if chosen is not graphed:
                    if graphed is not None:
                        graphed.end(self.generator)
                        pending = graphed.cycle.pending
                    chosen.begin(self.processors, self.generator)
                    chosen.cycle.pending.copy_(pending)
                    graphed, running = chosen, []
                if running != self.progress.running:
                    running = self.progress.running
                    graphed.cycle.running.copy_(torch.tensor(running, device="cpu"))
                # Capture and change of graphs take their time, but not in the next cycle of as many drafts.
                replay = self._clock()
                result = CycleResult.read(graphed())
                if result.flush_due:
                    graphed.flush()
                self._finish(result, None, draft_count, start, None if is_new else replay)
        finally:
            if graphed is not None:
                graphed.end(self.generator)

    def _finish(
        self,
        result: CycleResult,
        scores: Tensor | None,
        draft_count: DraftCount,
        start: float,
        typical_start: float | None,
    ) -> None:
        """Count a cycle and emit each running sequence's accepted tokens and the target's own next one.

        The cycle began at ``start``, and at ``typical_start`` what every cycle of so many drafts does; None if this one
        is unlike others.
        """
        if result.has_nan:
            raise FloatingPointError(NO_DISTRIBUTION if self.do_sample else NAN_LOGITS)
        running = self.progress.running
        accepted = [count for count, runs in zip(result.accepted, running, strict=True) if runs]
        for row, count in enumerate(result.accepted):
            if running[row]:
                tokens = [*result.drafts[row][:count], result.next_tokens[row]]
                self.progress.append(row, tokens, None if scores is None else scores[row, : count + 1])
        # Judging takes as long per token however many were drafted, so choosing their number does without it.
        now = self._now()
        draft_count.record(len(result.drafts[0]), accepted, None if typical_start is None else now - typical_start)
        self._judge()
        self.stats.flushes += result.flush_due
        self.stats.record_cycle(len(result.drafts[0]), accepted, self._clock() - start)

    def _prefill(self, prompts: list[Tensor]) -> Tensor:
        """Cache what is new of the prompts; emits and returns the first token of each, ``(B,)``."""
        start = self._now()
        logits = prefill(self.qs, self.cache, prompts)
        self.stats.cache_bytes = self.cache.bytes_by_part()
        self.stats.weight_bytes = self.qs.weight_bytes()
        if bool(logits.isnan().any()):
            raise FloatingPointError(NAN_LOGITS)
        scores = self.process(logits, self.progress)
        pending = self._choose(scores[:, 0])
        for row, token in enumerate(pending.tolist()):
            self.progress.append(row, [token], scores[row])
        self._judge()
        self.stats.prefill_seconds = self._clock() - start
        return pending

    def _choose(self, scores: Tensor, drafts: Tensor | None = None, draft_probs: Tensor | None = None) -> Tensor:
        """The token ``(B,)`` that scores ``(B, V)`` choose, when sampling by way of the drafts ``(B,)`` if any."""
        if not self.do_sample:
            return scores.argmax(-1)
        probs = scores.softmax(-1)
        running = torch.tensor(self.progress.running, device="cpu").to(probs.device)
        if bool(probs[running].isnan().any()):
            raise FloatingPointError(NO_DISTRIBUTION)
        if drafts is None or draft_probs is None:
            return sample(probs, self.generator)
        return sample_step(drafts, draft_probs, probs, self.generator)

    def _judge(self) -> None:
        """Stream what is complete, and stop where the criteria say so."""
        self.progress.judge()
        self.stats.generated_tokens = self.progress.num_generated()

    def _clock(self) -> float:
        """Seconds, standing still in the caller's streamer and stopping criteria."""
        return time.perf_counter() - self.progress.user_seconds

    def _now(self) -> float:
        """The clock, once the device has done what was asked of it."""
        if self.qs.device.type == "cuda":
            torch.cuda.synchronize(self.qs.device)
        return self._clock()

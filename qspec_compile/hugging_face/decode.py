"""The ``custom_generate`` callable: checks, session, loop, output.

Hugging Face's own ``generate`` prepares everything around it (defaults, logits processors, stopping criteria, lengths),
so options mean what they mean there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from quantspec.cache import check_cache_len
from quantspec.config import check_draft, check_num_speculative_tokens
from quantspec.engine.cycles import Call
from quantspec.engine.logits_processors import in_lockstep, merge_processors
from quantspec.engine.loop import SpeculativeLoop
from quantspec.engine.progress import Progress
from quantspec.engine.session import Session
from quantspec.engine.stats import GenerationStats
from quantspec.passes import Role

from .arguments import (
    bare_call_arguments,
    check_attention_mask,
    check_continue_cache,
    check_generator,
    check_input_ids,
    check_streamer,
    check_tokens_of,
    refuse_unsupported,
)
from .rows import Prepared, check_seed, row_seeds


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' ``GenerateDecoderOnlyOutput`` with the call's statistics; its fields not named here are None.

    Attributes:
        sequences: ``(B, S + new)`` int64 token ids.
        scores: with ``output_scores=True`` one ``(B, V)`` float32 per new token, after the logits processors.
        logits: with ``output_logits=True`` the same before them.
        statistics: the call's :class:`GenerationStats`, a copy.
    """

    statistics: GenerationStats | None = None


@torch.no_grad()
def decode(
    session: Session,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    num_speculative_tokens: int | str | None = None,
    draft: str | None = None,
    continue_cache: bool = False,
    seed: int | Sequence[int] | None = None,
    verifier: Role = Role.TARGET,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Decode prepared inputs; the ``custom_generate`` callable of ``model.generate`` with ``session`` bound.

    Args:
        session: of the pair.
        model: the Hugging Face model that calls; must be the converted one.
        input_ids: ``(B, S)`` prompts; ``model_kwargs["attention_mask"]`` tells padding.
        logits_processor, stopping_criteria, generation_config: as Hugging Face prepared them.
        streamer, generator, seed: as in :meth:`quantspec.QuantSpecModel.generate`. transformers hands a streamer to its
            own loops only: bind it, ``custom_generate=functools.partial(qs.decode, streamer=streamer)``.
        num_speculative_tokens: tokens drafted per cycle; the pair's number if None.
        draft: where they come from; the config's choice if None.
        continue_cache: prefill only what the previous call's text does not begin with.
        verifier: the role whose distribution is emitted.
        synced_gpus: Hugging Face's, for several GPUs; has no effect on one.
        **model_kwargs: what Hugging Face prepared for the model's forward; only ``attention_mask`` is used.

    Returns:
        As :meth:`quantspec.QuantSpecModel.generate`.

    Raises:
        ValueError, TypeError: another model than the converted one, or as :meth:`quantspec.QuantSpecModel.generate`,
            which names the other errors too.
    """
    with ends_on_failure(streamer):
        pair = session.pair
        if model is not pair.model:
            raise ValueError("this decoding loop belongs to another model: convert() the one that generates")
        check_continue_cache(continue_cache)
        pair.check_unmoved()
        check_input_ids(pair, input_ids)
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            check_attention_mask(input_ids, mask, generation_config._pad_token_tensor)
        bare_call = functools.partial(bare_call_arguments, model, input_ids, mask, generation_config)
        refuse_unsupported(generation_config, model_kwargs, bare_call)
        return decode_checked(
            session,
            input_ids,
            mask,
            Prepared(logits_processor, stopping_criteria, generation_config),
            streamer,
            generator,
            num_speculative_tokens,
            draft,
            continue_cache,
            seed,
            verifier=verifier,
        )


def decode_checked(
    session: Session,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prepared: Prepared,
    streamer: BaseStreamer | None,
    generator: torch.Generator | None,
    num_speculative_tokens: int | str | None,
    draft: str | None,
    continue_cache: bool,
    seed: int | Sequence[int] | None,
    rows: Sequence[Prepared] | None = None,
    verifier: Role = Role.TARGET,
) -> Tensor | GenerateOutput:
    """:func:`decode` of ids, mask and options that have been checked; the rest is checked here.

    ``prepared`` are the options of the batch; ``rows`` those of each row, where they differ.
    """
    pair = session.pair
    check_streamer(streamer)
    check_generator(generator, pair.device)
    if seed is not None:
        if generator is not None:
            raise ValueError("pass either generator or seed, not both")
        seed = check_seed(seed)
    if num_speculative_tokens is None:
        num_speculative_tokens = pair.num_speculative_tokens
    else:
        check_num_speculative_tokens(num_speculative_tokens)
    source = pair.config.draft if draft is None else check_draft(draft)
    # As in Hugging Face, whose loop appends int64 tokens to whatever integers the prompt came in.
    input_ids = input_ids.long()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    prompts = [row[mask] for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
    longest = max(map(len, prompts))
    criteria, config = prepared.criteria, prepared.config
    if rows is None:
        rows = [prepared] * len(prompts)
    else:
        # Each row has a length of its own.
        criteria = StoppingCriteriaList(c for c in criteria if type(c) is not MaxLengthCriteria)
    for row in rows:
        check_tokens_of(row.processors, pair.vocab_size)
    samples = any(row.config.do_sample for row in rows)
    seeds = row_seeds(seed, generator, len(prompts), pair.device) if samples or seed is not None else [0] * len(prompts)
    seeds = pair.agree(seeds)
    each = zip(rows, prompts, seeds, strict=True)
    requests = [row.request(prompt, input_ids.shape[1], own) for row, prompt, own in each]
    num_tokens = longest + max(request.max_new_tokens for request in requests)
    check_cache_len(num_tokens, pair.max_len)

    processors = merge_processors([row.processors for row in rows])
    draft_count = session.draft_count(num_speculative_tokens, source, len(prompts), longest, in_lockstep(processors))
    stats = GenerationStats(draft_count.most, num_sequences=len(prompts), prompt_tokens=sum(map(len, prompts)))
    pad = config._pad_token_tensor
    returns_dict = bool(config.return_dict_in_generate)
    progress = Progress(
        input_ids,
        requests,
        0 if pad is None else int(pad),
        criteria,
        streamer,
        collect_scores=returns_dict and bool(config.output_scores),
        collect_logits=returns_dict and bool(config.output_logits),
        agree=pair.agree,
        abandon=pair.abandon,
    )
    call = Call(progress, processors, session.rule, verifier)
    with session.exclusive():
        try:
            with _out_of_memory_releases(session, progress, num_tokens):
                cache = session.acquire_cache(prompts, draft_count.most, continue_cache)
                cache.reserve(num_tokens)
                stats.continued_tokens = int(cache.length.sum())
                if streamer is not None:
                    progress.stream(input_ids.cpu())
                SpeculativeLoop(session, cache, call, draft_count, stats).run()
            # What another verifier cached is not the target's.
            if verifier is Role.TARGET:
                session.keep_texts(progress.texts())
        finally:
            session.last_stats = stats
    progress.end()
    if not returns_dict:
        return progress.output()
    return GenerateOutput(
        sequences=cast(torch.LongTensor, progress.output()),
        scores=cast("tuple[torch.FloatTensor] | None", progress.scores),
        logits=cast("tuple[torch.FloatTensor] | None", progress.logits),
        statistics=copy.deepcopy(stats),
    )


@contextlib.contextmanager
def ends_on_failure(streamer: Any) -> Iterator[None]:
    """On an error tell whoever reads from ``streamer`` in another thread that nothing more comes."""
    try:
        yield
    except BaseException:
        if hasattr(streamer, "end"):
            with contextlib.suppress(Exception):
                streamer.end()
        raise


@contextlib.contextmanager
def _out_of_memory_releases(session: Session, progress: Progress, num_tokens: int) -> Iterator[None]:
    """Turn running out of memory into an error that says what was asked for, with the cache given back."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if error is progress.failure:
            raise
        session.release()
        raise torch.OutOfMemoryError(
            f"out of memory with {len(progress.requests)} sequence(s) of up to {num_tokens} tokens; use a smaller "
            f"batch, a shorter prompt or fewer max_new_tokens (the cache has been released): {error}"
        ) from error

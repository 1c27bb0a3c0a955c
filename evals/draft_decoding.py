"""Decoding with the draft alone, to see what it would say without the target's verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quantspec.engine.sampling import sample
from quantspec.hugging_face.decode import (
    NAN_LOGITS,
    NO_DISTRIBUTION,
    check_attention_mask,
    check_input_ids,
    refuse_unsupported,
)
from quantspec.passes import Role

from .scoring import PrefilledContexts, forced_blocks

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from quantspec import QuantSpecModel


@torch.no_grad()
def decode_with_draft(
    qs: QuantSpecModel,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search or sampling from the draft, one token at a time; for ``model.generate(custom_generate=...)``.

    Every token but the prompts', which the target prefills, is the draft's, and so are its cached keys and values.

    Args:
        input_ids: ``(B, S)`` prompts; ``model_kwargs["attention_mask"]`` tells padding.
        logits_processor, stopping_criteria, generation_config: as Hugging Face prepared them.

    Returns:
        ``(B, S + new)`` ids.

    Raises:
        ValueError, TypeError: inputs or options that :meth:`QuantSpecModel.generate` refuses too.
        CacheFullError: prompt and output would exceed ``max_cache_len``.
        FloatingPointError: the draft's logits are NaN, or no token can be sampled from the processed scores.
    """
    refuse_unsupported(generation_config, model_kwargs)
    check_input_ids(qs, input_ids)
    attention_mask = model_kwargs.get("attention_mask")
    # Newer versions of transformers make none where nothing is padded.
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    check_attention_mask(input_ids, attention_mask)
    prompts = [ids[keep] for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
    new_tokens = cast(int, generation_config.max_length) - input_ids.shape[1]
    pad = generation_config._pad_token_tensor
    newest = torch.stack([prompt[-1] for prompt in prompts])
    running = torch.ones_like(newest, dtype=torch.bool)
    with qs.exclusive():
        cache = PrefilledContexts(qs, [prompt[:-1] for prompt in prompts], [new_tokens] * len(prompts)).restored()
        while bool(running.any()):
            (block,) = forced_blocks(qs, cache, list(newest[:, None]), Role.DRAFT)
            cache.accept(running.long())
            logits = block.logits[:, 0].float()
            if bool(logits[running].isnan().any()):
                raise FloatingPointError(NAN_LOGITS)
            scores = logits_processor(input_ids, logits)  # type: ignore[arg-type]
            if generation_config.do_sample:
                probs = scores.softmax(-1)
                if bool(probs[running].isnan().any()):
                    raise FloatingPointError(NO_DISTRIBUTION)
                newest = sample(probs, None)
            else:
                newest = scores.argmax(-1)
            newest = newest if pad is None else torch.where(running, newest, pad)
            input_ids = torch.cat((input_ids, newest[:, None]), 1)
            running &= ~stopping_criteria(input_ids, cast(Any, scores))
    return input_ids

"""``generate`` of a pair: the caller's arguments through Hugging Face's own ``generate`` and back to our loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from quantspec.engine.session import Session

from .arguments import (
    bare_call_arguments,
    check_attention_mask,
    check_input_ids,
    check_negative_prompt,
    prepare_arguments,
    refuse_unsupported,
)
from .decode import GenerateOutput, decode_checked, ends_on_failure
from .rows import Prepared, check_row_options, prepare_rows


def generate(
    session: Session,
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    *,
    num_speculative_tokens: int | str | None = None,
    draft: str | None = None,
    continue_cache: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Sequence[int] | None = None,
    row_options: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    json_schema: dict[str, Any] | str | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """:meth:`quantspec.QuantSpecModel.generate`; ``model`` is the converted one or a view with a config of its own."""
    pair = session.pair
    given_config = generation_config
    sources = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    structure = {name: source for name, source in sources.items() if source is not None}

    def method(
        _: Any,
        ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **prepared: Any,
    ) -> Tensor | GenerateOutput:
        mask = prepared.get("attention_mask")
        # What the caller gave has been checked.
        if input_ids is None:
            check_input_ids(pair, ids)
        if attention_mask is None and mask is not None:
            check_attention_mask(ids, mask, generation_config._pad_token_tensor)
        prepared.pop("synced_gpus", None)
        bare_call = functools.partial(bare_call_arguments, pair.model, ids, mask, generation_config)
        refuse_unsupported(generation_config, prepared, bare_call)
        negative = arguments.hugging_face.get("negative_prompt_ids")
        if negative is not None and generation_config.guidance_scale not in (None, 1):
            check_negative_prompt(negative, len(ids), pair.vocab_size)
        rows = None
        if row_options is not None:
            copies = generation_config.num_return_sequences
            rows = prepare_rows(model, ids, mask, given_config, arguments.hugging_face, row_options, copies)
        return decode_checked(
            session,
            ids,
            mask,
            Prepared(logits_processor, stopping_criteria, generation_config),
            streamer,
            generator,
            **arguments.decoding,
            seed=seed,
            rows=rows,
        )

    with ends_on_failure(streamer):
        pair.check_unmoved()
        check_row_options(row_options, structure)
        arguments = prepare_arguments(
            pair,
            model.generation_config,
            input_ids,
            attention_mask,
            generation_config,
            tokenizer,
            structure,
            num_speculative_tokens,
            draft,
            continue_cache,
            kwargs,
        )
        # Not the instance's attribute, which may be this pair's.
        return type(model).generate(  # type: ignore[attr-defined]
            model, input_ids, generation_config=generation_config, custom_generate=method, **arguments.hugging_face
        )

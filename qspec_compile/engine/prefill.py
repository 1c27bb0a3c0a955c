"""Prefill: what is new of a batch of prompts goes into the cache, chunk by chunk."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.logging import counting
from quantspec.pair import Pair

_LOGGER = logging.getLogger(__name__)


def _quietly(count: int) -> None:
    pass


@torch.no_grad()
def prefill(pair: Pair, cache: HierarchicalCache, prompts: Sequence[Tensor]) -> Tensor:
    """Cache the tokens of each 1-D prompt from ``cache.length`` on; at least one prompt must have new ones.

    Returns:
        Logits ``(B, 1, V)`` of each prompt's last token; meaningless for a prompt with nothing new.
    """
    new = [prompt[count:] for prompt, count in zip(prompts, cache.length.tolist(), strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
    lens = torch.tensor([len(row) for row in new], device=ids.device)
    tokens = ids.shape[1]
    chunk = pair.fill_chunk(*ids.shape)
    logits = None
    # A single chunk has no progress to tell of.
    told = counting(_LOGGER, "reading the prompt", tokens) if chunk < tokens else contextlib.nullcontext(_quietly)
    with told as advance:
        for first in range(0, tokens, chunk):
            part = ids[:, first : first + chunk]
            num_new = (lens - first).clamp(0, part.shape[1])
            scored = pair.fill(part, num_new, cache)
            # The last token of a shorter prompt lies in an earlier chunk.
            logits = scored if logits is None else torch.where((num_new > 0)[:, None, None], scored, logits)
            advance(part.shape[1])
    assert logits is not None
    return logits

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
    # The only time that the host waits for the device: from here on it counts by itself.
    lengths = cache.host_lengths()
    new = [prompt[count:] for prompt, count in zip(prompts, lengths.length.tolist(), strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
    tokens = ids.shape[1]
    chunk = pair.fill_chunk(*ids.shape)
    logits = None
    # A single chunk has no progress to tell of.
    told = counting(_LOGGER, "reading the prompt", tokens) if chunk < tokens else contextlib.nullcontext(_quietly)
    with told as advance:
        for first in range(0, tokens, chunk):
            part = ids[:, first : first + chunk]
            num_new = [min(max(len(row) - first, 0), part.shape[1]) for row in new]
            scored = pair.fill(part, num_new, cache, lengths)
            if logits is None or all(num_new):
                logits = scored
            else:
                # The last token of a shorter prompt lies in an earlier chunk.
                for row in (row for row, count in enumerate(num_new) if count):
                    logits[row] = scored[row]
            advance(part.shape[1])
    assert logits is not None
    return logits

"""Logits processors under speculation: every position is processed with the text that precedes it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

# Processors that read the scores alone, so that all positions go through them at once.
_CONTEXT_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.LogitNormalization,
    hf.InfNanRemoveLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
)


class ScoreProcessor:
    """Applies a ``LogitsProcessorList`` to the logits of several positions of sequences of different lengths.

    Attributes:
        needs_context: whether any processor may read the preceding tokens, drafted ones included.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors
        self.needs_context = any(type(processor) not in _CONTEXT_FREE for processor in processors)

    def __call__(self, logits: Tensor, sequences: Tensor, context_lens: list[int]) -> Tensor:
        """Process ``(B, T, V)`` logits.

        Args:
            logits: row t of sequence b scores the token that follows ``sequences[b, : context_lens[b] + t]``.
            sequences: ``(B, W)`` token ids, with drafted tokens in place.
            context_lens: tokens before the first scored one, per sequence.

        Returns:
            ``(B, T, V)`` float32 scores.
        """
        scores = logits.to(torch.float32, copy=True)
        if not self.processors:
            return scores
        batch, tokens, vocab = scores.shape
        if not self.needs_context:
            ids = sequences.new_zeros(batch * tokens, 1)
            return self.processors(ids, scores.view(-1, vocab)).view(batch, tokens, vocab)
        for t in range(tokens):
            if len(set(context_lens)) == 1:
                scores[:, t] = self.processors(sequences[:, : context_lens[0] + t], scores[:, t])
                continue
            # Lengths differ, so each sequence is shown in every row: a processor that looks at its row's number
            # (prefix_allowed_tokens_fn) still sees the right text there.
            processed = [
                self.processors(
                    sequences[b : b + 1, : context + t].expand(batch, -1), scores[b : b + 1, t].repeat(batch, 1)
                )[b]
                for b, context in enumerate(context_lens)
            ]
            scores[:, t] = torch.stack(processed)
        return scores

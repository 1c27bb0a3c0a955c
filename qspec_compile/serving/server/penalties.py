"""OpenAI's penalties, of which transformers has none: they count the new text alone, not the prompt."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """Takes ``presence`` from the scores of tokens that the new text has, and ``frequency`` for each time."""

    def __init__(self, prompt_len: int, presence: float, frequency: float) -> None:
        self._prompt_len = prompt_len
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``(B, V)`` scores of the token that follows each row of ``(B, S)`` ids."""
        new = input_ids[:, self._prompt_len :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)  # type: ignore[return-value]

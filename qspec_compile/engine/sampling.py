"""Choosing tokens so that neither the draft nor the rest of a batch shows in a text.

The next token is the arg-max of the processed scores: of the scores themselves in greedy search, and in sampling of the
scores plus Gumbel noise, which draws from their softmax. The noise belongs to the row's seed and the token's position,
and the draft proposes by the same. So a draft is accepted where it is the target's own choice, and what is emitted is
that choice in any case: it follows the target's distribution, and a row's seed alone gives its text (drafter-invariant
speculative decoding, Daliri et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import gumbel
from .request import Request


class Randomness:
    """Which rows of a batch are sampled, and by which seeds, in tensors that stay where they are.

    Attributes:
        seeds: ``(B,)`` int64.
        sampled: ``(B,)`` bool; the others are searched greedily.
    """

    # Later calls, in inference mode or not, write them.
    @torch.inference_mode(False)
    def __init__(self, cached: Tensor) -> None:
        """``cached (B,)``: tokens of each row in the cache, which the newest one is not."""
        self._cached = cached
        self.seeds = torch.zeros_like(cached)
        self.sampled = torch.zeros_like(cached, dtype=torch.bool)

    @classmethod
    def of(cls, cached: Tensor, requests: Sequence[Request]) -> Randomness | None:
        """That of these rows; None if all are searched greedily."""
        if not any(request.do_sample for request in requests):
            return None
        randomness = cls(cached)
        randomness.load(requests)
        return randomness

    def load(self, requests: Sequence[Request]) -> None:
        """Take over other rows."""
        self.seeds.copy_(torch.tensor([request.seed for request in requests], device="cpu"))
        self.sampled.copy_(torch.tensor([request.do_sample for request in requests], device="cpu"))

    def at(self, num_ahead: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`perturb` takes besides scores of ``count`` positions.

        ``num_ahead`` drafts and the newest token are before the first of them; with -1 the cache alone is.
        """
        ahead = torch.arange(num_ahead + 1, num_ahead + 1 + count, device=self._cached.device)
        return self.seeds, self.sampled, self._cached[:, None] + ahead


def perturb(scores: Tensor, seeds: Tensor, sampled: Tensor, positions: Tensor) -> Tensor:
    """Scores whose arg-max is the choice.

    Args:
        scores: ``(B, T, V)`` float32.
        seeds: ``(B,)`` int64.
        sampled: ``(B,)`` bool; other rows stay as they are.
        positions: ``(B, T)`` int64 tokens of the row's own text before each.
    """
    return torch.where(sampled[:, None, None], scores + gumbel(seeds, positions, scores.shape[-1]), scores)


def accept(draft_tokens: Tensor, target_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the draft tokens that agree with the target.

    Args:
        draft_tokens: ``(B, T)`` int64.
        target_scores: ``(B, T + 1, V)``; the arg-max of row t is the target's choice after the first t draft tokens.

    Returns:
        ``num_accepted (B,)`` and ``next_token (B,)``: the target's own token after the accepted ones.
    """
    choice = target_scores.argmax(-1)
    matches = (draft_tokens == choice[:, :-1]).long()
    num_accepted = matches.cumprod(1).sum(1)
    return num_accepted, choice.gather(1, num_accepted[:, None]).squeeze(1)

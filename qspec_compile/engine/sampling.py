"""Choosing tokens so that neither the draft nor the rest of a batch shows in a text.

The next token is the arg-max of the processed scores: of the scores themselves in greedy search, and in sampling of the
scores plus Gumbel noise, which draws from their softmax. The noise belongs to the row's seed and the token's position,
and the draft proposes by the same. So a draft is accepted where it is the target's own choice, and what is emitted is
that choice in any case: it follows the target's distribution, and a row's seed alone gives its text (drafter-invariant
speculative decoding, Daliri et al. 2025).

:func:`reject` accepts more: two draws by common noise differ more often than two distributions must. It leaves the
distribution as it is, but a seed's text then depends on what was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import gumbel, uniform
from .request import Request

# Counters of noise that are no token's.
_LEFT_NOISE = 2**32


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


def perturbation(scores: Tensor, seeds: Tensor, sampled: Tensor, positions: Tensor) -> Tensor:
    """What :func:`perturb` adds to scores of this shape, by themselves."""
    return torch.where(sampled[:, None, None], gumbel(seeds, positions, scores.shape[-1]), 0.0)


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


def reject(
    draft_tokens: Tensor,
    draft_scores: Tensor,
    target_scores: Tensor,
    seeds: Tensor,
    sampled: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept draft tokens by their odds: speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    A token that was drawn from q stands with probability min(1, p/q); the first that does not is replaced by a draw
    from the positive part of p - q, so that what is emitted follows p.

    Args:
        draft_tokens: ``(B, T)`` int64, of rows that are sampled drawn from ``draft_scores`` by :func:`perturb`.
        draft_scores: ``(B, T, V)`` float32; where they are NaN the token counts as certain.
        target_scores: ``(B, T + 1, V)`` float32.
        seeds: ``(B,)`` int64.
        sampled: ``(B,)`` bool; the other rows accept as in :func:`accept`.
        positions: ``(B, T + 1)`` int64 tokens of the row's own text before each.

    Returns:
        As :func:`accept`.
    """
    vocab = target_scores.shape[-1]
    choice = target_scores.argmax(-1)
    p, q = target_scores.softmax(-1), draft_scores.softmax(-1)
    tokens = draft_tokens[..., None]
    certain = torch.arange(vocab, device=q.device) == tokens
    q = torch.where(q.isnan().any(-1, keepdim=True), certain.to(q.dtype), q)
    of_p, of_q = (x.gather(-1, tokens).squeeze(-1) for x in (p[:, :-1], q))
    stands = uniform(seeds, positions[:, :-1]) * of_q < of_p
    stands = torch.where(sampled[:, None], stands, draft_tokens == choice[:, :-1])
    num_accepted = stands.long().cumprod(1).sum(1)

    # Behind the last draft nothing was proposed.
    place = num_accepted[:, None, None].expand(-1, 1, vocab)
    p, q = p.gather(1, place)[:, 0], F.pad(q, (0, 0, 0, 1)).gather(1, place)[:, 0]
    left = (p - q).clamp(min=0)
    # Where rounding leaves nothing p and q are alike.
    left = torch.where(left.amax(-1, keepdim=True) > 0, left, p)
    # The noise that drew the draft says which token was refused.
    noise = gumbel(seeds, positions.gather(1, num_accepted[:, None]), vocab, first=_LEFT_NOISE)[:, 0]
    drawn = (left.log() + noise).argmax(-1)
    return num_accepted, torch.where(sampled, drawn, choice.gather(1, num_accepted[:, None]).squeeze(1))

"""Accepting draft tokens without changing the target's distribution (Leviathan et al. 2023; Chen et al. 2023).

Greedy: a draft token is accepted while it is the target's argmax. Sampling: token x is accepted with probability
min(1, p(x)/q(x)); at the first rejection the next token is drawn from norm(max(0, p - q)); if all are accepted, from p.
Here p and q are the target's and the draft's distributions after the same logits processors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one index from each row of ``(..., V)`` probabilities, which need not sum to one.

    With E_i exponential, argmax p_i / E_i is i with probability p_i; ``torch.multinomial`` would wait for the device.
    """
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(-1)


def accept_greedy(draft_tokens: Tensor, target_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the draft tokens that agree with the target.

    Args:
        draft_tokens: ``(B, T)`` int64.
        target_scores: ``(B, T + 1, V)``; row t scores the token after the first t draft tokens.

    Returns:
        ``num_accepted (B,)`` and ``next_token (B,)``: the target's own token after the accepted ones.
    """
    choice = target_scores.argmax(-1)
    matches = (draft_tokens == choice[:, :-1]).long()
    num_accepted = matches.cumprod(1).sum(1)
    return num_accepted, choice.gather(1, num_accepted[:, None]).squeeze(1)


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """norm(max(0, p - q)) over the last axis; p itself where the two are equal and nothing is left."""
    excess = (target_probs - draft_probs).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total.clamp(min=torch.finfo(excess.dtype).tiny), target_probs)


def sample_step(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Speculative sampling of one token ``(B,)`` of each sequence: the drafted one, or what stands in its place.

    Args:
        draft_tokens: ``(B,)`` int64, drawn from ``draft_probs``.
        draft_probs, target_probs: ``(B, V)``.
        generator: source of randomness, or None for the global one.
    """
    p, q = (probs.gather(-1, draft_tokens[:, None])[:, 0] for probs in (target_probs, draft_probs))
    uniform = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    return torch.where(uniform * q < p, draft_tokens, sample(residual(target_probs, draft_probs), generator))


def accept_sampled(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Speculative sampling of one block.

    Args:
        draft_tokens: ``(B, T)`` int64, drawn from ``draft_probs``.
        draft_probs: ``(B, T, V)``.
        target_probs: ``(B, T + 1, V)``.
        generator: source of randomness, or None for the global one.

    Returns:
        ``num_accepted (B,)`` and ``next_token (B,)``.
    """
    tokens = draft_tokens.unsqueeze(-1)
    p, q = target_probs[:, :-1].gather(-1, tokens).squeeze(-1), draft_probs.gather(-1, tokens).squeeze(-1)
    uniform = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    # u < p/q without the division; a token the target forbids (p = 0) is never accepted.
    num_accepted = (uniform * q < p).long().cumprod(1).sum(1)
    # Past the last draft token q is zero, and the residual of p over nothing is p: the bonus token.
    draft_probs = torch.cat((draft_probs, torch.zeros_like(target_probs[:, :1])), 1)
    row = num_accepted[:, None, None].expand(-1, 1, target_probs.shape[-1])
    next_probs = residual(target_probs.gather(1, row), draft_probs.gather(1, row)).squeeze(1)
    return num_accepted, sample(next_probs, generator)

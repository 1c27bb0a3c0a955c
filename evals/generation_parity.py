"""Greedy continuations of several roles side by side, and how near a tie was where two part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quantspec import QuantSpecModel

from .roles import EvalRole, decoding_method
from .scoring import forced_text


@dataclass(frozen=True)
class Divergence:
    """Where a continuation leaves the one it is compared with.

    Attributes:
        prompt, index: of the prompt, and of the first new token that differs.
        margin: by how much the other role's logit of its own token there exceeds that of the token chosen instead.
    """

    prompt: int
    index: int
    margin: float


@dataclass(frozen=True)
class GenerationComparison:
    """Greedy continuations of ``role`` beside those of ``against``.

    Attributes:
        role, against: the two roles.
        prompts: how many were continued.
        new_tokens: tokens of each continuation.
        divergences: where a continuation leaves the other role's, one entry per pair that differs.
    """

    role: str
    against: str
    prompts: int
    new_tokens: int
    divergences: list[Divergence]

    @property
    def exact_match_rate(self) -> float:
        """Fraction of continuations that are equal to the last token."""
        return 1 - len(self.divergences) / self.prompts

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "exact_match_rate": self.exact_match_rate}


@torch.no_grad()
def generate_greedily(qs: QuantSpecModel, prompts: Tensor, new_tokens: int, role: EvalRole) -> Tensor:
    """``(B, new_tokens)`` ids after the unpadded ``prompts (B, S)``; EOS does not end the text."""
    tokens = qs.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        custom_generate=decoding_method(qs, role),
    )
    return tokens[:, prompts.shape[1] :]


def compare_generation(
    qs: QuantSpecModel, prompts: Tensor, tokens: dict[EvalRole, Tensor], role: EvalRole, against: EvalRole
) -> GenerationComparison:
    """Compare continuations ``tokens[role]`` with ``tokens[against]``, both ``(B, T)`` after ``prompts (B, S)``."""
    divergences = []
    for row, (ours, theirs) in enumerate(zip(tokens[role], tokens[against], strict=True)):
        different = (ours != theirs).nonzero()
        if len(different):
            index = int(different[0])
            logits = _next_logits(qs, torch.cat((prompts[row], theirs[:index])), against)
            margin = float(logits[theirs[index]] - logits[ours[index]])
            divergences.append(Divergence(row, index, margin))
    prompts_compared, new_tokens = tokens[role].shape
    return GenerationComparison(role.value, against.value, prompts_compared, new_tokens, divergences)


@torch.no_grad()
def _next_logits(qs: QuantSpecModel, ids: Tensor, role: EvalRole) -> Tensor:
    """Logits ``(V,)`` of the token that follows 1-D ``ids``."""
    if role is EvalRole.REFERENCE:
        with qs.pair.rope_held:
            return qs.model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    (block,) = forced_text(qs, ids, len(ids) - 1, role.graph)
    return block.logits[0, -1].float()

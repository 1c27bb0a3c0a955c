"""A long text read through the quantized cache, token by token against the original model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantspec import QuantSpecModel

from .roles import EvalRole
from .scoring import forced_text


@dataclass(frozen=True)
class TextComparison:
    """Next-token distributions of one role on a text beside the reference's; everything per scored token in order.

    Attributes:
        role: whose distributions they are.
        context_tokens: tokens that were prefilled before the scored ones.
        losses, reference_losses: negative log-probabilities of the text's own tokens, in nats; one fewer than the rest.
        agrees: whether both have the same argmax.
        divergences: KL(reference || role), in nats.
        distances: tokens of the recent buffer that lay between the scored token and the planes; None while the planes
            were empty.
    """

    role: str
    context_tokens: int
    losses: list[float]
    reference_losses: list[float]
    agrees: list[bool]
    divergences: list[float]
    distances: list[int | None]

    @property
    def perplexity(self) -> float:
        """Of the role."""
        return _perplexity(self.losses)

    @property
    def reference_perplexity(self) -> float:
        """Of the original model on the same tokens."""
        return _perplexity(self.reference_losses)

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference's."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def argmax_agreement(self) -> float:
        """Fraction of the scored tokens."""
        return sum(self.agrees) / len(self.agrees)

    @property
    def mean_kl(self) -> float:
        """Mean of ``divergences``."""
        return sum(self.divergences) / len(self.divergences)

    def by_distance(self, width: int) -> list[dict[str, Any]]:
        """Mean divergence and agreement in classes of ``width`` distances; ``distance`` is a class's first, or None."""
        classes: dict[int | None, list[int]] = {}
        for index, distance in enumerate(self.distances):
            classes.setdefault(None if distance is None else distance // width * width, []).append(index)
        return [
            {
                "distance": start,
                "tokens": len(indices),
                "mean_kl": sum(self.divergences[index] for index in indices) / len(indices),
                "argmax_agreement": sum(self.agrees[index] for index in indices) / len(indices),
            }
            for start, indices in sorted(classes.items(), key=lambda item: -1 if item[0] is None else item[0])
        ]

    def as_dict(self, width: int) -> dict[str, Any]:
        """Figures and curves, JSON-ready."""
        names = ("perplexity", "reference_perplexity", "perplexity_change", "argmax_agreement", "mean_kl")
        return {
            "role": self.role,
            "context_tokens": self.context_tokens,
            "scored_tokens": len(self.agrees),
            **{name: getattr(self, name) for name in names},
            "kl_by_distance": self.by_distance(width),
            "kl_per_position": [float(f"{value:.3g}") for value in self.divergences],
        }


@torch.no_grad()
def compare_text(qs: QuantSpecModel, ids: Tensor, context_len: int, roles: Sequence[EvalRole]) -> list[TextComparison]:
    """Feed the tokens of 1-D ``ids`` from ``context_len`` on to the original model and to each role.

    Raises:
        CacheFullError: the text is longer than ``max_cache_len``.
    """
    scored = len(ids) - context_len
    with qs.pair.rope_held:
        expected = qs.model(ids[None], use_cache=False, logits_to_keep=scored).logits[0]
    return [_compare(qs, ids, context_len, expected, role) for role in roles]


def _compare(qs: QuantSpecModel, ids: Tensor, context_len: int, expected: Tensor, role: EvalRole) -> TextComparison:
    labels = ids[context_len + 1 :]
    result = TextComparison(role.value, context_len, [], [], [], [], [])
    for block in forced_text(qs, ids, context_len, role.graph):
        ours = block.logits[0].float()
        rows = slice(block.first, block.first + len(ours))
        theirs = expected[rows].float()
        wanted = labels[rows]
        result.losses.extend(F.cross_entropy(ours[: len(wanted)], wanted, reduction="none").tolist())
        result.reference_losses.extend(F.cross_entropy(theirs[: len(wanted)], wanted, reduction="none").tolist())
        result.agrees.extend((ours.argmax(-1) == theirs.argmax(-1)).tolist())
        result.divergences.extend(_divergence(theirs, ours).tolist())
        quantized = int(block.quantized_len)
        places = range(context_len + rows.start, context_len + rows.stop)
        result.distances.extend(place - quantized if quantized else None for place in places)
    return result


def _divergence(reference: Tensor, ours: Tensor) -> Tensor:
    """KL(reference || ours) of each row of logits."""
    expected = reference.log_softmax(-1)
    return F.kl_div(ours.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1)


def _perplexity(losses: list[float]) -> float:
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()

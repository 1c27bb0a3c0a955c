"""How a cycle chooses drafted tokens and which of them stand: greedily, or by speculative sampling.

A cycle takes an :class:`Acceptance`; nothing in it waits for the host, so a cycle can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .sampling import accept_greedy, accept_sampled, sample

Process = Callable[[Tensor, int], Tensor]
"""``process(logits (B, T, V), num_ahead)`` gives float32 scores of the tokens after the first ``num_ahead`` drafts."""


class Rules(NamedTuple):
    """Which drafts stand: ``greedy`` is :func:`quantspec.engine.sampling.accept_greedy`'s rule or another of the same
    arguments, ``sampled`` that of :func:`quantspec.engine.sampling.accept_sampled`.
    """

    greedy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = accept_greedy
    sampled: Callable[[Tensor, Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]] = accept_sampled


RULES = Rules()
"""Those that leave the target's distribution as it is."""


class Verdict(NamedTuple):
    """Which of T drafted tokens stand in each of B sequences.

    ``accepted (B,)`` drafted tokens stand and are followed by ``next_tokens (B,)``; ``has_nan (B,)`` tells that the
    next token could not be chosen, for NaN; ``scores (B, T + 1, V)`` are the target's after the logits processors.
    """

    accepted: Tensor
    next_tokens: Tensor
    has_nan: Tensor
    scores: Tensor


class Acceptance(Protocol):
    """Chooses drafts, and judges them by the target's logits."""

    def draft(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The drafted token ``(B,)`` of the draft's logits ``(B, 1, V)``, and the distribution ``(B, V)`` it is from.

        ``step`` counts the tokens drafted before it in the cycle. A token that was not drawn has no distribution.
        """

    def judge(self, drafts: Tensor, proposed: Sequence[Tensor], logits: Tensor) -> Verdict:
        """Judge ``drafts (B, T)``, drawn from ``proposed``, T times ``(B, V)``, by logits ``(B, T + 1, V)``."""


class GreedyAcceptance:
    """A draft stands while it is the target's arg-max."""

    def __init__(self, process: Process, compiles: bool, rules: Rules = RULES) -> None:
        """``compiles``: fuse what reads the whole vocabulary into a few kernels instead of many."""
        self._process = process
        compiled: Callable[..., Any] = torch.compile if compiles else lambda function: function
        self._argmax, self._has_nan, self._accept = compiled(_argmax), compiled(_has_nan), compiled(rules.greedy)

    def draft(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The arg-max."""
        return self._argmax(self._process(logits, step)[:, 0]), None

    def judge(self, drafts: Tensor, proposed: Sequence[Tensor], logits: Tensor) -> Verdict:
        """Compare with the target's arg-max."""
        scores = self._process(logits, 0)
        accepted, next_tokens = self._accept(drafts, scores)
        return Verdict(accepted, next_tokens, self._has_nan(logits), scores)


class SampledAcceptance:
    """A draft x stands with probability min(1, p(x)/q(x)), see :mod:`quantspec.engine.sampling`."""

    def __init__(self, process: Process, generator: torch.Generator | None, rules: Rules = RULES) -> None:
        """``generator``: source of randomness, or None for the global one."""
        self._process = process
        self._accept = rules.sampled
        self._generator = generator

    def draft(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Draw from the draft's distribution."""
        probs = self._process(logits, step)[:, 0].softmax(-1)
        return sample(probs, self._generator), probs

    def judge(self, drafts: Tensor, proposed: Sequence[Tensor], logits: Tensor) -> Verdict:
        """Draw which drafts stand, and what follows them."""
        scores = self._process(logits, 0)
        probs = scores.softmax(-1)
        draft_probs = torch.stack(tuple(proposed), 1) if proposed else probs[:, :0]
        accepted, next_tokens = self._accept(drafts, draft_probs, probs, self._generator)
        # Nothing is accepted where a softmax is NaN, which it is in all places or none.
        has_nan = probs[..., 0].gather(1, accepted[:, None])[:, 0].isnan()
        return Verdict(accepted, next_tokens, has_nan, scores)


def _argmax(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _has_nan(logits: Tensor) -> Tensor:
    """Whether any of ``(B, T, V)`` logits is NaN, ``(B,)``."""
    return logits.isnan().flatten(1).any(-1)

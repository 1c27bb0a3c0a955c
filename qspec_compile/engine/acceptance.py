"""How a cycle chooses drafted tokens and which of them stand.

Nothing in it waits for the host, so a cycle can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantspec.pair import Pair

from .fused import fused
from .sampling import Randomness, accept, perturb, perturbation, reject

Process = Callable[[Tensor, int], Tensor]
"""``process(logits (B, T, V), num_ahead)`` gives float32 scores of the tokens after the first ``num_ahead`` drafts."""

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Which drafts stand: :func:`quantspec.engine.sampling.accept`, or another function of the same arguments."""


class Verdict(NamedTuple):
    """Which of T drafted tokens stand in each of B sequences.

    ``accepted (B,)`` drafted tokens stand and are followed by ``next_tokens (B,)``; ``fails (B,)`` tells that one of
    them could not be chosen, for NaN or because nothing can be sampled; ``scores (B, T + 1, V)`` are the target's after
    the logits processors.
    """

    accepted: Tensor
    next_tokens: Tensor
    fails: Tensor
    scores: Tensor


class Acceptance:
    """Chooses drafts, and judges them by the target's logits: a draft stands while it is the target's own choice.

    Attributes:
        follows_drafts: whether tokens depend on what was drafted, so that the end of a batch must draft as its middle.
    """

    follows_drafts = False

    def __init__(
        self, process: Process, compiles: bool, randomness: Randomness | None = None, rule: Rule = accept
    ) -> None:
        """``compiles``: fuse what reads the whole vocabulary; ``randomness``: None where no row is sampled."""
        self.randomness = randomness
        self._process = process
        self._rule = rule
        self._choose, self._judge, self._perturbation = (
            fused(function, compiles) for function in (_choose, _judge, perturbation)
        )

    def forget(self) -> None:
        """What was drafted is judged, or given up."""

    def draft(self, logits: Tensor, step: int) -> Tensor:
        """The token ``(B,)`` that the draft's logits ``(B, 1, V)`` choose behind ``step`` drafts of the cycle."""
        return self._choose(self._process(logits, step), *self._noise(step, 1))

    def judge(self, drafts: Tensor, logits: Tensor) -> Verdict:
        """Judge ``drafts (B, T)`` by the target's logits ``(B, T + 1, V)``."""
        scores = self._process(logits, 0)
        noise = self._noise(0, logits.shape[1])
        accepted, next_tokens, fails = self._judge(self._rule, drafts, logits, scores, *noise)
        return Verdict(accepted, next_tokens, fails, scores)

    def noise(self, logits: Tensor) -> Tensor | None:
        """What is added to scores of the target's logits ``(B, T + 1, V)`` before the choice; None without sampling."""
        return None if self.randomness is None else self._perturbation(logits, *self._noise(0, logits.shape[1]))

    def choices(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The target's choice ``(B, T + 1)`` behind each draft, by its logits and their :meth:`noise`."""
        scores = self._process(logits, 0)
        return (scores if noise is None else scores + noise).argmax(-1)

    def _noise(self, num_ahead: int, count: int) -> tuple[Tensor, ...]:
        return () if self.randomness is None else self.randomness.at(num_ahead, count)


class RejectionSampling(Acceptance):
    """A draft of a sampled row stands by its odds, see :func:`quantspec.engine.sampling.reject`.

    Drafts that the texts propose are certain, which makes both rules one.
    """

    follows_drafts = True

    def __init__(self, process: Process, compiles: bool, randomness: Randomness) -> None:
        super().__init__(process, compiles, randomness)
        self._reject = fused(_reject, compiles)
        self._proposed: list[Tensor] = []

    def forget(self) -> None:
        self._proposed = []

    def draft(self, logits: Tensor, step: int) -> Tensor:
        scores = self._process(logits, step)
        self._proposed.append(scores)
        return self._choose(scores, *self._noise(step, 1))

    def judge(self, drafts: Tensor, logits: Tensor) -> Verdict:
        # They stay here: the next replay of a cycle that is judged outside of it writes them again.
        if not self._proposed:
            return super().judge(drafts, logits)
        scores = self._process(logits, 0)
        noise = self._noise(0, logits.shape[1])
        accepted, next_tokens, fails = self._reject(drafts, torch.cat(self._proposed, 1), logits, scores, *noise)
        return Verdict(accepted, next_tokens, fails, scores)


def acceptance_of(process: Process, pair: Pair, randomness: Randomness | None, rule: Rule, judges: bool) -> Acceptance:
    """As the pair's options want it; ``judges``: whether the device judges what it drafts, row by row."""
    if judges and randomness is not None and rule is accept and pair.config.rejection_sampling:
        return RejectionSampling(process, pair.captures_cycles, randomness)
    return Acceptance(process, pair.captures_cycles, randomness, rule)


def _choose(scores: Tensor, *noise: Tensor) -> Tensor:
    return (perturb(scores, *noise) if noise else scores)[:, 0].argmax(-1)


def _judge(rule: Rule, drafts: Tensor, logits: Tensor, scores: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    perturbed = perturb(scores, *noise) if noise else scores
    accepted, next_tokens = rule(drafts, perturbed)
    return accepted, next_tokens, _fails(accepted, logits, perturbed, *noise)


def _reject(
    drafts: Tensor, proposed: Tensor, logits: Tensor, scores: Tensor, *noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    accepted, next_tokens = reject(drafts, proposed, scores, *noise)
    return accepted, next_tokens, _fails(accepted, logits, scores, *noise)


def _fails(accepted: Tensor, logits: Tensor, scores: Tensor, *noise: Tensor) -> Tensor:
    """Whether a token up to the one behind the accepted ones could not be chosen, ``(B,)``."""
    fails = logits.isnan().any(-1)
    if noise:
        _, sampled, _ = noise
        fails = fails | (sampled[:, None] & ~scores.amax(-1).isfinite())
    reached = torch.arange(logits.shape[1], device=logits.device) <= accepted[:, None]
    return (fails & reached).any(-1)

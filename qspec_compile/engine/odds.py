"""How likely drafts are accepted, by where they come from, as a running average over the newest text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .plan import Plan, Source

# Newest trials that count, of a source's first tokens and of later ones.
_MOST_TRIALS = 64
# Trials that stand for what is expected before any, and the rate of most of them.
_PRIOR_TRIALS = 4.0
_PRIOR = 0.8
# Longer matches than this are as good as each other.
_LONG_MATCH = 4


def cycle_tokens(rate: float, num_drafts: int) -> float:
    """Expected tokens of a cycle, 1 + a + ... + a^n (Leviathan et al. 2023, eq. 1).

    Args:
        rate: probability a that a draft token is accepted, given that those before it were.
        num_drafts: tokens drafted (n).
    """
    return sum(rate**drafts for drafts in range(num_drafts + 1))


class Chance:
    """The probability of an event, estimated from the newest trials."""

    def __init__(self, prior: float = _PRIOR) -> None:
        """``prior``: the estimate before any."""
        self._successes, self._trials = prior * _PRIOR_TRIALS, _PRIOR_TRIALS

    @property
    def rate(self) -> float:
        """The estimate."""
        return self._successes / self._trials

    def record(self, successes: int, failures: int) -> None:
        """Count trials; older ones count for less."""
        trials = self._trials + successes + failures
        kept = min(1.0, _MOST_TRIALS / trials)
        self._successes, self._trials = kept * (self._successes + successes), kept * trials


class Odds:
    """What cycles yield, by their plan and by what a lookup found."""

    def __init__(self) -> None:
        self._chances: dict[Hashable, Chance] = {}

    def tokens(self, plan: Plan, matched: Sequence[int]) -> float:
        """Expected tokens of a cycle, over all running sequences.

        Args:
            plan: of the cycle.
            matched: of each running sequence, tokens of its end that a lookup found earlier in its text.
        """
        if plan.source is Source.SELF:
            return len(matched) * cycle_tokens(self._of(Source.SELF).rate, plan.num_drafts)
        # The first token says whether the place was the right one.
        return sum(
            1 + bool(count) * self._first(count).rate * cycle_tokens(self._later(count).rate, plan.num_drafts - 1)
            for count in matched
        )

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from a cycle: ``accepted`` drafts of each running sequence."""
        if not plan.num_drafts:
            return
        for found, count in zip(matched, accepted, strict=True):
            rejected = count < plan.num_drafts
            if plan.source is Source.SELF:
                # Each token up to the first rejected one is one trial.
                self._of(Source.SELF).record(count, rejected)
            elif found:
                self._first(found).record(count > 0, count == 0)
                if count:
                    self._later(found).record(count - 1, rejected)

    def _first(self, matched: int) -> Chance:
        matched = min(matched, _LONG_MATCH)
        return self._of((Source.LOOKUP, matched), _PRIOR * matched / _LONG_MATCH)

    def _later(self, matched: int) -> Chance:
        return self._of((Source.LOOKUP, min(matched, _LONG_MATCH), "later"))

    def _of(self, key: Hashable, prior: float = _PRIOR) -> Chance:
        return self._chances.setdefault(key, Chance(prior))

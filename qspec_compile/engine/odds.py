"""How likely drafts are accepted, by where they come from, as a running average over the newest text."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from .plan import Plan, Source

# Newest trials that count, and those that tell of a change.
_MANY, _FEW = 96.0, 24.0
# Standard deviations of the few by which they must differ.
_CHANGE = 3.0
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
    """The probability of an event, estimated from the newest trials.

    Many make it exact, and few tell soon of a change: where the two disagree, the many are forgotten.
    """

    def __init__(self, prior: float = _PRIOR) -> None:
        """``prior``: the estimate before any trial."""
        self.rate = self._newest = prior
        self._trials = self._newest_trials = _PRIOR_TRIALS

    def record(self, successes: int, failures: int) -> None:
        """Count trials, successes first."""
        for success in [1.0] * successes + [0.0] * failures:
            self._trials = min(self._trials + 1, _MANY)
            self._newest_trials = min(self._newest_trials + 1, _FEW)
            self.rate += (success - self.rate) / self._trials
            self._newest += (success - self._newest) / self._newest_trials
        if abs(self._newest - self.rate) > _CHANGE * math.sqrt(self.rate * (1 - self.rate) / (2 * _FEW)):
            self.rate, self._trials = self._newest, self._newest_trials


_LATER = (Source.LOOKUP, "later")


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
        later = cycle_tokens(self._of(_LATER).rate, plan.num_drafts - 1)
        return sum(1 + bool(count) * self._first(count).rate * later for count in matched)

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
                    self._of(_LATER).record(count - 1, rejected)

    def _first(self, matched: int) -> Chance:
        matched = min(matched, _LONG_MATCH)
        return self._of((Source.LOOKUP, matched), _PRIOR * matched / _LONG_MATCH)

    def _of(self, key: Hashable, prior: float = _PRIOR) -> Chance:
        return self._chances.setdefault(key, Chance(prior))

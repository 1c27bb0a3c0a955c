"""How likely drafts are accepted, by where they come from, as a running average over the newest text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    return (1 - rate ** (num_drafts + 1)) / (1 - rate) if rate < 1 else float(num_drafts + 1)


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


class Outlook(NamedTuple):
    """What the next cycle is expected to yield.

    Attributes:
        rows: running sequences.
        own: rate of the draft's own tokens.
        first: first tokens of lookups that are expected to be accepted, over the rows.
        later: rate of a lookup's later tokens.
    """

    rows: int
    own: float
    first: float
    later: float

    def tokens(self, plan: Plan) -> float:
        """Of a cycle of this plan, over all rows."""
        if plan.source is Source.SELF:
            return self.rows * cycle_tokens(self.own, plan.num_drafts)
        # The first token says whether the place was the right one.
        return self.rows + self.first * cycle_tokens(self.later, plan.num_drafts - 1)


class Odds:
    """How often drafts were accepted: the draft's own, and lookups' by the length of the match."""

    def __init__(self) -> None:
        self._own, self._later = Chance(), Chance()
        self._first = [Chance(_PRIOR * matched / _LONG_MATCH) for matched in range(_LONG_MATCH + 1)]

    def of(self, matched: Sequence[int]) -> Outlook:
        """The next cycle's, of sequences whose ends a lookup found so many tokens of earlier in their texts."""
        first = sum(self._first[min(count, _LONG_MATCH)].rate for count in matched if count)
        return Outlook(len(matched), self._own.rate, first, self._later.rate)

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from a cycle: ``accepted`` drafts of each running sequence."""
        if not plan.num_drafts:
            return
        for found, count in zip(matched, accepted, strict=True):
            # Each token up to the first rejected one is one trial.
            rejected = count < plan.num_drafts
            if plan.source is Source.SELF:
                self._own.record(count, rejected)
            elif found:
                self._first[min(found, _LONG_MATCH)].record(count > 0, count == 0)
                if count:
                    self._later.record(count - 1, rejected)

"""How likely drafts are accepted, by where they come from, as a running average over the newest text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .plan import Plan, Source

# What counts of a trial after each token of the text since.
_FADE = 0.98
# Trials that count at the most: a batch makes many at once, and the text goes on.
_MOST_TRIALS = 64.0
# Trials of the prior. What has not been seen for a while is believed to have become good, and so is tried again.
_PRIOR_TRIALS = 2.0
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

    def __init__(self) -> None:
        self._successes = self._trials = 0.0

    @property
    def rate(self) -> float:
        """The estimate."""
        return (self._successes + _PRIOR_TRIALS * _PRIOR) / (self._trials + _PRIOR_TRIALS)

    def record(self, successes: int, failures: int) -> None:
        """Count trials."""
        self._successes += successes
        self._trials += successes + failures
        self.fade(min(1.0, _MOST_TRIALS / max(self._trials, 1.0)))

    def fade(self, factor: float) -> None:
        """Let what was counted count less."""
        self._successes *= factor
        self._trials *= factor


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
        if not accepted:
            return
        for chance in self._chances.values():
            chance.fade(_FADE ** (1 + sum(accepted) / len(accepted)))
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
        return self._of((Source.LOOKUP, min(matched, _LONG_MATCH)))

    def _later(self, matched: int) -> Chance:
        return self._of((Source.LOOKUP, min(matched, _LONG_MATCH), "later"))

    def _of(self, key: Hashable) -> Chance:
        return self._chances.setdefault(key, Chance())

"""How likely drafts are accepted, by where they come from, as a running average over the newest text."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .plan import Plan, Source

# Newest trials that count, and those that tell of a change.
_MANY, _FEW = 200.0, 24.0
# Standard deviations of the few by which they must differ.
_CHANGE = 3.5
# Trials that stand for what is expected before any, and their rates: of the draft's own tokens, of a lookup's first by
# the length of the match (longer ones are as good as each other), and of its later ones.
_PRIOR_TRIALS = 4.0
_OWN = 0.9
_FIRST = (0.0, 0.1, 0.3, 0.5, 0.7)
_LATER = 0.8
# Trials of a row that count as much as those of all rows.
_LIKE_OTHERS = 8.0
# Rates that are told apart.
_STEPS = 400


def cycle_tokens(rate: float, num_drafts: int) -> float:
    """Expected tokens of a cycle, 1 + a + ... + a^n (Leviathan et al. 2023, eq. 1).

    Args:
        rate: probability a that a draft token is accepted, given that those before it were.
        num_drafts: tokens drafted (n).
    """
    return (1 - rate ** (num_drafts + 1)) / (1 - rate) if rate < 1 else float(num_drafts + 1)


@functools.cache
def _yields(num_drafts: int) -> list[float]:
    """:func:`cycle_tokens` of evenly spaced rates, since the host computes many in every cycle."""
    return [cycle_tokens(step / _STEPS, num_drafts) for step in range(_STEPS + 1)]


class Chance:
    """The probability of an event, estimated from the newest trials.

    Many make it exact, and few tell soon of a change: where the two disagree, the many are forgotten.
    """

    def __init__(self, prior: float, trials: float) -> None:
        """``prior``: the estimate before any trial, which counts as so many ``trials``."""
        self.rate = self._newest = prior
        self._trials = self._newest_trials = trials

    def among(self, everyone: Chance) -> float:
        """The rate of one row, which is like ``everyone``'s until it shows otherwise."""
        return (self.rate * self._trials + everyone.rate * _LIKE_OTHERS) / (self._trials + _LIKE_OTHERS)

    def record(self, successes: int, failures: int) -> None:
        """Count trials."""
        count = successes + failures
        if not count:
            return
        self._trials = min(self._trials + count, _MANY)
        self._newest_trials = min(self._newest_trials + count, _FEW)
        self.rate += (successes - count * self.rate) / self._trials
        self._newest += (successes - count * self._newest) / self._newest_trials
        if abs(self._newest - self.rate) > _CHANGE * math.sqrt(self.rate * (1 - self.rate) / (2 * _FEW)):
            self.rate, self._trials = self._newest, self._newest_trials


class _Rates:
    """Of one row: the draft's own tokens', a lookup's first ones' by the length of the match, and its later ones'."""

    def __init__(self, trials: float = 0.0) -> None:
        """``trials``: that what is expected before any counts as."""
        self.own, self.later = Chance(_OWN, trials), Chance(_LATER, trials)
        self.first = [Chance(rate, trials) for rate in _FIRST]

    def record(self, plan: Plan, found: int, accepted: int) -> None:
        """Each token up to the first rejected one is one trial."""
        rejected = accepted < plan.num_drafts
        if plan.source is Source.SELF:
            self.own.record(accepted, rejected)
        elif found:
            self.first[min(found, len(_FIRST) - 1)].record(accepted > 0, accepted == 0)
            if accepted:
                self.later.record(accepted - 1, rejected)


class Outlook(NamedTuple):
    """What the next cycle is expected to yield.

    Attributes:
        own: rate of the draft's own tokens in each running row.
        lookups: of each row in which a lookup found something, the rate of its first token and of later ones.
    """

    own: list[float]
    lookups: list[tuple[float, float]]

    def tokens(self, plan: Plan) -> float:
        """Of a cycle of this plan, over all rows."""
        if plan.source is Source.SELF:
            yields = _yields(plan.num_drafts)
            return sum(yields[int(rate * _STEPS)] for rate in self.own)
        # The first token says whether the place was the right one.
        yields = _yields(plan.num_drafts - 1)
        return len(self.own) + sum(first * yields[int(later * _STEPS)] for first, later in self.lookups)


class Odds:
    """How often drafts were accepted, in each row and in all."""

    def __init__(self) -> None:
        self._all = _Rates(_PRIOR_TRIALS)
        self._rows: defaultdict[int, _Rates] = defaultdict(_Rates)

    def begin(self) -> None:
        """Other texts are in the rows from now on."""
        self._rows.clear()

    def forget(self, row: int) -> None:
        """Another text is in a row from now on."""
        self._rows.pop(row, None)

    def of(self, matched: Sequence[int | None]) -> Outlook:
        """The next cycle's; a lookup found so many tokens of each row's end earlier in its text, None of rows done."""
        own, lookups = [], []
        for row, found in enumerate(matched):
            if found is None:
                continue
            rates, length = self._rows[row], min(found, len(_FIRST) - 1)
            own.append(rates.own.among(self._all.own))
            if found:
                first = rates.first[length].among(self._all.first[length])
                lookups.append((first, rates.later.among(self._all.later)))
        return Outlook(own, lookups)

    def record(self, plan: Plan, matched: Sequence[int | None], accepted: Sequence[int]) -> None:
        """Learn from a cycle: ``accepted`` drafts of each running row."""
        if not plan.num_drafts:
            return
        running = [(row, found) for row, found in enumerate(matched) if found is not None]
        for (row, found), count in zip(running, accepted, strict=True):
            for rates in (self._rows[row], self._all):
                rates.record(plan, found, count)

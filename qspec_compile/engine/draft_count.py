"""What to draft in the next cycle: a fixed number of tokens, or what measured times and acceptance make fastest.

The text does not depend on it, only how soon it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Protocol

from quantspec.config import Draft

from .odds import Odds
from .plan import PLAIN, Plan, Source

# Each plan has a CUDA graph of its own, so there are few.
SELF_COUNTS = (1, 2, 4, 6, 8, 12)
LOOKUP_COUNTS = (3, 7, 15)
# Timed before anything is chosen; the times of other plans are extrapolated until they are known.
STARTS = (Plan(4), PLAIN)
# Where drafts of its own seldom pay: plain decoding, until others look better.
PLAIN_START = (PLAIN,)
# With three times, one that something else delayed is not the median.
_STARTING_TIMES = 3
# Newest durations of a plan whose median counts: delays are forgotten, and growing contexts followed.
_TIMES_KEPT = 5
# Cycles after which the time of plain decoding, or of the second best plan, is taken again.
_PROBE_EVERY = 100
# Tokens per second by which a plan that was never run must look better: it may have to be captured.
_WORTH_TRYING = 1.03


class DraftCount(Protocol):
    """Decides what each cycle drafts.

    Attributes:
        most: tokens that a cycle drafts at the most.
        looks_up: whether drafts may come from the rows' own texts.
    """

    most: int
    looks_up: bool

    def choose(self, matched: Sequence[int]) -> Plan:
        """The plan of the next cycle; ``matched`` as in :meth:`Odds.tokens`."""

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Learn from a cycle: drafts accepted by each running sequence, and its duration if that is like others'."""


class FixedDraftCount:
    """Always the same number, from the text where a lookup finds more than the draft itself is expected to yield."""

    def __init__(self, num_speculative_tokens: int, draft: Draft = Draft.SELF) -> None:
        self.most = num_speculative_tokens
        self.looks_up = draft is not Draft.SELF and num_speculative_tokens > 0
        self._otherwise = PLAIN if draft is Draft.LOOKUP else Plan(num_speculative_tokens)
        self._odds = Odds()

    def choose(self, matched: Sequence[int]) -> Plan:
        """The number given, or no draft where there is nothing to look up and no other."""
        lookup = Plan(self.most, Source.LOOKUP)
        if not self.looks_up or not any(matched):
            return self._otherwise
        # Reading the text takes less than drafting, and no more than verifying one token does.
        better = self._odds.tokens(lookup, matched) >= self._odds.tokens(self._otherwise, matched)
        return lookup if better else self._otherwise

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Acceptance is learnt."""
        self._odds.record(plan, matched, accepted)


class AutoDraftCount:
    """The plan that is fastest by what was seen so far.

    It follows measured times, so two runs may draft differently, also with equal seeds, whose texts are equal still.
    """

    def __init__(self, starts: tuple[Plan, ...] = STARTS, draft: Draft = Draft.SELF) -> None:
        """``starts`` are timed first; :data:`STARTS` or :data:`PLAIN_START`."""
        self.looks_up = draft is not Draft.SELF
        self._plans = [PLAIN]
        if draft is not Draft.LOOKUP:
            self._plans += map(Plan, SELF_COUNTS)
        if self.looks_up:
            self._plans += (Plan(count, Source.LOOKUP) for count in LOOKUP_COUNTS)
        self._starts = tuple(plan for plan in starts if plan in self._plans)
        self._odds = Odds()
        self._seconds: dict[Plan, deque[float]] = {}
        self._warm: set[Plan] = set()
        self._since_probe = 0
        self._num_probes = 0

    @property
    def most(self) -> int:
        """Tokens that a cycle drafts at the most."""
        return max(plan.num_drafts for plan in self._plans)

    def choose(self, matched: Sequence[int]) -> Plan:
        """The plans to start with until they have been timed, then the fastest; now and then another one."""
        for start in self._starts:
            if len(self._seconds.get(start, ())) < _STARTING_TIMES:
                return start
        ranking = self._ranking(matched)
        if self._since_probe < _PROBE_EVERY:
            return ranking[0]
        known = [plan for plan in ranking if plan in self._seconds]
        others = [plan for plan in dict.fromkeys((PLAIN, *known[:2])) if plan != ranking[0]]
        return others[self._num_probes % len(others)] if others else ranking[0]

    def tokens_per_second(self, plan: Plan, matched: Sequence[int]) -> float:
        """Expected yield of cycles of a plan, once those to start with have been timed."""
        return self._odds.tokens(plan, matched) / max(self.seconds(plan), 1e-9)

    def seconds(self, plan: Plan) -> float:
        """Duration of a cycle: measured, or else on the line through plain decoding and the plan that is most like it.

        As long as there is none such, drafts are taken to cost nothing.
        """
        if plan in self._seconds:
            return median_low(self._seconds[plan])
        alike = [known for known in self._seconds if known.source is plan.source and known.num_drafts]
        plain = median_low(self._seconds[PLAIN])
        if not alike:
            return plain
        nearest = min(alike, key=lambda known: abs(known.num_drafts - plan.num_drafts))
        more = max(0.0, median_low(self._seconds[nearest]) - plain)
        return plain + plan.num_drafts / nearest.num_drafts * more

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Update what is known; the first cycle of a plan, which may compile, is not timed."""
        if seconds is not None and plan in self._warm and plan in self._plans:
            self._seconds.setdefault(plan, deque(maxlen=_TIMES_KEPT)).append(seconds)
        self._warm.add(plan)
        probed = self._since_probe >= _PROBE_EVERY
        self._num_probes += probed
        self._since_probe = 0 if probed else self._since_probe + 1
        self._odds.record(plan, matched, accepted)

    def _ranking(self, matched: Sequence[int]) -> list[Plan]:
        """All plans, the one that promises most first."""
        def promise(plan: Plan) -> float:
            return self.tokens_per_second(plan, matched) / (1.0 if plan in self._seconds else _WORTH_TRYING)

        plans = [plan for plan in self._plans if plan.source is Source.SELF or any(matched)]
        return sorted(plans, key=promise, reverse=True)

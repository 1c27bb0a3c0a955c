"""What to draft in the next cycle: a fixed number of tokens, or what measured times and acceptance make fastest.

The text does not depend on it, only how soon it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from quantspec.config import Draft

from .odds import Odds
from .plan import PLAIN, Plan, Source

# Each plan has a CUDA graph of its own, so there are few.
SELF_COUNTS = (1, 2, 4, 6, 8, 12)
LOOKUP_COUNTS = (3, 7, 15)
# Newest durations of a plan that count, so that growing contexts are followed.
_TIMES_KEPT = 5
# Tokens per second by which a plan that was never run must look better: it may have to be captured.
_WORTH_TRYING = 1.02
# Of all time, what may be lost by trying other plans than the one that looks fastest.
_SHARE_OF_TRIALS = 0.008
# Of a cycle's duration, what may be saved for trials.
_MOST_SPARE = 2.0
# Cycles after which the duration of plain decoding may have changed.
_PLAIN_AGE = 100
# Cycles whose tokens per second a cycle's time is valued by.
_NEWEST = 24


class Costs(NamedTuple):
    """What parts of a cycle take, before anything is measured, in units of decoding one token.

    Attributes:
        step: a step of the draft.
        verified: each token that is verified besides the first.
    """

    step: float
    verified: float

    def of(self, plan: Plan) -> float:
        """Of a cycle."""
        return 1 + plan.num_drafts * (self.verified + (self.step if plan.source is Source.SELF else 0.0))


ON_GPU = Costs(step=0.35, verified=0.01)
# A CPU computes what a GPU reads, and the planes at 4 bits take longer to read than the decoded copy.
ON_CPU = Costs(step=1.2, verified=0.2)


class DraftCount(Protocol):
    """Decides what each cycle drafts.

    Attributes:
        most: tokens that a cycle drafts at the most.
        looks_up: whether drafts may come from the rows' own texts.
    """

    most: int
    looks_up: bool

    def choose(self, matched: Sequence[int]) -> Plan:
        """The plan of the next cycle; ``matched`` as in :meth:`Odds.of`."""

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Learn from a cycle: drafts accepted by each running sequence, and its duration if that is like others'."""


class FixedDraftCount:
    """Always the same number of drafts, read from the text where that is expected to be faster.

    Nothing is measured, so what is drafted depends on the texts alone.
    """

    def __init__(self, num_speculative_tokens: int, draft: Draft = Draft.SELF, costs: Costs = ON_GPU) -> None:
        """``costs``: what to expect of a cycle's duration."""
        self.most = num_speculative_tokens
        self.looks_up = draft is not Draft.SELF and num_speculative_tokens > 0
        self._own = None if draft is Draft.LOOKUP else Plan(num_speculative_tokens)
        self._costs = costs
        self._odds = Odds()

    def choose(self, matched: Sequence[int]) -> Plan:
        """The number given, or no draft where there is nothing to look up and no other source."""
        lookup = Plan(self.most, Source.LOOKUP)
        if not self.looks_up or not any(matched):
            return self._own or PLAIN
        if self._own is None:
            return lookup
        outlook = self._odds.of(matched)
        return max(lookup, self._own, key=lambda plan: outlook.tokens(plan) / self._costs.of(plan))

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Acceptance is learnt."""
        self._odds.record(plan, matched, accepted)


class AutoDraftCount:
    """The plan that is fastest by what was seen so far; others are tried for a small share of the time.

    It follows measured times, so two runs may draft differently, also with equal seeds, whose texts are equal still.
    """

    def __init__(self, costs: Costs = ON_GPU, draft: Draft = Draft.SELF) -> None:
        """``costs``: what to expect of plans that have not been timed."""
        self.looks_up = draft is not Draft.SELF
        sources = {Draft.SELF: (Source.SELF,), Draft.LOOKUP: (Source.LOOKUP,), Draft.BOTH: (*Source,)}[draft]
        counts = {Source.SELF: SELF_COUNTS, Source.LOOKUP: LOOKUP_COUNTS}
        self._plans = [PLAIN, *(Plan(count, source) for source in sources for count in counts[source])]
        # What tells most cheaply whether drafts of a source are accepted.
        self._trials = [Plan(2 if source is Source.SELF else 3, source) for source in sources]
        self.most = max(plan.num_drafts for plan in self._plans)
        self._costs = costs
        self._odds = Odds()
        self._times: dict[Plan, deque[float]] = {}
        self._seconds = {plan: costs.of(plan) for plan in self._plans}
        self._warm: set[Plan] = set()
        self._cycle = 0
        self._last: dict[Plan, int] = {}
        # Seconds that trials may lose, and the one under way with the speed that it is measured against.
        self._spare = 0.0
        self._trial: tuple[Plan, float] | None = None
        self._gained: Plan | None = None
        self._newest: deque[tuple[Plan, int]] = deque(maxlen=_NEWEST)

    def choose(self, matched: Sequence[int]) -> Plan:
        """The fastest plan, or another one as long as the time lost by such trials is a small share."""
        outlook, finds = self._odds.of(matched), any(matched)
        tokens = {plan: outlook.tokens(plan) for plan in self._plans if finds or plan.source is Source.SELF}
        speed = self._speed() or max(tokens[plan] / self._seconds[plan] for plan in tokens)

        def gain(plan: Plan) -> float:
            known = plan in self._times or not self._times
            return tokens[plan] - speed * self._seconds[plan] * (1.0 if known else _WORTH_TRYING)

        best = max(tokens, key=gain)
        # Cycles that lose would not know it by their own speed.
        speed = max(speed, tokens[best] / self._seconds[best])
        self._trial = None
        trial = self._next_trial(best, finds)
        if trial is None or self._seconds[trial] - len(matched) / speed > self._spare:
            return best
        self._trial = (trial, speed)
        return trial

    def seconds(self, plan: Plan) -> float:
        """Expected duration of a cycle: the shortest of its newest ones, since others may have been delayed.

        A single one may be such; then it is no longer than what :meth:`_expected` says by others.
        """
        times: Sequence[float] = self._times.get(plan, ())
        if not self._times:
            return self._costs.of(plan)
        if len(times) > 1:
            return min(times)
        others = {other: min(own) for other, own in self._times.items() if other != plan}
        sure = {other: own for other, own in others.items() if len(self._times[other]) > 1}
        return min((*times, self._expected(plan, sure or others))) if others else times[0]

    def record(self, plan: Plan, matched: Sequence[int], accepted: Sequence[int], seconds: float | None) -> None:
        """Update what is known; the first cycle of a plan, which may compile, is not timed."""
        if seconds is not None and plan in self._warm and plan in self._seconds:
            self._add_time(plan, max(seconds, 1e-9))
        self._warm.add(plan)
        self._odds.record(plan, matched, accepted)
        if plan not in self._seconds:
            # At the end of a text less is drafted.
            plan = min(self._plans, key=lambda known: abs(known.num_drafts - plan.num_drafts))
        taken, tokens = self._seconds[plan], len(accepted) + sum(accepted)
        if self._trial is not None:
            tried, speed = self._trial
            lost = taken - tokens / speed
            self._spare -= lost
            self._gained = tried if lost < 0 else None
        self._spare = min(self._spare + _SHARE_OF_TRIALS * taken, _MOST_SPARE * taken)
        self._newest.append((plan, tokens))
        self._cycle += 1
        self._last[plan] = self._cycle

    def _speed(self) -> float:
        """Tokens per second of the newest cycles, by what is known of durations now."""
        time = sum(self._seconds[plan] for plan, _ in self._newest)
        return sum(tokens for _, tokens in self._newest) / time if time else 0.0

    def _add_time(self, plan: Plan, seconds: float) -> None:
        times = self._times.setdefault(plan, deque(maxlen=_TIMES_KEPT))
        times.append(seconds)
        # Most cycles take as long as those before them, and then nothing else is expected.
        if len(times) < 3 or min(times) != self._seconds[plan]:
            self._seconds = {known: self.seconds(known) for known in self._plans}

    def _expected(self, plan: Plan, known: Mapping[Plan, float]) -> float:
        """On the line through plain decoding and the plan that is most like it, or in proportion to what costs were."""
        alike = [other for other in known if other.source is plan.source and other.num_drafts]
        nearest = min(alike or known, key=lambda other: abs(other.num_drafts - plan.num_drafts))
        if not alike or PLAIN not in known or plan == PLAIN:
            return known[nearest] * self._costs.of(plan) / self._costs.of(nearest)
        more = max(0.0, known[nearest] - known[PLAIN])
        return known[PLAIN] + plan.num_drafts / nearest.num_drafts * more

    def _next_trial(self, best: Plan, any_matched: bool) -> Plan | None:
        """What was not run for longest, or what just gained."""
        candidates = [plan for plan in self._trials if plan.source is not best.source or not best.num_drafts]
        candidates = [plan for plan in candidates if plan.source is Source.SELF or any_matched]
        if best != PLAIN and self._cycle - self._last.get(PLAIN, 0) >= _PLAIN_AGE:
            candidates.append(PLAIN)
        if self._gained in candidates:
            return self._gained
        return min(candidates, key=lambda plan: self._last.get(plan, 0), default=None)

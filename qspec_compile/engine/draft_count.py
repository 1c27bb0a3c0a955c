"""What to draft in the next cycle: a fixed number of tokens, or what measured times and acceptance make fastest.

The text does not depend on it, only how soon it is there; but for sampled texts whose drafts stand by their odds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

from quantspec.config import Draft

from .durations import ON_GPU, Costs, Durations
from .known_times import KnownTimes
from .odds import Odds
from .plan import PLAIN, Plan, Source

# Each plan has CUDA graphs of its own, so there are few. Seven drafts and the token before them are eight rows, a tile
# of linears and, with four query heads to a KV head, one of attention; to verify nine took 17 to 65% longer (H200).
SELF_COUNTS = (1, 2, 4, 7, 9, 12)
LOOKUP_COUNTS = (3, 15)
# Cycles without drafts after which one is drafted, where drafts did not pay: it tells whether they do by now.
_TRY_AGAIN = 32
# Tokens per second by which a plan that was never run must look better: it may have to be captured.
_WORTH_TRYING = 1.02
# Of all time, what may be lost by trying other plans than the one that looks fastest.
_SHARE_OF_TRIALS = 0.008
# Of a cycle's duration, what may be saved for trials; one of two drafts is expected to lose 2.3 on a CPU.
_MOST_SPARE = 2.5
# Cycles after which the duration of plain decoding may have changed.
_PLAIN_AGE = 100
# Cycles whose tokens per second a cycle's time is valued by.
_NEWEST = 24
# Seconds to capture a pass of the model, before one was: 30 layers on an H100, compiled before, take 0.09.
_CAPTURE = 0.09
# Tokens that are expected of a text at least, if it may have so many.
_SHORT = 256
# Tokens before the end of a text from which on nothing is captured.
_LITTLE = 32
# Of all time, what capturing a plan may take that is not expected to be fastest.
_SHARE_OF_CAPTURES = 0.01


class DraftCount(Protocol):
    """Decides what each cycle drafts.

    Attributes:
        most: tokens that a cycle drafts at the most.
        looks_up: whether drafts may come from the rows' own texts.
    """

    most: int
    looks_up: bool

    def begin(self) -> None:
        """Other texts are decoded from now on."""

    def end(self) -> None:
        """They are done."""

    def choose(self, matched: Sequence[int | None], remaining: int, captured: Collection[Plan] | None) -> Plan:
        """The plan of the next cycle.

        Args:
            matched: as in :meth:`Odds.of`.
            remaining: most tokens that any sequence may still emit.
            captured: plans that run without being captured first; None where none is captured.
        """

    def record(
        self,
        plan: Plan,
        matched: Sequence[int | None],
        accepted: Sequence[int],
        seconds: float | None,
        capturing: float = 0.0,
    ) -> None:
        """Learn from a cycle.

        Args:
            plan: of the cycle.
            matched: as it was chosen by.
            accepted: drafts of each running sequence.
            seconds: its duration, if that is like others'.
            capturing: seconds that it took to capture it.
        """


class FixedDraftCount:
    """Always the same number of drafts, read from the text where that is expected to be faster.

    Rows in lockstep accept what all of them accept, which may be little; then one draft or none, where that is expected
    to be faster. Nothing is measured, so what is drafted depends on the texts alone.
    """

    def __init__(
        self,
        num_speculative_tokens: int,
        draft: Draft = Draft.SELF,
        costs: Costs = ON_GPU,
        in_lockstep: bool = False,
    ) -> None:
        """``costs``: what to expect of a cycle's duration; ``in_lockstep``: several rows advance as one."""
        self.most = num_speculative_tokens
        self.looks_up = draft is not Draft.SELF and num_speculative_tokens > 0
        own = () if draft is Draft.LOOKUP else (self.most,)
        # Each number is captured by itself, so there are few.
        fewer = (min(1, *own), 0) if own else (0,)
        counts = dict.fromkeys((*own, *fewer) if in_lockstep else own)
        self._own = [Plan(count) for count in counts]
        self._lookups = [Plan(self.most, Source.LOOKUP)] if self.looks_up else []
        # Whoever gives a number holds that a row by itself gains by it.
        self._costs = ON_GPU if in_lockstep else costs
        self._odds = Odds()
        self._undrafted = 0

    def begin(self) -> None:
        """Other texts are decoded from now on."""
        self._odds.begin()

    def end(self) -> None:
        """They are done."""

    def choose(self, matched: Sequence[int | None], remaining: int, captured: Collection[Plan] | None) -> Plan:
        """The number given; less in lockstep, and where there is nothing to look up and no other source."""
        plans = [*(self._lookups if any(matched) else ()), *self._own] or [PLAIN]
        if self._undrafted >= _TRY_AGAIN:
            plans = [plan for plan in plans if plan.num_drafts] or plans
        if len(plans) == 1:
            return plans[0]
        outlook = self._odds.of(matched)
        return max(plans, key=lambda plan: outlook.tokens(plan) / self._costs.of(plan))

    def record(
        self,
        plan: Plan,
        matched: Sequence[int | None],
        accepted: Sequence[int],
        seconds: float | None,
        capturing: float = 0.0,
    ) -> None:
        """Acceptance is learnt."""
        self._odds.record(plan, matched, accepted)
        self._undrafted = 0 if plan.num_drafts else self._undrafted + 1


class AutoDraftCount:
    """The plan that is fastest by what was seen so far; others are tried for a small share of the time.

    It follows measured times, so two runs may draft differently, also with equal seeds, whose texts are equal still
    unless drafts stand by their odds.
    """

    def __init__(
        self,
        costs: Costs = ON_GPU,
        draft: Draft = Draft.SELF,
        known_times: KnownTimes | None = None,
        self_counts: Sequence[int] = SELF_COUNTS,
        odds: Odds | None = None,
    ) -> None:
        """What it decides by.

        Args:
            costs: what to expect of plans that nobody has timed.
            draft: where drafts come from.
            known_times: of earlier processes.
            self_counts: numbers of the draft's own tokens to choose from, besides none.
            odds: what others learn of the same rows, too; None for odds of its own.
        """
        self.looks_up = draft is not Draft.SELF
        sources = {Draft.SELF: (Source.SELF,), Draft.LOOKUP: (Source.LOOKUP,), Draft.BOTH: (*Source,)}[draft]
        counts = {Source.SELF: self_counts, Source.LOOKUP: LOOKUP_COUNTS}
        self._plans = [PLAIN, *(Plan(count, source) for source in sources for count in counts[source])]
        # What tells most cheaply whether drafts of a source are accepted.
        self._trials = [Plan(2 if source is Source.SELF else 3, source) for source in sources]
        self.most = max(plan.num_drafts for plan in self._plans)
        self._known_times = known_times
        earlier = {} if known_times is None else known_times.seconds
        self.durations = Durations(self._plans, costs, {p: s for p, s in earlier.items() if p in self._plans})
        self._odds = Odds() if odds is None else odds
        self._warm: set[Plan] = set()
        self._cycle = 0
        self._last: dict[Plan, int] = {}
        # Seconds that trials may lose, first trials whose loss is allowed for, the first of which is not timed, and the
        # one under way with the speed that it is measured against.
        self._spare = 0.0
        self._credits = 2
        self._trial: tuple[Plan, float] | None = None
        self._gained: Plan | None = None
        self._plans_run: deque[Plan] = deque(maxlen=_NEWEST)
        self._tokens_run: deque[float] = deque(maxlen=_NEWEST)
        # Seconds that a pass took to capture, all cycles took, and plans would have saved if they had been captured.
        self._capture = _CAPTURE
        self._elapsed = 0.0
        self._missed: dict[Plan, float] = {}
        self._steps = 0

    def begin(self) -> None:
        """Other texts are decoded from now on."""
        self._odds.begin()
        self._steps = 0

    def end(self) -> None:
        """Let later processes know what was measured."""
        if self._known_times is not None:
            self._known_times.keep(self.durations.measured())

    def choose(self, matched: Sequence[int | None], remaining: int, captured: Collection[Plan] | None) -> Plan:
        """The fastest plan, or another one as long as the time lost by such trials is a small share.

        One that is not captured yet is taken once it would have saved what capturing it takes, or half of that where as
        much text follows as there was.
        """
        outlook, finds = self._odds.of(matched), any(matched)
        seconds, rows = self.durations.seconds, len(outlook.own)
        tokens = {plan: outlook.tokens(plan) for plan in self._plans if finds or plan.source is Source.SELF}
        speed = rows * self._speed() or max(tokens[plan] / seconds[plan] for plan in tokens)
        gains = {
            plan: count - speed * seconds[plan] * (1.0 if self.durations.knows(plan) else _WORTH_TRYING)
            for plan, count in tokens.items()
        }
        self._trial = None
        best = max(gains, key=gains.__getitem__)
        ready = gains if captured is None else [plan for plan in gains if plan in captured]
        if not ready and self.durations.in_seconds:
            # What is captured first must pay for it in this text.
            left = min(remaining, max(_SHORT, self._steps)) * rows
            return min(gains, key=lambda plan: self._capturing(plan) + left * seconds[plan] / tokens[plan])
        if ready and best not in ready:
            wish, best = best, max(ready, key=gains.__getitem__)
            if self._is_due(wish, (gains[wish] - gains[best]) / speed, remaining):
                return wish
        # Cycles that lose would not know it by their own speed.
        speed = max(speed, tokens[best] / seconds[best])
        # A text goes on for as long as it has, as far as anybody knows.
        time = self._elapsed + min(remaining, self._steps) * rows / speed
        affordable = [plan for plan in gains if plan in ready or self._capturing(plan) < _SHARE_OF_CAPTURES * time]
        trial = self._next_trial(best, affordable)
        if trial is None:
            return best
        is_guess = best == PLAIN and self.durations.knows(PLAIN) and not self.durations.knows(trial)
        if is_guess and captured is None and self._credits:
            # That no draft pays is not known before one was timed; where nothing is captured a trial costs two steps.
            self._credits, self._spare = self._credits - 1, max(self._spare, seconds[trial] - rows / speed)
        pays = seconds[trial] - rows / speed <= self._spare
        if not (pays or (trial == PLAIN and not self.durations.knows(PLAIN))):
            return best
        self._trial = (trial, speed)
        return trial

    def record(
        self,
        plan: Plan,
        matched: Sequence[int | None],
        accepted: Sequence[int],
        seconds: float | None,
        capturing: float = 0.0,
    ) -> None:
        """Update what is known; the first cycle of a plan, which may compile, is not timed."""
        known = plan in self._plans
        if seconds is not None and plan in self._warm and known:
            self.durations.add(plan, max(seconds, 1e-9))
        if capturing and self._warm:
            # The first one compiles what all share.
            self._capture = capturing / _passes(plan)
        self._warm.add(plan)
        self._odds.record(plan, matched, accepted)
        if not known:
            # At the end of a text less is drafted.
            plan = min(self._plans, key=lambda other: abs(other.num_drafts - plan.num_drafts))
        taken, tokens = self.durations.seconds[plan], len(accepted) + sum(accepted)
        self._missed.pop(plan, None)
        if self.durations.in_seconds:
            self._elapsed += taken
        self._steps += tokens // len(accepted)
        if self._trial is not None:
            tried, speed = self._trial
            lost = taken - tokens / speed
            self._spare -= lost
            self._gained = tried if lost < 0 else None
            if not sum(accepted):
                self._credits = 0
        self._spare = min(self._spare + _SHARE_OF_TRIALS * taken, _MOST_SPARE * taken)
        self._plans_run.append(plan)
        self._tokens_run.append(tokens / len(accepted))
        self._cycle += 1
        self._last[plan] = self._cycle

    def _speed(self) -> float:
        """Tokens per second of each row in the newest cycles, by what is known of durations now."""
        time = sum(map(self.durations.seconds.__getitem__, self._plans_run))
        return sum(self._tokens_run) / time if time else 0.0

    def _capturing(self, plan: Plan) -> float:
        """Seconds that it takes to capture a plan."""
        return self._capture * _passes(plan)

    def _is_due(self, wish: Plan, saved: float, remaining: int) -> bool:
        """Whether to capture a plan that would have ``saved`` so many seconds of this cycle."""
        if not self.durations.in_seconds:
            return False
        self._missed[wish] = self._missed.get(wish, 0.0) + saved
        more = 1 + min(1.0, remaining / max(1, self._steps))
        return remaining > _LITTLE and self._missed[wish] * more >= self._capturing(wish)

    def _next_trial(self, best: Plan, affordable: Collection[Plan]) -> Plan | None:
        """What was not run for longest, or what just gained."""
        candidates = []
        for plan in self._trials:
            alike = [other for other in affordable if other.source is plan.source and other.num_drafts]
            if alike and (plan.source is not best.source or not best.num_drafts):
                candidates.append(min(alike, key=lambda other: abs(other.num_drafts - plan.num_drafts)))
        is_old = not self.durations.knows(PLAIN) or self._cycle - self._last.get(PLAIN, 0) >= _PLAIN_AGE
        if best != PLAIN and is_old and PLAIN in affordable:
            candidates.append(PLAIN)
        if self._gained in candidates:
            return self._gained
        return min(candidates, key=lambda plan: self._last.get(plan, 0), default=None)


def _passes(plan: Plan) -> int:
    """Of the model, in a cycle."""
    return 1 + (plan.num_drafts if plan.source is Source.SELF else 0)

"""What a cycle of each plan takes: measured, or expected by others that were."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .plan import PLAIN, Plan, Source

# Newest durations of a plan that count, so that growing contexts are followed.
_TIMES_KEPT = 5


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
# A CPU computes what a GPU reads: SmolLM2 at 3,000 tokens, two cores.
ON_CPU = Costs(step=0.9, verified=0.25)


class Durations:
    """How long cycles take.

    Attributes:
        seconds: of each plan; in units of ``costs`` as long as nothing is known of the machine.
        in_seconds: whether something is.
    """

    def __init__(self, plans: Sequence[Plan], costs: Costs, earlier: Mapping[Plan, float] | None = None) -> None:
        """``earlier``: seconds that plans took in another process on this machine."""
        self._plans = plans
        self._times: dict[Plan, deque[float]] = {}
        self._before = {plan: costs.of(plan) for plan in plans}
        self.in_seconds = False
        self._known: set[Plan] = set()
        self.seconds = dict(self._before)
        if earlier:
            self.expect(earlier)

    def expect(self, seconds: Mapping[Plan, float]) -> None:
        """Begin with what such cycles took elsewhere, of one plan at least; nothing was timed here yet."""
        self._before = {plan: seconds.get(plan) or self._expected(plan, seconds) for plan in self._plans}
        self._known = set(seconds)
        self.in_seconds = True
        self.seconds = dict(self._before)

    def knows(self, plan: Plan) -> bool:
        """Whether such a cycle was ever timed."""
        return plan in self._known

    def measured(self) -> dict[Plan, float]:
        """Seconds of plans that were timed more than once in this process."""
        return {plan: self.seconds[plan] for plan, times in self._times.items() if len(times) > 1}

    def add(self, plan: Plan, seconds: float) -> None:
        """Learn how long a cycle took."""
        times = self._times.setdefault(plan, deque(maxlen=_TIMES_KEPT))
        times.append(seconds)
        self._known.add(plan)
        self.in_seconds = True
        # Most cycles take as long as those before them, and then nothing else is expected.
        if len(times) < 3 or min(times) != self.seconds[plan]:
            self.seconds = {each: self._estimate(each) for each in self._plans}

    def _estimate(self, plan: Plan) -> float:
        """The shortest of the newest cycles, since others may have been delayed.

        A single one may be such; then it is no longer than what :meth:`_expected` says by others.
        """
        times: Sequence[float] = self._times.get(plan, ())
        if len(times) > 1:
            return min(times)
        others = {other: min(own) for other, own in self._times.items() if other != plan}
        sure = {other: own for other, own in others.items() if len(self._times[other]) > 1}
        return min((*times, self._expected(plan, sure or others))) if others else times[0]

    def _expected(self, plan: Plan, known: Mapping[Plan, float]) -> float:
        """On the line through plain decoding and the plan that is most like it, or in proportion to what was before."""
        alike = [other for other in known if other.source is plan.source and other.num_drafts]
        nearest = min(alike or known, key=lambda other: abs(other.num_drafts - plan.num_drafts))
        if not alike or PLAIN not in known or plan == PLAIN:
            return known[nearest] * self._before[plan] / self._before[nearest]
        more = max(0.0, known[nearest] - known[PLAIN])
        return known[PLAIN] + plan.num_drafts / nearest.num_drafts * more

"""How many tokens to draft in the next cycle: a fixed number, or what measured times and acceptance make fastest.

A cycle of n drafts yields :func:`cycle_tokens` and takes verify + n * draft seconds, so tokens per second have a best
n; n = 0 is plain decoding with the target.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Protocol

# Each number has a CUDA graph of its own, so there are few.
AUTO_CHOICES = (0, 1, 2, 4, 6, 8)
# Timed before anything is chosen; the times of other numbers are extrapolated from these two until they are known.
STARTS = (4, 0)
# Where drafts seldom pay: plain decoding, until another number has its turn.
PLAIN_START = (0,)
# With three times, one that something else delayed is not the median.
_STARTING_TIMES = 3
# Newest durations of a number whose median counts: delays are forgotten, and growing contexts followed.
_TIMES_KEPT = 9
# Cycles after which another number is tried: plain decoding and the fastest number's neighbours, in turn.
_PROBE_EVERY = 100
# Weight of the newest accepted or rejected token in the running average.
_NEWEST_TRIAL = 0.02
_PRIOR_ACCEPTANCE = 0.8


def cycle_tokens(rate: float, num_drafts: int) -> float:
    """Expected tokens of a cycle, 1 + a + ... + a^n (Leviathan et al. 2023, eq. 1).

    Args:
        rate: probability a that a draft token is accepted, given that those before it were.
        num_drafts: tokens drafted (n).
    """
    return sum(rate**drafts for drafts in range(num_drafts + 1))


class DraftCount(Protocol):
    """Decides how many tokens each cycle drafts, ``most`` at the most."""

    most: int

    def choose(self) -> int:
        """Tokens to draft in the next cycle."""

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float | None) -> None:
        """Learn from a cycle: drafts accepted by each running sequence, and its duration if that is like others'."""


class FixedDraftCount:
    """Always the same number."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.most = num_speculative_tokens

    def choose(self) -> int:
        """The number given."""
        return self.most

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float | None) -> None:
        """Nothing is learnt."""


class AutoDraftCount:
    """The number that is fastest by what was seen so far.

    It follows measured times, so two runs may draft differently, also with equal seeds, whose texts are equal still.

    Attributes:
        acceptance: running probability that the next draft token is accepted, given that those before it were.
    """

    most = max(AUTO_CHOICES)

    def __init__(self, starts: tuple[int, ...] = STARTS) -> None:
        """``starts`` are timed first; :data:`STARTS` or :data:`PLAIN_START`."""
        self._starts = starts
        self.acceptance = _PRIOR_ACCEPTANCE
        self._seconds: dict[int, deque[float]] = {}
        self._warm: set[int] = set()
        self._since_probe = 0
        self._num_probes = 0

    def choose(self) -> int:
        """The numbers to start with until both have been timed, then the fastest; now and then another one."""
        for start in self._starts:
            if len(self._seconds.get(start, ())) < _STARTING_TIMES:
                return start
        fastest = self.fastest()
        if self._since_probe < _PROBE_EVERY:
            return fastest
        place = AUTO_CHOICES.index(fastest)
        others = {0, *AUTO_CHOICES[max(0, place - 1) : place + 2]} - {fastest}
        return sorted(others)[self._num_probes % len(others)]

    def fastest(self) -> int:
        """The number with the most tokens per second, once those to start with have been timed."""
        return max(AUTO_CHOICES, key=self.tokens_per_second)

    def tokens_per_second(self, num_drafts: int) -> float:
        """Expected yield of cycles of ``num_drafts`` tokens, once those to start with have been timed.

        0 while no drafting has been.
        """
        some = self._starts[0] or max(self._seconds)
        if num_drafts in self._seconds:
            seconds = self._median(num_drafts)
        elif some == 0:
            return 0.0
        else:
            seconds = self._median(0) + num_drafts / some * (self._median(some) - self._median(0))
        return cycle_tokens(self.acceptance, num_drafts) / max(seconds, 1e-9)

    def _median(self, num_drafts: int) -> float:
        return median_low(self._seconds[num_drafts])

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float | None) -> None:
        """Update what is known; the first cycle of a number, which may compile, is not timed."""
        if seconds is not None and num_drafts in self._warm:
            self._seconds.setdefault(num_drafts, deque(maxlen=_TIMES_KEPT)).append(seconds)
        self._warm.add(num_drafts)
        probed = self._since_probe >= _PROBE_EVERY
        self._num_probes += probed
        self._since_probe = 0 if probed else self._since_probe + 1
        for count in accepted if num_drafts else ():
            # Each token up to the first rejected one is one trial.
            for success in [1.0] * count + [0.0] * (count < num_drafts):
                self.acceptance += _NEWEST_TRIAL * (success - self.acceptance)

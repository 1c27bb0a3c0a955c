"""How many tokens to draft in the next cycle: a fixed number, or what measured times and acceptance make fastest.

With a per-token acceptance rate a, a cycle of n drafts yields 1 + a + ... + a^n tokens (Leviathan et al. 2023, eq. 1)
and takes verify + n * draft seconds, so tokens per second have a best n; n = 0 is plain decoding with the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

AUTO = "auto"
# Each number has a CUDA graph of its own, so there are few.
AUTO_CHOICES = (0, 1, 2, 4, 6, 8)
# Cycles after which plain decoding is timed again, or while decoding plainly the acceptance.
_PROBE_EVERY = 100
# Weight of the newest cycle's duration, and of the newest accepted or rejected token, in running averages.
_NEWEST = 0.1
_NEWEST_TRIAL = 0.02
_PRIOR_ACCEPTANCE = 0.8


class DraftCount(Protocol):
    """Decides how many tokens each cycle drafts, ``most`` at the most."""

    most: int

    def choose(self) -> int:
        """Tokens to draft in the next cycle."""

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float) -> None:
        """Learn from a cycle: drafts accepted by each running sequence, and its duration."""


class FixedDraftCount:
    """Always the same number."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.most = num_speculative_tokens

    def choose(self) -> int:
        """The number given."""
        return self.most

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float) -> None:
        """Nothing is learnt."""


class AutoDraftCount:
    """The number that is fastest by what was seen so far.

    Attributes:
        acceptance: running probability that the next draft token is accepted, given that those before it were.
        seconds: running duration of a cycle by number of drafts.
    """

    most = max(AUTO_CHOICES)

    def __init__(self) -> None:
        self.acceptance = _PRIOR_ACCEPTANCE
        self.seconds: dict[int, float] = {}
        self._warm: set[int] = set()
        self._since_probe = 0
        self._probes = False

    def choose(self) -> int:
        """4 drafts and plain decoding until both have been timed, then the fastest; now and then the other kind."""
        for start in (4, 0):
            if start not in self.seconds:
                return start
        best = max(AUTO_CHOICES, key=self.tokens_per_second)
        self._probes = self._since_probe >= _PROBE_EVERY
        return best if not self._probes else 2 if best == 0 else 0

    def tokens_per_second(self, num_drafts: int) -> float:
        """Expected yield of cycles of ``num_drafts`` tokens, once 4 drafts and plain decoding have been timed."""
        tokens = sum(self.acceptance**n for n in range(num_drafts + 1))
        verify = self.seconds[0]
        timed = num_drafts if num_drafts in self.seconds else 4
        per_draft = (self.seconds[timed] - verify) / timed if timed else 0.0
        return tokens / max(verify + num_drafts * per_draft, 1e-9)

    def record(self, num_drafts: int, accepted: Sequence[int], seconds: float) -> None:
        """Update the averages; the first cycle of a number, which may compile, is not timed."""
        if num_drafts in self._warm:
            known = self.seconds.get(num_drafts, seconds)
            self.seconds[num_drafts] = known + _NEWEST * (seconds - known)
        self._warm.add(num_drafts)
        self._since_probe = 0 if self._probes else self._since_probe + 1
        self._probes = False
        for count in accepted if num_drafts else ():
            # Each token up to the first rejected one is one trial.
            for success in [1.0] * count + [0.0] * (count < num_drafts):
                self.acceptance += _NEWEST_TRIAL * (success - self.acceptance)

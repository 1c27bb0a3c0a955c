"""How much the cycles of an engine draft: a fixed number, or what times and acceptance make fastest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from quantspec.engine.draft_count import AutoDraftCount
from quantspec.engine.durations import ON_CPU, ON_GPU
from quantspec.engine.odds import Odds
from quantspec.engine.plan import Plan
from quantspec.pair import Pair

from .batch import Batch


class DraftChoice:
    """Decides for each cycle, by its bucket, whose cycles take times of their own; acceptance is the rows', anywhere.

    Attributes:
        plans: to choose from.
    """

    def __init__(self, pair: Pair, counts: Sequence[int], sizes: Iterable[int]) -> None:
        """``counts``: tokens that a cycle may draft; ``sizes``: places of each bucket."""
        self.plans = [Plan(count) for count in counts]
        self._pair = pair
        self._odds = Odds()
        costs = ON_CPU if pair.device.type == "cpu" else ON_GPU
        drafting = [count for count in counts if count]
        self._counts = {size: AutoDraftCount(costs, self_counts=drafting, odds=self._odds) for size in sizes}
        # When the result of the cycle before was there; None if more than decoding came after it.
        self._last: float | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.plans) == 1

    def expect(self, size: int, seconds: Mapping[Plan, float]) -> None:
        """Begin with what cycles of a bucket took without texts."""
        self._counts[size].durations.expect(seconds)

    def forget(self, place: int) -> None:
        """Another text is in a place from now on."""
        self._odds.forget(place)

    def interrupt(self) -> None:
        """What comes before the next result is more than decoding, so the time until then tells nothing."""
        self._last = None

    def choose(self, batch: Batch) -> Plan:
        """The plan of the next cycle, the same on every rank."""
        if self.is_fixed:
            return self.plans[0]
        plan = self._counts[len(batch.requests)].choose(batch.matched, batch.remaining, batch.captured)
        # Of measured times each rank has its own.
        return Plan.of(*self._pair.agree(plan.numbers()))

    def record(self, batch: Batch, preparing: float) -> None:
        """Learn from the cycle whose result has just come.

        The host waits for results anyway, and so the time between two is measured, which is what callers see.

        Args:
            batch: that ran it.
            preparing: seconds that it took to make ready for the plan, which the next cycle of the same does without.
        """
        if self.is_fixed:
            return
        last, self._last = self._last, time.perf_counter()
        seconds = None if last is None else self._last - last - preparing
        # Rows that the host judges take their time there.
        if batch.is_new or batch.on_host:
            seconds = None
        self._counts[len(batch.requests)].record(
            batch.plan, batch.matched, batch.accepted, seconds, preparing if batch.is_new else 0.0
        )

"""What tuning did to a draft, as it is told to people and saved with the pair."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftQuality:
    """How close a draft is to its target, each token read with the target's cache of those before it.

    Attributes:
        kl: mean KL divergence of the draft's distribution from the target's, in nats.
        acceptance: mean sum of the smaller of both probabilities: the chance that a draft stands at temperature 1.
        agreement: how often both have the same arg-max: the chance that a draft stands in greedy search.
    """

    kl: float
    acceptance: float
    agreement: float

    def __str__(self) -> str:
        return f"KL {self.kl:.4f}, acceptance {self.acceptance:.3f}, greedy {self.agreement:.3f}"


@dataclass(frozen=True)
class TuneReport:
    """One tuning.

    Attributes:
        steps: those that were done.
        stopped: whether it was told to stop before the last.
        before, after: on held-out text.
        tokens: that were learned from, repeated ones included.
        seconds: in all, sampling included.
        peak_memory: most bytes of the GPU's memory in use; None on a CPU.
        seed: that chose the text.
    """

    steps: int
    stopped: bool
    before: DraftQuality
    after: DraftQuality
    tokens: int
    seconds: float
    peak_memory: int | None
    seed: int

    @classmethod
    def from_dict(cls, values: dict) -> TuneReport:
        """The report whose ``dataclasses.asdict`` is ``values``."""
        qualities = {name: DraftQuality(**values[name]) for name in ("before", "after")}
        return cls(**{**values, **qualities})

    def __str__(self) -> str:
        memory = "" if self.peak_memory is None else f", {self.peak_memory / 2**30:.1f} GiB at most"
        return f"tuned {self.steps} steps in {self.seconds:.0f} s{memory}: {self.before} -> {self.after}"

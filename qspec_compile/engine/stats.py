"""What one ``generate`` call did; ``draft_acceptance_rate`` and ``mean_acceptance_length`` are named as in vLLM."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from quantspec.html import html_table

from .plan import Plan, Source


@dataclass
class GenerationStats:
    """Counts, times and bytes of one ``generate`` call; ``print`` it for a table.

    Attributes:
        num_speculative_tokens: most tokens drafted per cycle: the number asked for; with "auto"
            ``AutoDraftCount.most``, 12, or 15 where texts are looked up.
        num_sequences: batch size.
        prompt_tokens, generated_tokens: over all sequences.
        continued_tokens: prompt tokens that were in the cache already and not prefilled again.
        cycles: cycles summed over sequences that were still running.
        drafted, accepted: draft tokens proposed and accepted, over running sequences.
        drafted_by_source, accepted_by_source: the same by where they came from, ``self`` or ``lookup``.
        drafted_per_position, accepted_per_position: the same by place in the block.
        acceptance_histogram: ``[n]`` is how often exactly n draft tokens of a block were accepted.
        flushes: cycles that moved a group into the planes.
        pages_read: pages of all layers, sequences and KV heads that a draft step behind the last cycle reads, and how
            many there are; None where drafts read everything.
        prefill_seconds: wall-clock until the first token of every prompt is chosen.
        decode_seconds: wall-clock of the cycles, with sampling, logits processors, transformers' stopping criteria and
            the copies for a streamer. Of the caller's own code, the streamer and criteria that are not transformers'
            are left out. So is what a call does once, before and after: checks, the cache's allocation, the result.
        cache_bytes, weight_bytes: by part.
        drafted_per_cycle, accepted_per_cycle, seconds_per_cycle: history, one entry per cycle of the batch, over its
            running sequences. About 50 bytes a cycle, so a megabyte in 100,000 tokens; left out of :meth:`as_dict`.
    """

    num_speculative_tokens: int
    num_sequences: int = 1
    prompt_tokens: int = 0
    generated_tokens: int = 0
    continued_tokens: int = 0
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_source: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Source), 0))
    accepted_by_source: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Source), 0))
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    acceptance_histogram: list[int] = field(default_factory=list)
    flushes: int = 0
    pages_read: tuple[int, int] | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: dict[str, int] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    drafted_per_cycle: list[int] = field(default_factory=list)
    accepted_per_cycle: list[int] = field(default_factory=list)
    seconds_per_cycle: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafted_per_position = [0] * self.num_speculative_tokens
        self.accepted_per_position = [0] * self.num_speculative_tokens
        self.acceptance_histogram = [0] * (self.num_speculative_tokens + 1)

    def record_cycle(self, plan: Plan, accepted: list[int], seconds: float = 0.0) -> None:
        """Count one cycle; ``accepted`` holds one number per running sequence."""
        drafted = plan.num_drafts
        self.decode_seconds += seconds
        self.drafted_by_source[plan.source] += drafted * len(accepted)
        self.accepted_by_source[plan.source] += sum(accepted)
        self.drafted_per_cycle.append(drafted * len(accepted))
        self.accepted_per_cycle.append(sum(accepted))
        self.seconds_per_cycle.append(seconds)
        for count in accepted:
            self.cycles += 1
            self.drafted += drafted
            self.accepted += count
            self.acceptance_histogram[count] += 1
            for position in range(drafted):
                self.drafted_per_position[position] += 1
                self.accepted_per_position[position] += position < count

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted tokens; NaN if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Accepted over drafted tokens at each place in the block."""
        pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        return [accepted / drafted if drafted else float("nan") for accepted, drafted in pairs]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a cycle yields, the target's own included: 1 + accepted / cycles."""
        return 1 + self.accepted / self.cycles if self.cycles else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first of each sequence over ``decode_seconds``; NaN if there are none."""
        return (
            (self.generated_tokens - self.num_sequences) / self.decode_seconds if self.decode_seconds else float("nan")
        )

    def as_dict(self) -> dict[str, object]:
        """Fields but the histories, and rates, as JSON-ready values; None for a rate of nothing."""
        rates = ("draft_acceptance_rate", "acceptance_rate_per_position", "mean_acceptance_length", "tokens_per_second")
        values = {**asdict(self), **{name: getattr(self, name) for name in rates}}
        # JSON has no NaN.
        values["acceptance_rate_per_position"] = [_none_if_nan(rate) for rate in self.acceptance_rate_per_position]
        return {name: _none_if_nan(value) for name, value in values.items() if not name.endswith("_per_cycle")}

    def _from(self, source: Source) -> str:
        return f"{self.accepted_by_source[source]} of {self.drafted_by_source[source]} drafted tokens"

    def _rows(self) -> list[tuple[str, str]]:
        def mebibytes(parts: dict[str, int]) -> str:
            total = sum(parts.values()) / 2**20
            detail = ", ".join(f"{name} {count / 2**20:.1f}" for name, count in parts.items())
            return f"{total:.1f} MiB ({detail})"

        continued = f" ({self.continued_tokens} of them cached)" if self.continued_tokens else ""
        rows = [
            ("tokens", f"{self.prompt_tokens} prompt{continued}, {self.generated_tokens} generated"),
            ("prefill", f"{self.prefill_seconds:.2f} s"),
            ("decode", f"{self.decode_seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"),
        ]
        if self.drafted:
            # With "auto" most of the positions that may be drafted never are.
            positions = ", ".join(f"{rate:.2f}" for rate in self.acceptance_rate_per_position if not math.isnan(rate))
            rows += [
                ("accepted", f"{self.accepted} of {self.drafted} drafted tokens in {self.cycles} cycles"),
                *((f"from {source}", self._from(source)) for source in Source),
                ("draft_acceptance_rate", f"{self.draft_acceptance_rate:.3f} (by position {positions})"),
                ("mean_acceptance_length", f"{self.mean_acceptance_length:.2f} tokens a cycle"),
                ("acceptance_histogram", " ".join(map(str, self.acceptance_histogram))),
            ]
        if self.pages_read is not None:
            rows.append(("pages_read", "{} of {}, by a draft step at the end".format(*self.pages_read)))
        rows += [
            ("flushes", str(self.flushes)),
            ("cache", mebibytes(self.cache_bytes)),
            ("weights", mebibytes(self.weight_bytes)),
        ]
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _repr_html_(self) -> str:
        return html_table("Statistics of one generate call", self._rows())


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value

"""The speculative loop: prefill, then cycles of draft, verify, accept, flush, until every request is done.

Here is the host's part; what runs on the device is a :class:`quantspec.engine.cycle.Cycle`. The loop knows nothing of
tokenizers, and what decides which requests take part stands above it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.passes import Role

from .cycles import NAN_LOGITS, Call, Clock, Cycles, choose, cycles_of
from .draft_count import DraftCount
from .logits_processors import apply_processors
from .plan import Plan
from .prefill import prefill
from .sampling import Randomness, perturbation
from .session import Session
from .stats import GenerationStats


class SpeculativeLoop:
    """One call's way from its prompts to its last token."""

    def __init__(
        self,
        session: Session,
        cache: HierarchicalCache,
        call: Call,
        draft_count: DraftCount,
        stats: GenerationStats,
    ) -> None:
        self.session = session
        self.cache = cache
        self.call = call
        self.progress = call.progress
        self.draft_count = draft_count
        self.stats = stats
        self._clock = Clock(session.pair, call.progress)

    def run(self) -> None:
        """Generate until every request is done; what the cache holds of the prompts is not prefilled.

        Raises:
            FloatingPointError: the model's logits are NaN, or no token can be sampled from the processed scores.
        """
        pending = self.start()
        if not any(self.progress.running):
            return
        session = self.session
        looks_up = self.draft_count.looks_up
        cycles = cycles_of(session.pair, session.replays, self.cache, self.call, self._clock, pending, looks_up)
        self.draft_count.begin()
        while any(self.progress.running):
            self.step(cycles)
        self.draft_count.end()
        self.stats.pages_read = self.cache.pages_read()

    def step(self, cycles: Cycles) -> None:
        """Run one cycle, show what it emitted to streamer and criteria, and count it."""
        start = self._clock.now()
        matched = cycles.matched()
        plan = self.draft_count.choose(matched, self.progress.remaining, cycles.captured)
        # Of measured times each rank has its own.
        done = cycles.run(Plan.of(*self.progress.agree(plan.numbers())))
        # Judging takes as long per token however many were drafted, so choosing their number does without it.
        self.draft_count.record(done.plan, matched, cycles.advancing(done.accepted), done.seconds, done.capturing)
        self._judge()
        self.stats.flushes += done.flushed
        self.stats.record_cycle(done.plan, done.accepted, self._clock.now() - start)

    def start(self) -> Tensor:
        """Prefill, and emit the first token of each request; returns the newest tokens ``(B,)``, not cached yet."""
        start = self._clock.finished()
        prompts = [request.prompt for request in self.progress.requests]
        if self.call.verifier is not Role.TARGET:
            # Its first token, too, is the verifier's own.
            pending = torch.stack([prompt[-1] for prompt in prompts])
            self._prefill([prompt[:-1] for prompt in prompts])
        else:
            logits = self._prefill(prompts)
            assert logits is not None
            self._clock.wait_with_ranks()
            if bool(logits.isnan().any()):
                raise FloatingPointError(NAN_LOGITS)
            prompts_and_padding = self.progress.sequences[:, : self.progress.prompt_len]
            raw = logits[:, 0].float()
            scores = apply_processors(self.call.processors, prompts_and_padding, raw.clone())
            randomness = Randomness.of(self.cache.length, self.progress.requests)
            noise = None if randomness is None else perturbation(scores[:, None], *randomness.at(-1, 1))[:, 0]
            pending, tokens = choose(self.call, scores, noise)
            for row, (token, score, logit) in enumerate(zip(tokens, scores, raw, strict=True)):
                self.progress.append(row, [token], [score], [logit])
            self._judge()
        self.stats.prefill_seconds = self._clock.now() - start
        return pending

    def _prefill(self, prompts: Sequence[Tensor]) -> Tensor | None:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.cache.length.device)
        new = bool((lengths > self.cache.length).any())
        logits = prefill(self.session.pair, self.cache, prompts) if new else None
        self.stats.cache_bytes = self.cache.bytes_by_part()
        self.stats.weight_bytes = self.session.pair.weight_bytes
        return logits

    def _judge(self) -> None:
        """Stream what is complete, and stop where the criteria say so."""
        self.progress.judge()
        self.stats.generated_tokens = self.progress.num_generated()

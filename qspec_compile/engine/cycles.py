"""Three ways to run a cycle on behalf of the host: replayed, call by call, or token by token in lockstep.

They differ in what logits processors see. Replayed cycles hold processors that read scores alone. Eager ones show every
other stateless processor the text before each position. Lockstep shows any processor what it sees in plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair
from quantspec.passes import Role

from .acceptance import Acceptance, GreedyAcceptance, Rules, SampledAcceptance
from .cycle import Cycle, CycleResult
from .cycle_graph import CycleReplay, CycleReplays
from .logits_processors import ScoreProcessor, apply_processors, stateless
from .progress import Progress
from .sampling import sample, sample_step

NAN_LOGITS = (
    "the model's logits are NaN, so no token can be chosen; check the weights, or load the model in bfloat16 or "
    "float32 if it overflows float16"
)

NO_DISTRIBUTION = (
    "no token can be sampled: after logits processors and temperature every score is -inf, or one is NaN or inf; check "
    "the processors (a constraint that leaves no token, a tiny temperature) and whether the model's logits are NaN"
)


class Call(NamedTuple):
    """What one call of ``generate`` asks of the engine.

    Attributes:
        progress: its requests.
        processors: of the scores, in order.
        do_sample: sampling, else greedy search.
        generator: of randomness, or None for the global one.
        rules: which drafts stand.
        verifier: the role whose distribution is emitted.
    """

    progress: Progress
    processors: LogitsProcessorList
    do_sample: bool
    generator: torch.Generator | None
    rules: Rules
    verifier: Role = Role.TARGET


class Outcome(NamedTuple):
    """What one cycle did: ``num_drafts`` drafted, of which each running sequence ``accepted`` so many.

    ``typical_start`` is when that began which every cycle of so many drafts does; None if this one is unlike others.
    """

    num_drafts: int
    accepted: list[int]
    flushed: bool
    typical_start: float | None


class Cycles(Protocol):
    """A way to run cycles: drafts, verifies, emits what is accepted, flushes."""

    def run(self, num_drafts: int) -> Outcome:
        """Run one cycle of up to ``num_drafts`` drafts."""

    def close(self) -> None:
        """Hand back what was borrowed."""


class Clock:
    """Seconds, standing still in the caller's streamer and stopping criteria."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self._device = device
        self._progress = progress

    def now(self) -> float:
        """The clock."""
        return time.perf_counter() - self._progress.user_seconds

    def finished(self) -> float:
        """The clock, once the device has done what was asked of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.now()


def choose(call: Call, scores: Tensor, drafts: Tensor | None = None, draft_probs: Tensor | None = None) -> Tensor:
    """The token ``(B,)`` that scores ``(B, V)`` choose, when sampling by way of the drafts ``(B,)`` if any.

    Raises:
        FloatingPointError: no token of a running sequence can be sampled.
    """
    if not call.do_sample:
        return scores.argmax(-1)
    probs = scores.softmax(-1)
    running = torch.tensor(call.progress.running, device="cpu").to(probs.device)
    if bool(probs[running].isnan().any()):
        raise FloatingPointError(NO_DISTRIBUTION)
    if drafts is None or draft_probs is None:
        return sample(probs, call.generator)
    return sample_step(drafts, draft_probs, probs, call.generator)


def _emit(call: Call, result: CycleResult, scores: Tensor | None) -> list[int]:
    """Emit each running sequence's accepted tokens and the one that follows; returns how many each accepted.

    Raises:
        FloatingPointError: the cycle met NaN.
    """
    if result.has_nan:
        raise FloatingPointError(NO_DISTRIBUTION if call.do_sample else NAN_LOGITS)
    running = call.progress.running
    for row, count in enumerate(result.accepted):
        if running[row]:
            tokens = [*result.drafts[row][:count], result.next_tokens[row]]
            call.progress.append(row, tokens, None if scores is None else scores[row, : count + 1])
    return [count for count, runs in zip(result.accepted, running, strict=True) if runs]


def _eager_cycle(
    pair: Pair, cache: HierarchicalCache, call: Call, processors: LogitsProcessorList, pending: Tensor
) -> Cycle:
    """A cycle whose drafts are shown to those of ``processors`` that read the text."""
    process = ScoreProcessor(processors)

    def scores(logits: Tensor, num_ahead: int) -> Tensor:
        return process(logits, call.progress, num_ahead)

    acceptance: Acceptance = (
        SampledAcceptance(scores, call.generator, call.rules)
        if call.do_sample
        else GreedyAcceptance(scores, pair.compiles_on_gpu, call.rules)
    )
    on_draft = call.progress.write_draft if process.needs_context else None
    cycle = Cycle(pair, cache, acceptance, call.verifier, on_draft)
    cycle.pending.copy_(pending)
    return cycle


class EagerCycles:
    """Cycles launched kernel by kernel, with processors that keep no state."""

    def __init__(self, pair: Pair, cache: HierarchicalCache, call: Call, clock: Clock, pending: Tensor) -> None:
        """``pending (B,)``: newest tokens, not cached yet."""
        self._call, self._clock, self._cache = call, clock, cache
        self._cycle = _eager_cycle(pair, cache, call, call.processors, pending)

    def run(self, num_drafts: int) -> Outcome:
        start = self._clock.finished()
        progress = self._call.progress
        self._cycle.running.copy_(torch.tensor(progress.running, device="cpu"))
        packed, scores = self._cycle(min(num_drafts, progress.remaining - 1))
        result = CycleResult.read(packed)
        if result.flush_due:
            self._cache.flush()
        return Outcome(len(result.drafts[0]), _emit(self._call, result, scores), result.flush_due, start)

    def close(self) -> None:
        """Nothing is borrowed."""


class LockstepCycles:
    """Cycles in which processors see what they see in plain decoding: one call per token, for all rows at once.

    For any draft distribution q, accepting x with probability min(1, p(x)/q(x)) and drawing the rest from max(0, p - q)
    gives p. So drafts know of the stateless processors alone, which costs acceptance and leaves the text as it is.
    """

    def __init__(self, pair: Pair, cache: HierarchicalCache, call: Call, clock: Clock, pending: Tensor) -> None:
        """``pending (B,)``: newest tokens, not cached yet."""
        self._call, self._clock, self._cache = call, clock, cache
        self._cycle = _eager_cycle(pair, cache, call, stateless(call.processors), pending)

    def run(self, num_drafts: int) -> Outcome:
        start = self._clock.finished()
        progress = self._call.progress
        running = progress.running
        self._cycle.running.copy_(torch.tensor(running, device="cpu"))
        drafts, proposed, logits = self._cycle.propose(min(num_drafts, progress.remaining - 1))
        accepted, tokens = self._walk(drafts, proposed, logits)
        flush_due = bool(self._cycle.keep(torch.full_like(tokens, accepted), tokens))
        if flush_due:
            self._cache.flush()
        return Outcome(drafts.shape[1], [accepted] * sum(running), flush_due, start)

    def close(self) -> None:
        """Nothing is borrowed."""

    def _walk(self, drafts: Tensor, proposed: Sequence[Tensor], logits: Tensor) -> tuple[int, Tensor]:
        """Emit the tokens of a block one by one until one sequence rejects its draft, or all are done.

        Returns:
            How many drafts every sequence accepted, and the token ``(B,)`` of each that follows them.
        """
        call, progress = self._call, self._call.progress
        for step in range(logits.shape[1]):
            running = torch.tensor(progress.running, device="cpu").to(logits.device)
            if bool(logits[running, step].isnan().any()):
                raise FloatingPointError(NAN_LOGITS)
            # Running sequences are equally long, and those that are done are padded.
            text = progress.sequences[:, : max(progress.context_lens)]
            scores = apply_processors(call.processors, text, logits[:, step].to(torch.float32, copy=True))
            if step < drafts.shape[1]:
                tokens = choose(call, scores, drafts[:, step], proposed[step] if proposed else None)
                rejected = bool((tokens != drafts[:, step])[running].any())
            else:
                tokens, rejected = choose(call, scores), True
            for row, token in enumerate(tokens.tolist()):
                progress.append(row, [token], scores[row : row + 1])
            progress.judge()
            if rejected or not any(progress.running):
                break
        return step, tokens


class ReplayedCycles:
    """Cycles replayed as CUDA graphs, one graph per number of drafts."""

    def __init__(
        self, replays: CycleReplays, cache: HierarchicalCache, call: Call, clock: Clock, pending: Tensor
    ) -> None:
        """``pending (B,)``: newest tokens, not cached yet."""
        self._replays, self._call, self._clock, self._cache = replays, call, clock, cache
        self._pending = pending
        self._current: CycleReplay | None = None
        self._running: list[bool] = []

    def run(self, num_drafts: int) -> Outcome:
        call = self._call
        replay, is_new = self._replays.of(self._cache, num_drafts, call.processors, call.do_sample)
        if replay is not self._current:
            self._take(replay)
        if self._running != call.progress.running:
            self._running = call.progress.running
            replay.cycle.running.copy_(torch.tensor(self._running, device="cpu"))
        # Capture and change of graphs take their time, but not in the next cycle of as many drafts.
        start = self._clock.now()
        result = CycleResult.read(replay())
        if result.flush_due:
            replay.flush()
        accepted = _emit(call, result, None)
        return Outcome(len(result.drafts[0]), accepted, result.flush_due, None if is_new else start)

    def close(self) -> None:
        """Hand the state of randomness back."""
        if self._current is not None:
            self._current.end(self._call.generator)

    def _take(self, replay: CycleReplay) -> None:
        """Go on with another replay, from where the current one stopped."""
        if self._current is not None:
            self._current.end(self._call.generator)
            self._pending = self._current.cycle.pending
        replay.begin(self._call.processors, self._call.generator)
        replay.cycle.pending.copy_(self._pending)
        self._current, self._running = replay, []

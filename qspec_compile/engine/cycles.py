"""Two ways to run a cycle on behalf of the host, each replayed as CUDA graphs or launched kernel by kernel.

They differ in where logits processors run. Judged cycles hold those that a program on the device can hold, and accept
there. Lockstep shows any processor what it sees in plain decoding, token by token on the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair
from quantspec.passes import Role

from .acceptance import Rule, acceptance_of
from .cycle import Cycle, CycleResult, LockstepCycle, Proposal
from .cycle_graph import CycleReplay, CycleReplays, ProposalReplay
from .logits_processors import FollowingProcessor, ScoreProgram, apply_processors, compilable, in_lockstep, reads_text
from .lookup import Lookup
from .plan import Plan
from .progress import Progress, by_row
from .request import Request
from .sampling import Randomness
from .text import Text

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
        processors: of the scores, in order, for all rows at once.
        rule: which drafts stand.
        verifier: the role whose distribution is emitted.
    """

    progress: Progress
    processors: LogitsProcessorList
    rule: Rule
    verifier: Role = Role.TARGET


class Rows(Protocol):
    """The requests of a batch, as those see them who run its cycles on the device.

    Attributes:
        requests: one per sequence of the cache.
    """

    requests: Sequence[Request]

    @property
    def running(self) -> list[bool]:
        """Sequences that need tokens of the next cycle."""

    @property
    def remaining(self) -> int:
        """Most tokens that any running sequence may still emit."""

    @property
    def width(self) -> int:
        """Most tokens of a text, with its padding."""

    @property
    def sequences(self) -> Tensor:
        """``(B, W)`` ids on the device; anything where nothing is emitted yet."""

    @property
    def context_lens(self) -> list[int]:
        """Tokens of each text so far, its padding included."""


class Outcome(NamedTuple):
    """What one cycle did: by its ``plan`` it drafted, and each running sequence ``accepted`` so many.

    ``seconds`` is what every cycle of this plan takes, whatever is accepted; None if this one is unlike others.
    ``capturing`` took seconds before it that later cycles do without.
    """

    plan: Plan
    accepted: list[int]
    flushed: bool
    seconds: float | None
    capturing: float


class Cycles(Protocol):
    """A way to run cycles: drafts, verifies, emits what is accepted, flushes.

    Sequences that advance together count as one.
    """

    @property
    def captured(self) -> Collection[Plan] | None:
        """Plans that run without being captured first; None where none is captured."""

    def advancing(self, accepted: Sequence[int]) -> list[int]:
        """By how many drafts each advances, of what was accepted in every running sequence."""

    def matched(self) -> list[int | None]:
        """Tokens of each sequence's end that a lookup finds earlier in its text; None of those that are done."""

    def run(self, plan: Plan) -> Outcome:
        """Run one cycle of up to the plan's drafts."""


class Clock:
    """Seconds, standing still in the caller's streamer and stopping criteria."""

    def __init__(self, pair: Pair, progress: Progress) -> None:
        self._pair = pair
        self._progress = progress

    def now(self) -> float:
        """The clock."""
        return time.perf_counter() - self._progress.user_seconds

    def finished(self) -> float:
        """The clock, once the device has done what was asked of it."""
        if self._pair.device.type == "cuda":
            self.wait_with_ranks()
            torch.cuda.synchronize(self._pair.device)
        return self.now()

    def wait_with_ranks(self) -> None:
        """Before the device is read from: do not wait for it where another rank, that it waits for, is gone."""
        self._pair.wait_with_ranks()


def choose(call: Call, scores: Tensor, noise: Tensor | None) -> tuple[Tensor, list[int]]:
    """The token ``(B,)`` that scores ``(B, V)`` and the noise of sampling choose, on the device and on the host.

    Raises:
        FloatingPointError: no token of a running sequence can be sampled.
    """
    if noise is None:
        tokens = scores.argmax(-1)
        return tokens, tokens.tolist()
    best, tokens = (scores + noise).max(-1)
    # One transfer: ids are exact as float64.
    on_host, bests = torch.stack((tokens.double(), best.double())).tolist()
    fails = [row.do_sample and not math.isfinite(one) for row, one in zip(call.progress.requests, bests, strict=True)]
    if _any_running(call, fails):
        raise FloatingPointError(NO_DISTRIBUTION)
    return tokens, [int(token) for token in on_host]


def _any_running(call: Call, flags: Sequence[bool]) -> bool:
    return any(flag and runs for flag, runs in zip(flags, call.progress.running, strict=True))


class Runner(Protocol):
    """The device's part of cycles.

    Attributes:
        lookup: of the rows' texts, None if no cycle of the call needs it.
    """

    lookup: Lookup | None

    @property
    def cycle(self) -> Cycle:
        """The one that :meth:`prepare` prepared."""

    @property
    def captured(self) -> Collection[Plan] | None:
        """As :attr:`Cycles.captured`."""

    def prepare(self, plan: Plan) -> bool:
        """Make ready for a cycle of up to the plan's drafts; returns whether that took what later ones do without."""

    def judged(self) -> Tensor:
        """Run a whole cycle; returns the packed result."""

    def scores(self) -> Tensor:
        """``(B, T + 1, V)`` of the judged cycle that ran last, overwritten by the next."""

    def logits(self) -> Tensor:
        """As :meth:`scores`."""

    def proposed(self) -> Proposal:
        """Draft and verify, as :meth:`LockstepCycle.show`."""

    def move_on(self, accepted: int, next_tokens: Tensor) -> Tensor:
        """:meth:`LockstepCycle.move_on` by ``accepted`` drafts of every row."""

    def flush(self) -> None:
        """Flush where it is due."""


def _text_width(batch: Rows, cache: HierarchicalCache) -> int:
    """Tokens of a text with room for the drafts of sequences that are done, behind those that ended them."""
    return batch.width + 2 * (cache.num_speculative_tokens + 1)


class EagerRunner:
    """Launches cycles kernel by kernel."""

    captured = None

    def __init__(
        self,
        pair: Pair,
        cache: HierarchicalCache,
        batch: Rows,
        processors: LogitsProcessorList,
        pending: Tensor,
        kind: type[Cycle],
        looks_up: bool,
        rule: Rule,
        verifier: Role = Role.TARGET,
    ) -> None:
        """``processors`` are compilable; ``pending (B,)``: newest tokens, not cached yet; ``kind``: of the cycle."""
        self._cache, self._batch = cache, batch
        self.lookup = None
        if looks_up:
            most = cache.num_speculative_tokens
            self.lookup = Lookup(cache.batch_size, _text_width(batch, cache), most, pair.device, pair.captures_cycles)
            self.lookup.begin(batch.requests)
        text = None
        if reads_text(processors):
            text = Text(cache.batch_size, _text_width(batch, cache), pair.device)
            text.begin(batch.sequences, batch.context_lens)
        program = ScoreProgram(processors, text)
        randomness = Randomness.of(cache.length, batch.requests)
        acceptance = acceptance_of(program, pair, randomness, rule, judges=kind is not LockstepCycle)
        self.cycle = kind(pair, cache, acceptance, verifier, program.text, self.lookup)
        self.cycle.begin(pending)

    def prepare(self, plan: Plan) -> bool:
        self._plan = plan
        if not self.cycle.acceptance.follows_drafts:
            self._plan = plan._replace(num_drafts=min(plan.num_drafts, self._batch.remaining - 1))
        return False

    def judged(self) -> Tensor:
        packed, self._scores, self._logits = self.cycle(*self._plan)
        return packed

    def scores(self) -> Tensor:
        return self._scores

    def logits(self) -> Tensor:
        return self._logits

    def proposed(self) -> Proposal:
        assert isinstance(self.cycle, LockstepCycle)
        return self.cycle.show(*self._plan)

    def move_on(self, accepted: int, next_tokens: Tensor) -> Tensor:
        assert isinstance(self.cycle, LockstepCycle)
        return self.cycle.move_on(torch.full_like(next_tokens, accepted), next_tokens)

    def flush(self) -> None:
        self._cache.flush()


class ReplayRunner:
    """Replays cycles as CUDA graphs, a row of them per plan."""

    def __init__(
        self,
        replays: CycleReplays,
        cache: HierarchicalCache,
        batch: Rows,
        processors: LogitsProcessorList,
        pending: Tensor,
        kind: type[CycleReplay],
        looks_up: bool,
    ) -> None:
        """``processors`` are compilable; ``pending (B,)``: newest tokens, not cached yet; ``kind``: of the replays."""
        self._replays, self._cache, self._batch, self._processors = replays, cache, batch, processors
        self._pending, self._kind = pending, kind
        self._current: CycleReplay | None = None
        self._text, lookup = replays.texts(cache, _text_width(batch, cache))
        if reads_text(processors):
            self._text.begin(batch.sequences, batch.context_lens)
        self.lookup = lookup if looks_up else None
        if self.lookup is not None:
            self.lookup.begin(batch.requests)

        self._samples = any(request.do_sample for request in batch.requests)
        self._note_captured()

    @property
    def captured(self) -> Collection[Plan]:
        return self._captured

    def prepare(self, plan: Plan) -> bool:
        replay, is_new = self._replays.of(
            self._cache, plan, self._processors, self._samples, self._text, self.lookup, self._kind
        )
        if replay is not self._current:
            self._take(replay)
        if is_new:
            self._note_captured()
        return is_new

    def judged(self) -> Tensor:
        return self._replay()

    def scores(self) -> Tensor:
        return self._replay.scores

    def logits(self) -> Tensor:
        return self._replay.logits

    def proposed(self) -> Proposal:
        return self._replay()

    def move_on(self, accepted: int, next_tokens: Tensor) -> Tensor:
        assert isinstance(self._current, ProposalReplay)
        return self._current.move_on(accepted, next_tokens)

    def flush(self) -> None:
        self._replay.flush()

    @property
    def cycle(self) -> Cycle:
        return self._replay.cycle

    @property
    def _replay(self) -> CycleReplay:
        assert self._current is not None
        return self._current

    def _note_captured(self) -> None:
        looks_up = self.lookup is not None
        self._captured = self._replays.plans(self._processors, self._samples, looks_up, self._kind)

    def _take(self, replay: CycleReplay) -> None:
        """Go on with another replay, from where the current one stopped."""
        replay.begin(self._processors, self._batch.requests)
        if self._current is None:
            replay.cycle.begin(self._pending)
        else:
            replay.cycle.resume(self._current.cycle)
        self._current = replay


class _OnRunner:
    """What both ways share."""

    def __init__(self, runner: Runner, call: Call, clock: Clock) -> None:
        self._runner, self._call, self._clock = runner, call, clock
        self._told: tuple[Cycle, list[bool]] | None = None
        rows = len(call.progress.requests)
        self._matched: list[int] = [0] * rows if runner.lookup is None else runner.lookup.matched.tolist()

    @property
    def captured(self) -> Collection[Plan] | None:
        """As :attr:`Cycles.captured`."""
        return self._runner.captured

    def matched(self) -> list[int | None]:
        """Tokens of each sequence's end that a lookup finds earlier in its text; None of those that are done."""
        running = self._call.progress.running
        return [count if runs else None for count, runs in zip(self._matched, running, strict=True)]

    def _prepare(self, plan: Plan) -> float:
        """Make ready, and tell the device which sequences are running, if it does not know.

        Returns:
            Seconds that it took to do what later cycles of the plan do without.
        """
        start = self._clock.now()
        capturing = self._clock.finished() - start if self._runner.prepare(plan) else 0.0
        told = (self._runner.cycle, self._call.progress.running)
        if self._told != told:
            told[0].running.copy_(torch.tensor(told[1], device="cpu"))
            self._told = told
        return capturing


class JudgedCycles(_OnRunner):
    """Cycles whose processors run on the device, which judges the drafts too."""

    def advancing(self, accepted: Sequence[int]) -> list[int]:
        """All of them."""
        return list(accepted)

    def run(self, plan: Plan) -> Outcome:
        """Run one cycle of up to the plan's drafts."""
        runner = self._runner
        capturing = self._prepare(plan)
        # Capture and change of graphs take their time, but not in the next cycle of the same plan.
        start = self._clock.now()
        judged = runner.judged()
        self._clock.wait_with_ranks()
        result = CycleResult.read(judged)
        if result.flush_due:
            runner.flush()
        accepted = self._emit(result)
        self._matched = result.matched
        plan = plan._replace(num_drafts=len(result.drafts[0]))
        seconds = None if capturing else self._clock.finished() - start
        return Outcome(plan, accepted, result.flush_due, seconds, capturing)

    def _emit(self, result: CycleResult) -> list[int]:
        """Emit each running sequence's accepted tokens and the one that follows; returns how many each accepted.

        Raises:
            FloatingPointError: the next token of a sequence that needs one could not be chosen.
        """
        progress, accepted = self._call.progress, []
        # The next cycle overwrites them.
        scores_of = [] if progress.scores is None else by_row(self._runner.scores().clone())
        logits_of = [] if progress.logits is None else by_row(self._runner.logits().to(torch.float32, copy=True))
        for row, request in enumerate(progress.requests):
            if request.ended:
                continue
            count = result.accepted[row]
            accepted.append(count)
            tokens = [*result.drafts[row][:count], result.next_tokens[row]]
            if result.fails[row] and request.needs_after(tokens[:count]):
                raise FloatingPointError(NO_DISTRIBUTION if request.do_sample else NAN_LOGITS)
            progress.append(row, tokens, *(of[row] if of else None for of in (scores_of, logits_of)))
        return accepted


class LockstepCycles(_OnRunner):
    """Cycles in which processors see what they see in plain decoding: one call per token, for all rows at once.

    What is emitted is the target's own choice whatever was drafted. So drafts know of the compilable processors alone,
    which costs acceptance and leaves the text as it is.
    """

    def advancing(self, accepted: Sequence[int]) -> list[int]:
        """All rows are as one."""
        return [min(accepted)]

    def matched(self) -> list[int | None]:
        """The least of all that are running."""
        return [min(count for count in super().matched() if count is not None)]

    def run(self, plan: Plan) -> Outcome:
        """Run one cycle of up to the plan's drafts."""
        runner, running = self._runner, self._call.progress.running
        capturing = self._prepare(plan)
        start = self._clock.now()
        proposal = runner.proposed()
        # On a GPU the replay is under way, and nothing has waited for it yet.
        self._follow()
        # All that the host will ask of the device but the choices, at once.
        self._clock.wait_with_ranks()
        rows = proposal.packed.tolist()
        walk = self._clock.now()
        accepted, tokens = self._walk(proposal, rows)
        walk = self._clock.now() - walk
        flush_due, *self._matched = runner.move_on(accepted, tokens).tolist()
        if flush_due:
            runner.flush()
        plan = plan._replace(num_drafts=proposal.drafts.shape[1])
        # A walk takes as long per token whatever was drafted.
        seconds = None if capturing else self._clock.now() - start - walk
        return Outcome(plan, [accepted] * sum(running), bool(flush_due), seconds, capturing)

    def _walk(self, proposal: Proposal, rows: Sequence[Sequence[int]]) -> tuple[int, Tensor]:
        """Emit the tokens of a block one by one until one sequence rejects its draft, or all are done.

        ``rows`` are the proposal's packed ones.

        Returns:
            How many drafts every sequence accepted, and the token ``(B,)`` of each that follows them.
        """
        call, progress = self._call, self._call.progress
        drafts, logits, noise, _ = proposal
        *on_host, are_nan = zip(*rows, strict=True)
        for step in range(logits.shape[1]):
            if _any_running(call, [bool(bits >> step & 1) for bits in are_nan]):
                raise FloatingPointError(NAN_LOGITS)
            # Running sequences are equally long, and those that are done are padded.
            text = progress.sequences[:, : max(progress.context_lens)]
            scores = apply_processors(call.processors, text, logits[:, step].to(torch.float32, copy=True), again=True)
            tokens, chosen = choose(call, scores, None if noise is None else noise[:, step])
            drafted = step < drafts.shape[1]
            differ = [token != draft for token, draft in zip(chosen, on_host[step], strict=True)] if drafted else []
            rejected = not drafted or _any_running(call, differ)
            scores_of = [] if progress.scores is None else by_row(scores[:, None])
            logits_of = [] if progress.logits is None else by_row(logits[:, step : step + 1].clone().float())
            for row, token in enumerate(chosen):
                progress.append(row, [token], *(of[row] if of else None for of in (scores_of, logits_of)))
            progress.judge()
            if rejected or not any(progress.running):
                break
            self._follow()
        return step, tokens

    def _follow(self) -> None:
        progress = self._call.progress
        texts = [request.tokens for request in progress.requests]
        for processor in self._call.processors:
            if isinstance(processor, FollowingProcessor):
                processor.follow(texts, progress.running)


def cycles_of(
    pair: Pair,
    replays: CycleReplays,
    cache: HierarchicalCache,
    call: Call,
    clock: Clock,
    pending: Tensor,
    looks_up: bool,
) -> Cycles:
    """The fastest way that shows the call's processors what they must see.

    ``pending (B,)`` are the newest tokens; ``looks_up`` tells whether some plan may draft from the rows' texts.
    """
    processors, lockstep = compilable(call.processors), in_lockstep(call.processors)
    runner: Runner
    if call.verifier is Role.TARGET and replays.suit():
        kind = ProposalReplay if lockstep else CycleReplay
        runner = ReplayRunner(replays, cache, call.progress, processors, pending, kind, looks_up)
    else:
        cycle = LockstepCycle if lockstep else Cycle
        runner = EagerRunner(pair, cache, call.progress, processors, pending, cycle, looks_up, call.rule, call.verifier)
    return LockstepCycles(runner, call, clock) if lockstep else JudgedCycles(runner, call, clock)

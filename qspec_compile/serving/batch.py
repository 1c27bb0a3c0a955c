"""The rows of a running batch that decode, and one cycle of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.engine.acceptance import Rule
from quantspec.engine.cycle import Cycle, CycleResult, ShownCycle
from quantspec.engine.cycle_graph import CycleReplay, CycleReplays, ShownReplay
from quantspec.engine.cycles import NAN_LOGITS, NO_DISTRIBUTION, EagerRunner, ReplayRunner, Runner
from quantspec.engine.logits_processors import compilable, merge_processors
from quantspec.engine.plan import Plan
from quantspec.engine.request import Request
from quantspec.pair import Pair

from .requests import FinishReason
from .row import Row

Result = TypeVar("Result")


class Bucket:
    """The first places of the engine's cache, as many as a captured cycle is for.

    Attributes:
        cache: a view of them.
        replays: cycles captured on it.
    """

    def __init__(self, pair: Pair, cache: HierarchicalCache, rule: Rule) -> None:
        self.cache = cache
        self.replays = CycleReplays(pair, rule)
        self.rule = rule
        self.pair = pair


class Batch:
    """Rows that decode together, until one more comes or one leaves; idle places lie between them.

    Attributes:
        requests: of all places of the bucket; those of idle ones have ended.
        width: most tokens of a text.
        matched: 0 for each place that has a row, None for idle ones; nothing is looked up.
        on_host: whether a row needs the host, token by token.
        plan: of the cycle that ran last, as it was run: towards the end of the texts less may be drafted.
        is_new: whether that had to be captured.
        accepted: drafts of each row in it.
    """

    plan: Plan
    is_new: bool
    accepted: list[int]

    def __init__(self, bucket: Bucket, rows: Mapping[int, Row], width: int) -> None:
        """``rows`` by their places, in order; each has a token that is not cached yet."""
        self.width = width
        self.rows = dict(rows)
        self._bucket = bucket
        pair, cache = bucket.pair, bucket.cache
        idle = Request(torch.zeros(0, dtype=torch.int64, device=pair.device), 0, ended=True)
        self.requests: Sequence[Request] = [
            rows[place].request if place in rows else idle for place in range(cache.batch_size)
        ]
        self.matched = [0 if place in rows else None for place in range(cache.batch_size)]
        self.on_host = any(row.on_host for row in rows.values())
        processors = merge_processors([compilable(request.processors) for request in self.requests])
        newest = [request.tokens[-1] if request.tokens else 0 for request in self.requests]
        pending = torch.tensor(newest, device="cpu").to(pair.device)
        self._runner: Runner
        if bucket.replays.suit():
            kind = ShownReplay if self.on_host else CycleReplay
            self._runner = ReplayRunner(bucket.replays, cache, self, processors, pending, kind, False)
        else:
            cycle = ShownCycle if self.on_host else Cycle
            self._runner = EagerRunner(pair, cache, self, processors, pending, cycle, False, bucket.rule)
        self._told: Cycle | None = None

    @property
    def captured(self) -> Collection[Plan] | None:
        """Plans that run without being captured first; None where none is captured."""
        return self._runner.captured

    @property
    def running(self) -> list[bool]:
        """Places whose rows need tokens of the next cycle."""
        return [not request.ended for request in self.requests]

    @property
    def remaining(self) -> int:
        """Most tokens that any row may still emit."""
        return max(request.remaining for request in self.requests)

    @property
    def sequences(self) -> Tensor:
        """``(B, W)`` ids of the texts, zero behind them."""
        texts = [torch.cat((request.prompt, request.prompt.new_tensor(request.tokens))) for request in self.requests]
        ids = texts[0].new_zeros(len(texts), self.width)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        return ids

    @property
    def context_lens(self) -> list[int]:
        """Tokens of each text so far."""
        return [len(request.prompt) + len(request.tokens) for request in self.requests]

    def prepare(self, plan: Plan) -> None:
        """Make ready for a cycle of ``plan``; capture it, if cycles are captured and there is none."""
        self.plan, self.is_new = plan, self._runner.prepare(plan)
        if (cycle := self._runner.cycle) is not self._told:
            cycle.running.copy_(torch.tensor(self.running, device="cpu"))
            self._told = cycle

    def run(self) -> None:
        """Run a cycle: each row emits what it accepts and a token more, or ends by what is wrong with it alone."""
        drafted, self.accepted = self._judge_on_host() if self.on_host else self._judge()
        self.plan = self.plan._replace(num_drafts=drafted)

    def rehearse(self) -> None:
        """Run a cycle of rows that have all ended, which moves nothing, and wait for it."""
        packed = self._runner.proposed().packed if self.on_host else self._runner.judged()
        self._bucket.pair.wait_with_ranks()
        packed.tolist()

    def _judge(self) -> tuple[int, list[int]]:
        """Have the device judge all rows; returns how much was drafted, and of it accepted in each row."""
        judged = self._runner.judged()
        self._bucket.pair.wait_with_ranks()
        result = CycleResult.read(judged)
        if result.flush_due:
            self._runner.flush()
        reports = any(row.logprobs is not None for row in self.rows.values())
        logits = self._runner.logits() if reports else None
        for place, row in self.rows.items():
            verdict = result.accepted[place], result.next_tokens[place], result.fails[place]
            _emit(row, result.drafts[place], *verdict, None if logits is None else logits[place])
        return len(result.drafts[0]), [result.accepted[place] for place in self.rows]

    def _judge_on_host(self) -> tuple[int, list[int]]:
        """Judge rows whose processors need the host there, each by itself, and the others on the device; as above."""
        runner = self._runner
        drafts, logits, *_ = runner.proposed()
        # On a GPU the replay is under way, and nothing has waited for it yet.
        for own in self.rows.values():
            if own.on_host:
                _alone(own, own.follow)
        self._bucket.pair.wait_with_ranks()
        verdict = runner.cycle.acceptance.judge(drafts, logits)
        columns = torch.stack([column.long() for column in verdict[:3]], 1)
        kept = []
        for place, (*drafted, accepted, token, fails) in enumerate(torch.cat((drafts, columns), 1).tolist()):
            row = self.rows.get(place)
            if row is not None and row.on_host:
                accepted = _alone(row, functools.partial(row.walk, drafted, logits[place])) or 0
                token = row.request.tokens[-1]
                row.drafted, row.accepted = row.drafted + len(drafted), row.accepted + accepted
            elif row is not None:
                _emit(row, drafted, accepted, token, fails, logits[place])
            kept.append((accepted, token))
        moved = torch.tensor(kept, device="cpu").to(drafts.device)
        if bool(runner.cycle.keep(moved[:, 0], moved[:, 1])):
            runner.flush()
        return drafts.shape[1], [kept[place][0] for place in self.rows]


def _emit(row: Row, drafts: Sequence[int], accepted: int, next_token: int, fails: int, logits: Tensor | None) -> None:
    """Give a row what the device has judged; ``logits (T + 1, V)`` are needed where it reports log-probabilities."""
    tokens = [*drafts[:accepted], next_token]
    row.drafted += len(drafts)
    if fails and row.request.needs_after(tokens[:accepted]):
        row.end(FinishReason.ERROR, FloatingPointError(NO_DISTRIBUTION if row.request.do_sample else NAN_LOGITS))
    else:
        row.accepted += min(accepted, row.emit(tokens, logits))


def _alone(row: Row, call: Callable[[], Result]) -> Result | None:
    """``call``'s result; None where it fails, which is the end of this row alone, or the row has ended."""
    if row.finish_reason is None:
        try:
            return call()
        except Exception as error:
            row.end(FinishReason.ERROR, error)
    return None

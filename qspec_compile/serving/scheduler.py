"""Which request is in which place, and what is done at the edge of each cycle."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence

import torch

from quantspec.config import DraftAttention
from quantspec.engine.plan import Plan
from quantspec.engine.session import Session

from .batch import Batch, Bucket
from .prefixes import Prefixes
from .requests import EngineStatistics, FinishReason, Output
from .row import Row
from .sizes import Sizes


class Scheduler:
    """Rows of a cache that requests take and leave, and the steps in which they move on; for one thread at a time.

    Attributes:
        waiting: requests without a place, the one that waits longest first.
        last_step: when a step ended last, in seconds of ``time.monotonic``.
    """

    def __init__(self, session: Session, sizes: Sizes) -> None:
        """``session`` is that of the pair, whose weights and rule are used; the cache is a new one."""
        self._session = session
        self._pair = pair = session.pair
        self._sizes = sizes
        self._plan = Plan(sizes.num_drafts)
        self._cache = cache = pair.new_cache(sizes.sequences, sizes.num_drafts)
        cache.reserve(sizes.length)
        self._places = [cache.view(place, 1) for place in range(sizes.sequences)]
        self._buckets = {sizes.sequences: Bucket(pair, cache, session.rule)}
        # Pages of a sparse draft are chosen for the whole cache alone.
        if pair.config.draft_attention is DraftAttention.FULL:
            smaller = [1 << power for power in range(sizes.sequences.bit_length()) if 1 << power < sizes.sequences]
            self._buckets |= {size: Bucket(pair, cache.view(0, size), session.rule) for size in smaller}
        self._batch: Batch | None = None
        self._prefixes = Prefixes(sizes.sequences)
        self._rows: list[Row | None] = [None] * sizes.sequences
        self.waiting: deque[Row] = deque()
        self.last_step = time.monotonic()
        self._finished: Counter[FinishReason] = Counter()
        self._generated = self._prompt_tokens = self._shared_tokens = self._drafts = self._drafted = self._accepted = 0

    @property
    def running(self) -> list[Row]:
        """Rows that hold a place."""
        return [row for row in self._rows if row is not None]

    @torch.no_grad()
    def step(self, cancelled: Collection[int]) -> list[Output]:
        """Drop the requests of these ids, admit, prefill one chunk of one prompt, run one cycle; returns what came."""
        with self._session.exclusive():
            dropped = self._drop(cancelled)
            self._admit()
            self._prefill()
            self._run_cycle()
            rows = self.running
            for row in rows:
                if row.finish_reason is not None:
                    self._leave(row)
        self.last_step = time.monotonic()
        return self._told([*dropped, *rows])

    @torch.no_grad()
    def end_all(self, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        """End every request; returns their last outputs."""
        rows = [*self.waiting, *self.running]
        for row in rows:
            row.end(reason, error)
            self._leave(row)
        self._batch = None
        return self._told(rows)

    def release(self) -> None:
        """Give the cache and what was captured on it back; there are no more steps."""
        self._batch = None
        self._places.clear()
        self._buckets.clear()
        del self._cache

    def statistics(self) -> EngineStatistics:
        """What it has done, and what it is doing; from any thread."""
        running, group = self.running, self._pair.config.kv_group_size
        lengths = [(row.filled or 0) + len(row.request.tokens) for row in running]
        return EngineStatistics(
            running=len(running),
            waiting=len(self.waiting),
            pages_used=sum(-(-length // group) for length in lengths),
            pages_total=self._sizes.sequences * -(-self._sizes.length // group),
            preemptions=0,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._shared_tokens,
            generated_tokens=self._generated,
            drafts=self._drafts,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            finished=dict(self._finished),
        )

    def _drop(self, cancelled: Collection[int]) -> list[Row]:
        """End and return what its callers want no more of."""
        left = [row for row in (*self.waiting, *self.running) if row.id in cancelled]
        for row in left:
            row.end(FinishReason.CANCELLED)
            self._leave(row)
        return left

    def _admit(self) -> None:
        """Give free places to those that wait longest."""
        for place, row in enumerate(self._rows):
            if row is None and self.waiting:
                self._rows[place] = row = self.waiting.popleft()
                row.place = place
                self._prompt_tokens += len(row.request.prompt)

    def _prefill(self) -> None:
        """Cache a chunk of the oldest prompt that is not cached yet; its last one gives the first token."""
        row = min((row for row in self.running if not row.request.tokens), key=lambda row: row.id, default=None)
        if row is None:
            return
        # A failed processor or a full memory is the end of this request alone.
        try:
            self._fill(row)
        except Exception as error:
            row.end(FinishReason.ERROR, error)

    def _fill(self, row: Row) -> None:
        """Cache the next chunk of a prompt, whose place in its text does not depend on the traffic, and share it."""
        assert row.place is not None
        place, prompt = self._places[row.place], row.request.prompt
        first = self._share(row, row.place) if row.filled is None else row.filled
        end = first + self._sizes.chunk
        if len(prompt) - end < self._pair.config.kv_group_size:
            end = len(prompt)
        part = prompt[None, first:end]
        logits = self._pair.fill(part, prompt.new_tensor([part.shape[1]]), place)
        row.filled = end
        if end == len(prompt):
            row.first(logits[0, 0])
            return
        place.settle()
        if row.keys:
            self._prefixes.publish(row.place, row.keys[first // self._sizes.chunk])

    def _share(self, row: Row, place: int) -> int:
        """Let a row begin with what is cached of its prompt; returns how many tokens that is."""
        free = [other for other, running in enumerate(self._rows) if running is None]
        moves, count = self._prefixes.begin(place, row.keys, free)
        for source, target, chunks, exchanges in moves:
            self._places[target].copy_planes(self._places[source], chunks * self._sizes.chunk, exchanges)
        row.shared = count * self._sizes.chunk
        if count:
            self._places[place].resume(row.shared)
        self._shared_tokens += row.shared
        return row.shared

    def _run_cycle(self) -> None:
        """Run a cycle of the rows whose prompts are cached."""
        rows = {row.place: row for row in self.running if row.decodes and row.place is not None}
        if not rows:
            self._batch = None
            return
        before = [(row.drafted, row.accepted) for row in rows.values()]
        try:
            if self._batch is None or self._batch.rows != rows:
                self._batch = self._batch_of(rows)
            self._batch.run()
        # Nobody knows whose fault it is.
        except Exception as error:
            self._batch = None
            for row in rows.values():
                if row.finish_reason is None:
                    row.end(FinishReason.ERROR, error)
        self._drafts += len(rows)
        for row, (drafted, accepted) in zip(rows.values(), before, strict=True):
            self._drafted += row.drafted - drafted
            self._accepted += row.accepted - accepted

    def _batch_of(self, rows: Mapping[int, Row]) -> Batch:
        """Rows by their places in the smallest bucket that has these."""
        bucket = self._buckets[min(size for size in self._buckets if size > max(rows))]
        try:
            return Batch(bucket, rows, self._sizes.length, self._plan)
        except torch.OutOfMemoryError:
            # Captured cycles, which the batch before holds too, are all that can be given back.
            self._batch = None
            for known in self._buckets.values():
                known.replays.clear()
            return Batch(bucket, rows, self._sizes.length, self._plan)

    def _leave(self, row: Row) -> None:
        """Take a row's place, or its turn to get one."""
        if row.place is None:
            self.waiting.remove(row)
        else:
            self._rows[row.place] = None
            # Attention reads nothing of an idle place.
            self._places[row.place].reset()

    def _told(self, rows: Sequence[Row]) -> list[Output]:
        """What the callers of ``rows`` have to be told."""
        outputs = [output for row in rows if (output := row.output()) is not None]
        for output in outputs:
            self._generated += len(output.token_ids)
            if output.finish_reason is not None:
                self._finished[output.finish_reason] += 1
        return outputs

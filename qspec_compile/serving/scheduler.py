"""Which request is in which place, and what is done at the edge of each cycle."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from quantspec.config import DraftAttention
from quantspec.engine.plan import Plan
from quantspec.engine.session import Session
from quantspec.ranks import RanksError

from .batch import Batch, Bucket
from .chunks import Chunks
from .draft_choice import DraftChoice
from .pool import Pool
from .requests import EngineStatistics, FinishReason, Output, Request
from .row import Row
from .sizes import Sizes

# Cycles that are timed of each plan while it is warmed up.
_REHEARSALS = 3


class Scheduler:
    """Rows of a cache that requests take and leave, and the steps in which they move on; for one thread at a time.

    Attributes:
        session: of the pair.
        waiting: requests without a place, the one that waits longest first.
        last_step: when a step ended last, in seconds of ``time.monotonic``.
    """

    def __init__(self, session: Session, sizes: Sizes) -> None:
        """``session`` is that of the pair, whose weights and rule are used; the cache is a new one."""
        self.session = session
        self._pair = pair = session.pair
        self._sizes = sizes
        self._chunks = sizes.chunks if pair.continues else Chunks(sizes.length, sizes.length)
        self._cache = cache = pair.new_cache(sizes.sequences, sizes.num_drafts)
        cache.reserve_pool(sizes.length, sizes.pages)
        self._places = [cache.view(place, 1) for place in range(sizes.sequences)]
        self._buckets = {sizes.sequences: Bucket(pair, cache, session.rule)}
        # Pages of a sparse draft are chosen for the whole cache alone.
        if pair.config.draft_attention is DraftAttention.FULL:
            smaller = [1 << power for power in range(sizes.sequences.bit_length()) if 1 << power < sizes.sequences]
            self._buckets |= {size: Bucket(pair, cache.view(0, size), session.rule) for size in smaller}
        self._drafting = DraftChoice(pair, sizes.draft_counts, self._buckets)
        self._batch: Batch | None = None
        self._pool = Pool(sizes.pages)
        self._group = pair.config.kv_group_size
        self._rows: list[Row | None] = [None] * sizes.sequences
        self.waiting: deque[Row] = deque()
        self.last_step = time.monotonic()
        self._finished: Counter[FinishReason] = Counter()
        self._preemptions = 0
        self._generated = self._prompt_tokens = self._shared_tokens = 0
        self._cycles = self._drafts = self._drafted = self._accepted = 0

    @property
    def running(self) -> list[Row]:
        """Rows that hold a place."""
        return [row for row in self._rows if row is not None]

    def check(self, request: Request) -> None:
        """Refuse what :meth:`add` could not take.

        Raises:
            TypeError: of a pair that is split over ranks: it cannot be sent to them.
        """

    def add(self, row: Row, request: Request) -> None:
        """Let a row wait for its turn; ``request``, which :meth:`check` has seen, is what it was made of."""
        self.waiting.append(row)

    @torch.no_grad()
    def step(self, cancelled: Collection[int]) -> list[Output]:
        """Drop the requests of these ids, admit, prefill some chunks of prompts, run one cycle; returns what came."""
        with self.session.exclusive():
            dropped = self._drop(cancelled)
            self._prefill()
            # Those of them that give way have to be told, too.
            rows = self.running
            self._run_cycle()
            for row in rows:
                if row.finish_reason is not None:
                    self._leave(row)
        self.last_step = time.monotonic()
        return self._told([*dropped, *rows])

    @torch.no_grad()
    def capture(self, row: Row, request: Request) -> None:
        """Capture cycles of every size and plan, where cycles are captured, for rows like ``row``, which has ended.

        ``request`` is what it was made of.
        """
        with self.session.exclusive():
            for size, bucket in sorted(self._buckets.items()):
                if bucket.replays.suit():
                    self._rehearse(size, row)
        # What runs begins anew on them.
        self._batch = None

    def _rehearse(self, size: int, row: Row) -> None:
        """Capture each plan of a bucket, and have the choice know what it takes."""
        seconds = {}
        for plan in self._drafting.plans:
            batch = self._prepare({size - 1: row}, plan)
            if not self._drafting.is_fixed:
                seconds[plan] = min(_seconds_of(batch.rehearse) for _ in range(_REHEARSALS))
        if seconds:
            self._drafting.expect(size, seconds)

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
        return EngineStatistics(
            running=len(self.running),
            waiting=len(self.waiting),
            pages_used=len(self._pool) - self._pool.num_free,
            pages_total=len(self._pool),
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._shared_tokens,
            generated_tokens=self._generated,
            cycles=self._cycles,
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
        """Give a free place to who waits longest, if there are pages for its text and one more.

        One at a time, since one text is cached at a time: so it finds what those before it have cached.
        """
        if not self.waiting or None not in self._rows or any(row.fills for row in self.running):
            return
        row, group, pool = self.waiting[0], self._group, self._pool
        shared = pool.find(row.keys)
        # A chunk that is not there as a whole is read as a whole.
        del shared[self._sizes.chunks.last_end(len(shared) * group) // group :]
        new = row.num_pages(group) - len(shared)
        if not pool.has_room(shared, new + 1):
            return
        self.waiting.popleft()
        row.place = place = self._rows.index(None)
        self._rows[place] = row
        self._drafting.forget(place)
        pool.share(shared)
        row.pages, row.filled = shared, len(shared) * group
        self._cache.set_blocks(place, 0, shared)
        self._hold(row, new)
        row.lengths = self._places[place].resume(row.filled)
        if row.shared is None:
            row.shared = row.filled
            self._prompt_tokens += len(row.request.prompt)
            self._shared_tokens += row.shared

    def _hold(self, row: Row, count: int) -> None:
        """Give a row ``count`` more pages."""
        assert row.place is not None
        new = self._pool.take(count)
        self._cache.set_blocks(row.place, len(row.pages), new)
        row.pages += new

    def _prefill(self) -> None:
        """Cache chunks of texts, one text after another; the last one of a prompt gives the first token."""
        shortest, longest = self._sizes.chunks
        left = longest
        while left > 0:
            if left < longest:
                # Who is admitted waits for the device, and that for a rank which may have ended.
                self._pair.wait_with_ranks()
            self._admit()
            row = next((row for row in self.running if row.fills), None)
            if row is None:
                return
            part = row.part(self._chunks, self._group)
            # A short text takes the host as long as a first chunk, and a last chunk has up to a group more.
            taken = max(shortest, len(part))
            if left < longest and taken > left + self._group:
                return
            # A failed processor or a full memory is the end of this request alone.
            try:
                self._fill(row, part)
            except RanksError:
                raise
            except Exception as error:
                row.end(FinishReason.ERROR, error)
                return
            left -= taken

    def _fill(self, row: Row, part: Tensor) -> None:
        """Cache the next ``part (n,)`` of a text, and let the pages of a chunk be found."""
        assert row.place is not None
        assert row.lengths is not None
        place, prompt, group = self._places[row.place], row.request.prompt, self._group
        if row.filled and not self._pair.continues:
            # What a preempted row has emitted; more tokens at once would begin anew.
            part = part[:1]
        self._drafting.interrupt()
        logits = self._pair.fill(part[None], [len(part)], place, row.lengths, compiled=True)
        first, row.filled = row.filled, row.filled + len(part)
        if row.filled < len(prompt):
            place.settle()
            row.lengths.settle(group)
            new = slice(first // group, row.filled // group)
            for page, key in zip(row.pages[new], row.keys[new], strict=False):
                self._pool.publish(page, key)
        elif not row.request.tokens:
            self._pair.wait_with_ranks()
            row.first(logits[0, 0])

    def _provide(self) -> None:
        """Have a page at hand for every row that may fill one; where none is free, who has the fewest tokens gives way.

        It waits for its turn to be cached again.
        """
        group, ahead = self._group, self._sizes.num_drafts + 1
        for row in sorted((row for row in self.running if row.decodes), key=lambda row: row.id):
            pages = row.num_pages(group)
            if len(row.pages) > pages or row.filled + ahead < (pages + 2) * group:
                continue
            while row.place is not None and not self._pool.num_free:
                left = (other for other in self.running if other.finish_reason is None)
                self._preempt(min(left, key=lambda other: (len(other.request.tokens), -other.id)))
            if row.place is not None:
                self._hold(row, 1)

    def _preempt(self, row: Row) -> None:
        self._vacate(row)
        self.waiting.appendleft(row)
        self._preemptions += 1

    def _run_cycle(self) -> None:
        """Run a cycle of the rows whose texts are cached."""
        self._provide()
        rows = {row.place: row for row in self.running if row.decodes and row.place is not None}
        if not rows:
            self._forget_batch()
            return
        before = [(row.drafted, row.accepted) for row in rows.values()]
        try:
            self._run(rows)
        # Nobody knows whose fault it is.
        except Exception as error:
            self._forget_batch()
            for row in rows.values():
                if row.finish_reason is None:
                    row.end(FinishReason.ERROR, error)
        for row in rows.values():
            row.advance(self._group)
        self._cycles += len(rows)
        for row, (drafted, accepted) in zip(rows.values(), before, strict=True):
            self._drafts += row.drafted > drafted
            self._drafted += row.drafted - drafted
            self._accepted += row.accepted - accepted

    def _run(self, rows: Mapping[int, Row]) -> None:
        """Run a cycle of rows by their places, of the plan that is chosen for them."""
        plan = self._drafting.choose(self._prepare(rows))
        start = time.perf_counter()
        batch = self._prepare(rows, plan)
        preparing = time.perf_counter() - start
        batch.run()
        self._drafting.record(batch, preparing)

    def _prepare(self, rows: Mapping[int, Row], plan: Plan | None = None) -> Batch:
        """A batch of rows by their places in the smallest bucket that has these, ready for a cycle of ``plan``."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._batch_of(rows, plan)
        # Captured cycles, which the batch before holds too, are all that can be given back.
        self._forget_batch()
        for known in self._buckets.values():
            known.replays.clear()
        return self._batch_of(rows, plan)

    def _batch_of(self, rows: Mapping[int, Row], plan: Plan | None) -> Batch:
        if self._batch is None or self._batch.rows != rows:
            self._forget_batch()
            bucket = self._buckets[min(size for size in self._buckets if size > max(rows))]
            self._batch = Batch(bucket, rows, self._sizes.length)
        if plan is not None:
            self._batch.prepare(plan)
        return self._batch

    def _forget_batch(self) -> None:
        """Nothing goes on as it did."""
        self._batch = None
        self._drafting.interrupt()

    def _leave(self, row: Row) -> None:
        """Take a row's place, or its turn to get one."""
        if row.place is None:
            self.waiting.remove(row)
        else:
            self._vacate(row)

    def _vacate(self, row: Row) -> None:
        """Take a row's place and pages."""
        assert row.place is not None
        self._rows[row.place] = None
        # Attention reads nothing of an idle place.
        self._places[row.place].reset()
        self._pool.release(row.pages)
        row.place, row.pages, row.lengths = None, [], None

    def _told(self, rows: Sequence[Row]) -> list[Output]:
        """What the callers of ``rows`` have to be told."""
        outputs = [output for row in rows if (output := row.output()) is not None]
        for output in outputs:
            self._generated += len(output.token_ids)
            if output.finish_reason is not None:
                self._finished[output.finish_reason] += 1
        return outputs


def _seconds_of(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

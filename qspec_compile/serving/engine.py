"""The engine: requests join and leave a running batch at the edges of its cycles."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch

from quantspec.config import Draft, DraftAttention, check_num_speculative_tokens
from quantspec.engine.plan import Plan
from quantspec.errors import QueueFullError
from quantspec.memory import expected_memory
from quantspec.model import QuantSpecModel
from quantspec.pair import Pair

from .admission import check_logprobs, prepare
from .batch import Batch, Bucket
from .delivery import Delivery
from .prefixes import Prefixes, chunk_keys
from .requests import EngineStatistics, FinishReason, Output, Request
from .row import Row

# Tokens of a sequence on a CPU, if nobody says.
_LENGTH_ON_CPU = 8192


class Engine:
    """Runs the requests of many callers on one pair.

    A step takes what is new at the edge of a cycle: requests that were cancelled leave, waiting ones take their places,
    one chunk of one prompt is prefilled, and the rows that have their prompts run one cycle. What a request gets does
    not depend on what runs beside it, but for the rounding of larger matrix products: its chunks begin where its own
    text says, its randomness is its seed's, and its failures are its own.

    Attributes:
        pair: whose weights and captured graphs it uses, by turns with ``generate``.
        max_sequences, max_length: as given or found.
    """

    def __init__(
        self,
        pair: QuantSpecModel,
        *,
        tokenizer: Any = None,
        max_sequences: int = 8,
        max_length: int | None = None,
        max_waiting: int = 1024,
        max_num_batched_tokens: int = 1024,
        gpu_memory_utilization: float = 0.9,
        num_speculative_tokens: int | None = None,
    ) -> None:
        """An engine without requests; its cache is allocated here.

        Args:
            pair: a converted model, which drafts by itself (``draft="self"``).
            tokenizer: of the model; needed for requests with a ``json_schema``, ``regex`` or ``grammar``.
            max_sequences: requests that run at once.
            max_length: most tokens of a request, prompt and output. If None, as many as ``gpu_memory_utilization``
                leaves room for, on a CPU 8,192; at most the pair's ``max_cache_len``.
            max_waiting: requests that may wait; more are refused.
            max_num_batched_tokens: tokens of a prompt that are prefilled between two cycles, in whole KV groups; the
                last chunk has up to a group more. A prompt shares with earlier ones as many whole chunks as they begin
                alike.
            gpu_memory_utilization: share of a GPU's memory that weights and cache may take.
            num_speculative_tokens: tokens drafted per cycle; the pair's own number if None.

        Raises:
            TypeError, ValueError: an option that cannot be honoured.
            torch.OutOfMemoryError: there is no room for the cache.
        """
        if not isinstance(pair, QuantSpecModel):
            raise TypeError(f"pair must be a model that quantspec.convert() returned, not {type(pair).__name__}")
        for name, value in (
            ("max_sequences", max_sequences),
            ("max_waiting", max_waiting),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            _check_positive(name, value)
        if isinstance(gpu_memory_utilization, bool) or not isinstance(gpu_memory_utilization, int | float):
            raise TypeError(f"gpu_memory_utilization must be a number, not {gpu_memory_utilization!r}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {gpu_memory_utilization}")
        self.pair = pair
        self.max_sequences = max_sequences
        self._plan = Plan(_num_drafts(pair, num_speculative_tokens))
        self._inner = inner = pair.pair
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._group = group = pair.config.kv_group_size
        if max_num_batched_tokens < group:
            raise ValueError(
                f"max_num_batched_tokens must be at least kv_group_size={group} of the pair, not "
                f"{max_num_batched_tokens}"
            )
        self._chunk = max_num_batched_tokens // group * group
        if max_length is None:
            max_length = _fitting_length(inner, max_sequences, self._plan.num_drafts, gpu_memory_utilization)
        else:
            _check_positive("max_length", max_length)
        if max_length > inner.max_len:
            raise ValueError(f"max_length={max_length} is more than the pair's max_cache_len={inner.max_len}")
        self.max_length: int = max_length
        self._cache = inner.new_cache(max_sequences, self._plan.num_drafts)
        self._cache.reserve(max_length)
        self._places = [self._cache.view(place, 1) for place in range(max_sequences)]
        sizes = [1 << power for power in range(max_sequences.bit_length()) if 1 << power < max_sequences]
        if pair.config.draft_attention is not DraftAttention.FULL:
            # Pages are chosen for the whole cache alone.
            sizes = []
        self._buckets = {size: Bucket(inner, self._cache.view(0, size), pair.session.rule) for size in sizes} | {
            max_sequences: Bucket(inner, self._cache, pair.session.rule)
        }
        self._batch: Batch | None = None

        self._prefixes = Prefixes(max_sequences)
        self._rows: list[Row | None] = [None] * max_sequences
        self._waiting: deque[Row] = deque()
        self._cancelled: deque[int] = deque()
        self._ids = itertools.count()
        self._finished: Counter[FinishReason] = Counter()
        self._generated = self._prompt_tokens = self._shared_tokens = self._drafts = self._drafted = self._accepted = 0

        self._turn = _Turn()
        self._delivery = Delivery(max_waiting)
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False
        self._heartbeat = time.monotonic()

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; returns its id. From any thread.

        Raises:
            TypeError, ValueError, CacheFullError: it cannot be honoured; the error names the fix.
            QueueFullError: ``max_waiting`` requests wait.
            RuntimeError: the engine is closed.
        """
        return self._add(request, None)

    def _add(self, request: Request, listener: Callable[[Output], None] | None) -> int:
        with self._turn():
            if self._closed:
                raise RuntimeError("the engine is closed; make another one")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already (max_waiting={self._max_waiting}); try again later"
                )
            self._inner.check_unmoved()
            prepared = prepare(self._inner, request, self._tokenizer, self.max_length)
            # States are not kept for other prompts.
            shares = not self._inner.captured.states
            keys = chunk_keys(prepared.prompt.tolist(), self._chunk, self._group, request.salt) if shares else []
            row = Row(next(self._ids), prepared, check_logprobs(request.options.get("logprobs")), keys)
            self._delivery.expect(row.id, listener)
            self._waiting.append(row)
        self._wake.set()
        return row.id

    def step(self) -> list[Output]:
        """Drop what was cancelled, admit, prefill one chunk of one prompt, run one cycle; returns what came of it.

        One output for each request that got tokens or ended.
        """
        with self._turn():
            outputs = self._step()
        for output in outputs:
            if output.finish_reason is not None:
                self._delivery.forget(output.id)
        return outputs

    @torch.no_grad()
    def _step(self) -> list[Output]:
        with self.pair.session.exclusive():
            dropped = self._drop_cancelled()
            self._admit()
            self._prefill()
            self._run_cycle()
            rows = self._running()
            for row in rows:
                if row.finish_reason is not None:
                    self._leave(row)
        self._heartbeat = time.monotonic()
        return self._told([*dropped, *rows])

    def _drop_cancelled(self) -> list[Row]:
        """End and return what its callers want no more of."""
        ids = set()
        while self._cancelled:
            ids.add(self._cancelled.popleft())
        left = [row for row in (*self._waiting, *self._running()) if row.id in ids]
        for row in left:
            row.end(FinishReason.CANCELLED)
            self._leave(row)
        return left

    def _admit(self) -> None:
        """Give free places to those that wait longest."""
        for place, row in enumerate(self._rows):
            if row is None and self._waiting:
                self._rows[place] = row = self._waiting.popleft()
                row.place = place
                self._prompt_tokens += len(row.request.prompt)

    def _prefill(self) -> None:
        """Cache a chunk of the oldest prompt that is not cached yet; its last one gives the first token."""
        row = min((row for row in self._running() if not row.request.tokens), key=lambda row: row.id, default=None)
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
        end = first + self._chunk
        if len(prompt) - end < self._group:
            end = len(prompt)
        part = prompt[None, first:end]
        logits = self._inner.fill(part, prompt.new_tensor([part.shape[1]]), place)
        row.filled = end
        if end == len(prompt):
            row.first(logits[0, 0])
            return
        place.settle()
        if row.keys:
            self._prefixes.publish(row.place, row.keys[first // self._chunk])

    def _share(self, row: Row, place: int) -> int:
        """Let a row begin with what is cached of its prompt; returns how many tokens that is."""
        free = [other for other, running in enumerate(self._rows) if running is None]
        moves, count = self._prefixes.begin(place, row.keys, free)
        for source, target, chunks, exchanges in moves:
            self._places[target].copy_planes(self._places[source], chunks * self._chunk, exchanges)
        row.shared = count * self._chunk
        if count:
            self._places[place].resume(row.shared)
        self._shared_tokens += row.shared
        return row.shared

    def _run_cycle(self) -> None:
        """Run a cycle of the rows whose prompts are cached."""
        rows = {row.place: row for row in self._running() if row.decodes and row.place is not None}
        if not rows:
            self._batch = None
            return
        before = [(row.drafted, row.accepted) for row in rows.values()]
        try:
            if self._batch is None or self._batch.rows != rows:
                bucket = self._buckets[min(size for size in self._buckets if size > max(rows))]
                self._batch = Batch(bucket, rows, self.max_length)
            self._batch.run(self._plan)
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

    def _running(self) -> list[Row]:
        """Rows that hold a place."""
        return [row for row in self._rows if row is not None]

    def _leave(self, row: Row) -> None:
        """Take a row's place, or its turn to get one."""
        if row.place is None:
            self._waiting.remove(row)
        else:
            self._rows[row.place] = None
            # Attention reads nothing of an idle place.
            self._places[row.place].reset()

    def cancel(self, id: int) -> None:
        """Have a request end with the next step, as ``FinishReason.CANCELLED``; from any thread.

        Nothing happens to one that has ended.
        """
        self._cancelled.append(id)
        self._wake.set()

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Run requests to their ends, beside those of others; returns the outputs of each.

        Raises:
            As :meth:`add`; those that were added are cancelled.
        """
        outputs: list[list[Output]] = [[] for _ in requests]
        new: queue.SimpleQueue[Output] = queue.SimpleQueue()
        left = deque(enumerate(requests))
        running: dict[int, int] = {}
        self._start()
        try:
            while left or running:
                try:
                    while left:
                        running[self._add(left[0][1], new.put)] = left[0][0]
                        left.popleft()
                except QueueFullError:
                    if not running:
                        raise
                output = new.get()
                outputs[running[output.id]].append(output)
                if output.finish_reason is not None:
                    del running[output.id]
        finally:
            for id in running:
                self.cancel(id)
        return outputs

    async def stream(self, request: Request | int) -> AsyncIterator[Output]:
        """The outputs of a request, or of one that was added, as they come; the last has a ``finish_reason``.

        A thread of the engine's takes the steps. Whoever leaves the iterator early (``aclose``, or a cancelled task)
        cancels the request. Its own later failure comes as the last output's ``error``.

        Raises:
            ValueError: no request of this id is there.
            As :meth:`add`: before the first output.
        """
        loop, new = asyncio.get_running_loop(), asyncio.Queue[Output]()

        def listen(output: Output) -> None:
            try:
                loop.call_soon_threadsafe(new.put_nowait, output)
            except RuntimeError:
                # The loop is closed.
                self.cancel(output.id)

        self._start()
        if isinstance(request, int):
            id = request
            self._delivery.attach(id, listen)
        else:
            adding = loop.run_in_executor(None, self._add, request, listen)
            try:
                id = await asyncio.shield(adding)
            except asyncio.CancelledError:
                adding.add_done_callback(lambda added: None if added.exception() else self.cancel(added.result()))
                raise
        try:
            while True:
                output = await new.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self.cancel(id)

    def _start(self) -> None:
        """Have a thread take the steps from now on."""
        with self._turn():
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name="quantspec engine", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        """What the thread does."""
        while not self._closed:
            if not self._busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                with self._turn():
                    outputs = self._step()
            # Those that run cannot go on, and the next ones may.
            except Exception as error:
                outputs = self._end_all(FinishReason.ERROR, error)
            for output in outputs:
                self._delivery.deliver(output)

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._cancelled or self._running())

    @property
    def heartbeat(self) -> float:
        """When a step ended last, or now if there is nothing to do, in seconds of ``time.monotonic``."""
        return self._heartbeat if self._busy else time.monotonic()

    def statistics(self) -> EngineStatistics:
        """What it has done, and what it is doing. From any thread."""
        running, group_size = self._running(), self._group
        lengths = [(row.filled or 0) + len(row.request.tokens) for row in running]
        return EngineStatistics(
            running=len(running),
            waiting=len(self._waiting),
            pages_used=sum(-(-length // group_size) for length in lengths),
            pages_total=self.max_sequences * -(-self.max_length // group_size),
            preemptions=0,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._shared_tokens,
            generated_tokens=self._generated,
            drafts=self._drafts,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            finished=dict(self._finished),
        )

    def close(self) -> None:
        """Cancel all requests, end the thread and give the cache back; nothing can be added from here on."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for output in self._end_all(FinishReason.CANCELLED):
            self._delivery.deliver(output)
        self._batch = None
        self._places.clear()
        self._buckets.clear()
        del self._cache

    def _end_all(self, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        """End every request; returns their last outputs."""
        with self._turn():
            rows = [*self._waiting, *self._running()]
            for row in rows:
                row.end(reason, error)
                self._leave(row)
            return self._told(rows)

    def _told(self, rows: Sequence[Row]) -> list[Output]:
        """What the callers of ``rows`` have to be told."""
        outputs = [output for row in rows if (output := row.output()) is not None]
        for output in outputs:
            self._generated += len(output.token_ids)
            if output.finish_reason is not None:
                self._finished[output.finish_reason] += 1
        return outputs


class _Turn:
    """A lock whose holder cannot take it again before those who wait: a step follows the other at once."""

    def __init__(self) -> None:
        self._door, self._lock = threading.Lock(), threading.Lock()
        self._holder: int | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold it.

        Raises:
            RuntimeError: this thread holds it already.
        """
        if self._holder == threading.get_ident():
            raise RuntimeError("the engine is in a step: a logits processor cannot call it; do so after the step")
        with self._door:
            self._lock.acquire()
        try:
            self._holder = threading.get_ident()
            yield
        finally:
            self._holder = None
            self._lock.release()


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _num_drafts(pair: QuantSpecModel, asked: int | None) -> int:
    """Tokens drafted per cycle."""
    if pair.config.draft is not Draft.SELF:
        raise ValueError(
            f"an engine drafts with the pair itself, not by draft={pair.config.draft.value!r}: convert with draft='self'"
        )
    count = pair.config.num_speculative_tokens if asked is None else asked
    check_num_speculative_tokens(count)
    if isinstance(count, str):
        raise ValueError(f"an engine drafts a fixed number of tokens, not {count!r}: pass num_speculative_tokens=4")
    return count


def _fitting_length(pair: Pair, max_sequences: int, num_drafts: int, utilization: float) -> int:
    """Most tokens that each of so many sequences can have."""
    if pair.device.type != "cuda":
        return min(pair.max_len, _LENGTH_ON_CPU)
    free, total = torch.cuda.mem_get_info(pair.device)
    cached = torch.cuda.memory_reserved(pair.device) - torch.cuda.memory_allocated(pair.device)
    room = free + cached - (1 - utilization) * total

    def fits(groups: int) -> bool:
        needed = expected_memory(
            pair.layers,
            min(groups * pair.config.kv_group_size, pair.max_len),
            max_sequences,
            kv_group_size=pair.config.kv_group_size,
            num_speculative_tokens=num_drafts,
            dtype=pair.model.dtype,
            max_cache_len=pair.max_len,
            device=pair.device,
            states=pair.captured.states,
        )
        return sum(needed.values()) <= room

    groups = range(1, -(-pair.max_len // pair.config.kv_group_size) + 1)
    fitting = bisect.bisect_left(groups, True, key=lambda count: not fits(count))
    if fitting == 0:
        raise ValueError(
            f"gpu_memory_utilization={utilization} leaves no room for {max_sequences} sequences beside the weights; "
            "pass more of it, or fewer max_sequences"
        )
    return min(fitting * pair.config.kv_group_size, pair.max_len)

"""The engine: requests join and leave a running batch at the edges of its cycles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from quantspec.errors import QueueFullError
from quantspec.model import QuantSpecModel

from .admission import check, prepare
from .delivery import Delivery, into
from .pool import page_keys
from .requests import EngineStatistics, FinishReason, Output, Request
from .row import Row
from .scheduler import Scheduler
from .sizes import Sizes, check_options
from .split_scheduler import SplitScheduler

_logger = logging.getLogger(__name__)

# Generated to warm up: enough for cycles.
_WARM_UP_TOKENS = 8


class Engine:
    """Runs the requests of many callers on one pair.

    A step takes what is new at the edge of a cycle: requests that were cancelled leave, waiting ones take their places,
    chunks of prompts are prefilled, one prompt after another, and the rows that have their prompts run one cycle. What
    a request gets does not depend on what runs beside it, but for the rounding of larger matrix products: its chunks
    begin where its own text says, its randomness is its seed's, and its failures are its own.

    Attributes:
        pair: whose weights and captured graphs it uses, by turns with ``generate``.
        max_sequences, max_length, num_pages: as given or found.
    """

    def __init__(
        self,
        pair: QuantSpecModel,
        *,
        tokenizer: Any = None,
        max_sequences: int = 8,
        max_length: int | None = None,
        max_waiting: int = 1024,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        num_speculative_tokens: int | str | None = None,
        num_pages: int | None = None,
    ) -> None:
        """An engine without requests; its cache is allocated here.

        Args:
            pair: a converted model, which drafts by itself (``draft="self"``).
            tokenizer: of the model; needed for requests with a ``json_schema``, ``regex`` or ``grammar``.
            max_sequences: requests that run at once.
            max_length: most tokens of a request, prompt and output. If None, the pair's ``max_cache_len``, on a CPU
                at most 8,192; less where all pages hold less.
            max_waiting: requests that may wait, beside those that the next step may give a place; more are refused.
            max_num_batched_tokens: tokens of prompts that are prefilled between two cycles. If None, 4,096 on a GPU
                and 1,024 on a CPU. A prompt's chunks end at 1,024 tokens, 2,048, 4,096 and so on, none longer than
                this, in whole KV groups; the last one has up to a group more. A prompt shares with earlier ones as many
                whole chunks as they begin alike.
            gpu_memory_utilization: share of a GPU's memory that weights and cache may take.
            num_speculative_tokens: tokens drafted per cycle. With ``"auto"`` none, the pair's own number (4 if that is
                None, ``"auto"`` or 0) or half of it: for each size of the batch what its measured cycles and the
                acceptance of its requests make fastest. None is the number that the pair was converted with, else
                ``"auto"``, or 4 for a pair with ``rejection_sampling``.
            num_pages: pages of ``kv_group_size`` tokens that all requests share. If None, as many as ``max_sequences``
                of ``max_length`` can use or, on a GPU, as there is room for.

        Raises:
            TypeError, ValueError: an option that cannot be honoured.
            torch.OutOfMemoryError: there is no room for the cache.
            RanksError: of a pair split over ranks: one of them failed or was ended.
        """
        if not isinstance(pair, QuantSpecModel):
            raise TypeError(f"pair must be a model that quantspec.convert() returned, not {type(pair).__name__}")
        options: dict[str, Any] = {
            "max_sequences": max_sequences,
            "max_length": max_length,
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
            "num_speculative_tokens": num_speculative_tokens,
            "num_pages": num_pages,
        }
        check_options({**options, "max_waiting": max_waiting})
        sizes = Sizes.of(pair, **options)
        self.pair = pair
        self.max_sequences, self.max_length, self._chunks = sizes.sequences, sizes.length, sizes.chunks
        self.num_pages = sizes.pages
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._num_ids = 0
        # Requests that have waited for no step yet.
        self._num_unseen = 0
        self._cancelled: deque[int] = deque()
        if pair.split is None:
            self._scheduler = Scheduler(pair.session, sizes)
        else:
            self._scheduler = SplitScheduler(pair.split, pair.session, sizes, tokenizer)
        self._turn = _Turn()
        self._delivery = Delivery(max_waiting, self.cancel)
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False
        self._failure: BaseException | None = None

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; returns its id. From any thread.

        Raises:
            TypeError, ValueError, CacheFullError: it cannot be honoured; the error names the fix.
            QueueFullError: ``max_waiting`` requests wait.
            RuntimeError: the engine is closed, or lost.
        """
        return self._add([request], None)[0]

    def subscribe(self, requests: Sequence[Request], listener: Callable[[Output], None]) -> list[int]:
        """Add requests, all of them or none; returns their ids. From any thread.

        A thread of the engine's takes the steps, and calls ``listener`` with each output as it comes, perhaps before
        this returns. All requests wait for a listener, which may :meth:`cancel`, but neither add requests nor close the
        engine; where it raises, the request ends.

        Raises:
            As :meth:`add`.
        """
        ids = self._add(requests, listener)
        if ids:
            self._start()
        return ids

    def _add(self, requests: Sequence[Request], listener: Callable[[Output], None] | None) -> list[int]:
        self._check_caller()
        self._check_room(len(requests))
        # Only what needs the device has to wait for a step.
        inner = self.pair.pair
        inner.check_unmoved()
        # States are not kept for other prompts.
        shares = not inner.captured.states
        all_checked = [check(inner, request, self._tokenizer, self.max_length) for request in requests]
        all_keys = [
            page_keys(checked.tokens, self._chunks, inner.config.kv_group_size, request.salt) if shares else []
            for checked, request in zip(all_checked, requests, strict=True)
        ]
        with self._turn():
            self._check_open()
            self._check_room(len(requests))
            rows = [
                Row(id, prepare(inner, checked), checked.logprobs, keys)
                for id, (checked, keys) in enumerate(zip(all_checked, all_keys, strict=True), self._num_ids)
            ]
            self._num_ids += len(rows)
            self._num_unseen += len(rows)
            if not self._busy:
                self._scheduler.last_step = time.monotonic()
            for request in requests:
                self._scheduler.check(request)
            for row, request in zip(rows, requests, strict=True):
                self._delivery.expect(row.id, listener)
                self._scheduler.add(row, request)
        self._wake.set()
        return [row.id for row in rows]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make another one")
        if self._failure is not None:
            raise _lost(self._failure) from self._failure

    def _check_room(self, count: int) -> None:
        most = self.max_sequences + self._max_waiting
        if count > most:
            raise ValueError(
                f"{count} requests at once are more than max_sequences={self.max_sequences} and "
                f"max_waiting={self._max_waiting} together; add fewer"
            )
        waiting = len(self._scheduler.waiting)
        # A step may give as many a place.
        free = self.max_sequences - len(self._scheduler.running)
        if waiting + count - min(self._num_unseen + count, free) > self._max_waiting:
            more = "" if count == 1 else f", and {count} more are too many"
            raise QueueFullError(
                f"{waiting} requests wait already{more} (max_waiting={self._max_waiting}); try again later"
            )

    def _check_caller(self) -> None:
        if self._delivery.calls_here:
            raise RuntimeError("a listener cannot add requests, step or close the engine; let another thread do so")

    def step(self) -> list[Output]:
        """Drop what was cancelled, admit, prefill chunks of prompts, run one cycle; returns what came of it.

        One output for each request that got tokens or ended.

        Raises:
            RuntimeError: the engine takes its steps itself.
        """
        self._check_caller()
        with self._turn():
            if self._thread is not None:
                self._check_open()
                raise RuntimeError(
                    "the engine takes its steps itself since generate(), stream() or subscribe() was called; "
                    "read what comes of a request by stream(id)"
                )
            outputs = self._step()
        for output in outputs:
            if output.finish_reason is not None:
                self._delivery.forget(output.id)
        return outputs

    def _step(self) -> list[Output]:
        cancelled = set()
        while self._cancelled:
            cancelled.add(self._cancelled.popleft())
        self._num_unseen = 0
        return self._scheduler.step(cancelled)

    def warm_up(self) -> None:
        """Compile and capture what requests need, so that none waits for it: prefill, and cycles of every size.

        A text with a chunk of every length is read and a few tokens are generated. Cycles are those of a request
        without options. Those with other processors, or that sample where the model is greedy by default, are captured
        when they come.

        Raises:
            RuntimeError: requests wait or run, or the engine is closed or lost.
            Exception: whatever ended the request, such as logits that are NaN.
        """
        pair = self.pair.pair
        new = min(_WARM_UP_TOKENS, self.max_length - 1)
        # A CPU compiles nothing for prompts, and would take its time to read one.
        length = 2 * self._chunks.longest + pair.config.kv_group_size if pair.device.type == "cuda" else 1
        request = Request([0] * min(length, self.max_length - new), new, ())
        checked = check(pair, request, self._tokenizer, self.max_length)
        with self._turn():
            self._check_open()
            if self._busy:
                raise RuntimeError("the engine has requests; warm it up before the first one")
            row = Row(self._num_ids, prepare(pair, checked), None, ())
            self._num_ids += 1
            self._scheduler.add(row, request)
            while self._busy:
                self._step()
            if row.error is not None:
                raise row.error
            self._scheduler.capture(row, request)

    def cancel(self, id: int) -> None:
        """Have a request end with the next step, as ``FinishReason.CANCELLED``; from any thread.

        Nothing happens to one that has ended, or that nobody has added.
        """
        if id < self._num_ids:
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
                        running[self._add([left[0][1]], new.put)[0]] = left[0][0]
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
        new = asyncio.Queue[Output]()
        listen = into(new, self.cancel)
        self._start()
        if isinstance(request, int):
            id = request
            self._delivery.attach(id, listen)
        else:
            adding = asyncio.get_running_loop().run_in_executor(None, self._add, [request], listen)
            try:
                (id,) = await asyncio.shield(adding)
            except asyncio.CancelledError:
                adding.add_done_callback(lambda added: None if added.exception() else self.cancel(added.result()[0]))
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
        if self._thread is not None:
            return
        with self._turn():
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name="quantspec engine", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        """What the thread does."""
        try:
            self._take_steps()
        # Such as a device that fails whatever it is asked: nobody else takes the steps.
        except BaseException as error:
            with self._turn():
                self._failure = error
            _logger.error("the engine has ended", exc_info=error)
            self._delivery.fail(_lost(error))

    def _take_steps(self) -> None:
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
        return bool(self._scheduler.waiting or self._scheduler.running or self._cancelled)

    @property
    def num_tokens(self) -> int:
        """Tokens that there is room for, of all requests together."""
        return (self.num_pages + self.max_sequences) * self.pair.config.kv_group_size

    @property
    def heartbeat(self) -> float:
        """When a step ended last, or now if there is nothing to do, in seconds of ``time.monotonic``."""
        return self._scheduler.last_step if self._busy else time.monotonic()

    @property
    def loss(self) -> str | None:
        """Why no request can be answered any more: what ended the thread that took the steps, or the ranks; or None."""
        if self._failure is not None:
            return repr(self._failure)
        return None if self.pair.split is None else self.pair.split.ranks.cause

    def statistics(self) -> EngineStatistics:
        """What it has done, and what it is doing. From any thread."""
        return self._scheduler.statistics()

    def close(self) -> None:
        """Cancel all requests, end the thread and give the cache back; nothing can be added from here on."""
        self._check_caller()
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._failure is None:
            for output in self._end_all(FinishReason.CANCELLED):
                self._delivery.deliver(output)
        self._scheduler.release()

    def _end_all(self, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        with self._turn():
            return self._scheduler.end_all(reason, error)


def _lost(failure: BaseException) -> RuntimeError:
    return RuntimeError(f"the engine has ended by {failure!r}; make another one")


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

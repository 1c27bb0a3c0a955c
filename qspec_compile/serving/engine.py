"""The engine: requests join and leave a running batch at the edges of its cycles."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from quantspec.model import QuantSpecModel

from .requests import EngineStatistics, Output, Request


class Engine:
    """Runs the requests of many callers on one pair."""

    def __init__(
        self,
        pair: QuantSpecModel,
        *,
        tokenizer: Any = None,
        max_sequences: int = 8,
        max_length: int | None = None,
        max_waiting: int = 1024,
    ) -> None:
        """An engine without requests; its cache is allocated here.

        Args:
            pair: a converted model.
            tokenizer: of the model; needed for requests with a ``json_schema``, ``regex`` or ``grammar``.
            max_sequences: requests that run at once.
            max_length: most tokens of a request, prompt and output; the pair's ``max_cache_len`` if None.
            max_waiting: requests that may wait; more are refused.
        """
        raise NotImplementedError

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; returns its id. From any thread.

        Raises:
            TypeError, ValueError, CacheFullError: it cannot be honoured; the error names the fix.
            QueueFullError: ``max_waiting`` requests wait.
            RuntimeError: the engine is closed.
        """
        raise NotImplementedError

    def step(self) -> list[Output]:
        """Drop what was cancelled, admit, prefill one chunk of one prompt, run one cycle; returns what came of it.

        One output for each request that got tokens or ended.
        """
        raise NotImplementedError

    def cancel(self, id: int) -> None:
        """Have a request end with the next step, as ``FinishReason.CANCELLED``; one that has ended stays. Any thread."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Run requests to their ends; returns the outputs of each."""
        raise NotImplementedError

    def stream(self, request: Request | int) -> AsyncIterator[Output]:
        """The outputs of a request, or of one that was added, as they come; ends with that which has a
        ``finish_reason``.

        A thread of the engine's takes the steps. Whoever leaves the iterator early (``aclose``, or a cancelled task)
        cancels the request. Errors of :meth:`add` are raised here, before any output; a request's own later ones come
        as its last output's ``error``.
        """
        raise NotImplementedError

    @property
    def heartbeat(self) -> float:
        """When a step ended last, or there was nothing to do, in seconds of ``time.monotonic``."""
        raise NotImplementedError

    def statistics(self) -> EngineStatistics:
        """What it has done, and what it is doing. From any thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel all requests, end the thread and give the cache back; nothing can be added from here on."""
        raise NotImplementedError

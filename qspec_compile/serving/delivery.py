"""Outputs on their way from the thread that takes the steps to whoever asked for them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from .requests import FinishReason, Output

_logger = logging.getLogger(__name__)
Listener = Callable[[Output], None]


class Delivery:
    """Hands outputs on to listeners, and keeps those of requests that have none yet."""

    def __init__(self, most_unread: int, cancel: Callable[[int], None]) -> None:
        """An empty one.

        Args:
            most_unread: requests that have ended and that nobody listens to; the oldest are forgotten.
            cancel: ends a request whose listener has failed.
        """
        self._most_unread = most_unread
        self._cancel = cancel
        self._teller: int | None = None
        self._lock = threading.Lock()
        self._listeners: dict[int, Listener | None] = {}
        self._kept: dict[int, list[Output]] = {}
        self._unread: dict[int, None] = {}

    def expect(self, id: int, listener: Listener | None) -> None:
        """Take what comes of a new request, for ``listener`` or until there is one."""
        with self._lock:
            self._listeners[id] = listener
            self._kept[id] = []

    def attach(self, id: int, listener: Listener) -> None:
        """Let ``listener`` have what came and what comes of a request.

        Raises:
            ValueError: nothing comes of it.
        """
        with self._lock:
            if self._listeners.get(id, listener) is not None:
                raise ValueError(
                    f"no request {id} waits for a listener: it has one, or nobody has added it, or it ended"
                )
            self._listeners[id] = listener
            for output in self._kept.pop(id):
                self._tell(listener, output)
            if id in self._unread:
                self._forget(id)

    def deliver(self, output: Output) -> None:
        """Hand an output on."""
        id, ended = output.id, output.finish_reason is not None
        with self._lock:
            if id not in self._listeners:
                return
            listener = self._listeners[id]
            if listener is not None:
                self._tell(listener, output)
                if ended:
                    self._forget(id)
                return
            self._kept[id].append(output)
            if ended:
                self._unread[id] = None
                if len(self._unread) > self._most_unread:
                    self._forget(next(iter(self._unread)))

    @property
    def calls_here(self) -> bool:
        """Whether this thread is in a listener, which holds up all others."""
        return self._teller == threading.get_ident()

    def _tell(self, listener: Listener, output: Output) -> None:
        self._teller = threading.get_ident()
        try:
            listener(output)
        except Exception:
            _logger.exception("a listener has failed, which ends its request")
            self._forget(output.id)
            self._cancel(output.id)
        finally:
            self._teller = None

    def fail(self, error: Exception) -> None:
        """End all requests that have not ended."""
        with self._lock:
            left = [id for id in self._listeners if id not in self._unread]
        for id in left:
            self.deliver(Output(id, finish_reason=FinishReason.ERROR, error=error))

    def forget(self, id: int) -> None:
        """A request has ended, and its caller knows."""
        with self._lock:
            self._forget(id)

    def _forget(self, id: int) -> None:
        for known in (self._listeners, self._kept, self._unread):
            known.pop(id, None)


def into(new: asyncio.Queue[Output], cancel: Callable[[int], None]) -> Listener:
    """A listener that passes outputs on to a queue of the running loop; where the loop is closed, it cancels."""
    loop = asyncio.get_running_loop()

    def listen(output: Output) -> None:
        try:
            loop.call_soon_threadsafe(new.put_nowait, output)
        except RuntimeError:
            cancel(output.id)

    return listen

"""The process: a socket, and a way out that lets requests end."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from .app import build_app
from .gate import Gate
from .service import Service

# Seconds; OpenAI's client takes up a connection that has been idle for less than 5.
_KEEP_ALIVE = 60
# Seconds that connections get to take what is left for them.
_LAST_WORDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else can have; it does not listen yet.

    Raises:
        OSError: another program has it, or the address is none of this machine's.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """Ends on a signal when the requests that it has are answered; meanwhile new ones get 503."""

    def __init__(self, service: Service, api_keys: Sequence[str] = (), drain_seconds: float = 30) -> None:
        """A server that :meth:`run` starts, on ``sockets`` that :func:`bind` made.

        Args:
            service: ends with the server.
            api_keys: any of them lets a request in; anybody is let in if there is none.
            drain_seconds: how long requests may take to end after SIGTERM or Ctrl-C; what is left then is cut off.
        """
        self._service = service
        self._gate = Gate(build_app(service), api_keys)
        super().__init__(
            uvicorn.Config(
                self._gate,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second Ctrl-C gives requests no more time, a third does not tell them either."""
        now = time.monotonic()
        if self._deadline is None:
            self._gate.is_draining = True
            self._deadline = now + self._drain_seconds
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = self._deadline <= now
            self._deadline = min(self._deadline, now)

    async def main_loop(self) -> None:
        """Run until the last request is answered, or has to be given up."""
        draining = asyncio.create_task(self._drain())
        try:
            await super().main_loop()
        finally:
            draining.cancel()

    async def _drain(self) -> None:
        while self._deadline is None or (self._gate.active and time.monotonic() < self._deadline):
            await asyncio.sleep(0.05)
        # Who still waits is told.
        await asyncio.to_thread(self._service.close)
        self.should_exit = True

"""A server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import OpenAI

# Whatever else the machine does; nothing waits so long unless it hangs.
PATIENCE = 300
# A client of its own for each request would read all certificates again.
_CLIENT = httpx2.Client(timeout=PATIENCE, limits=httpx2.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Server:
    """A server that is running; ``url`` without a path."""

    url: str
    process: subprocess.Popen

    def client(self, api_key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's own client, which tries once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE, **options)

    def get(self, path: str) -> httpx2.Response:
        return _CLIENT.get(f"{self.url}{path}")

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def wait_until_idle(self) -> None:
        """Wait until no request runs or waits.

        Raises:
            TimeoutError: one still does.
        """
        deadline = time.monotonic() + PATIENCE
        while self.metric("num_requests_running") + self.metric("num_requests_waiting"):
            if time.monotonic() > deadline:
                raise TimeoutError("a request is stuck")
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model: object, *options: str, port: int | None = None, **environment: str) -> Iterator[Server]:
    """``quantspec serve``, ready; at the end it drains, and must leave without an error.

    It drafts 4 tokens a cycle unless ``options`` say otherwise: what pays might be none.
    """
    port = port or free_port()
    if "--num-speculative-tokens" not in options:
        options = ("--num-speculative-tokens", "4", *options)
    command = [sys.executable, "-m", "quantspec", "serve", str(model), "--port", str(port), *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stderr=told, stdout=told, env=variables)

        def output() -> str:
            told.seek(0)
            return told.read()

        try:
            server = Server(f"http://127.0.0.1:{port}", process)
            deadline = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, output()
                assert time.monotonic() < deadline, output()
                with contextlib.suppress(httpx2.TransportError):
                    if server.get("/health").status_code == 200:
                        break
                time.sleep(0.05)
            yield server
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, output()
            assert "Traceback" not in output(), output()
        finally:
            process.kill()
            process.wait()

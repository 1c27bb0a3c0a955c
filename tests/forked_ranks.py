"""Ranks that start in no time: forks of one process that has imported what a rank imports.

``docs/tensor-parallel.md`` and a split server start theirs as users do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from unittest import mock

from quantspec.ranks import pool
from quantspec.ranks.worker import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["quantspec.tensor_parallel", "quantspec.ranks.worker"])


def _rank(connection: Connection) -> None:
    main(connection.fileno())


class _Fork:
    """What the ranks need of ``subprocess.Popen``."""

    def __init__(self, command: list[str], pass_fds: tuple[int], stdin: int) -> None:
        self._process = _FORKS.Process(target=_rank, args=(Connection(os.dup(pass_fds[0])),))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, or minus the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self._process.exitcode


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Within, ranks are forks."""
    names = {"Popen": _Fork, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    with mock.patch.object(pool, "subprocess", SimpleNamespace(**names)):
        yield

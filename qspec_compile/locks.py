"""Locks that a forked child finds free: the thread that held one in the parent does not run there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager


class LockOfProcess:
    """A lock for each process that a copy of this object lives in."""

    def __init__(self, make: Callable[[], AbstractContextManager] = threading.Lock) -> None:
        self._make = make
        self._locks: dict[int, AbstractContextManager] = {}

    def __call__(self) -> AbstractContextManager:
        """The lock of this process."""
        # Threads that come here together get the same one.
        return self._locks.setdefault(os.getpid(), self._make())

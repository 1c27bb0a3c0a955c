"""Host memory that was freed, and that the C library keeps for what may come."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Giving back walks over all that is free, which takes milliseconds.
_EVERY = 4 * 2**20


class FreedMemory:
    """Gives back, now and then, what a loop over a model's weights frees.

    Where results stay between what is freed, the C library's heap has holes that the next weight may not fit into: as
    much again as the results themselves, kept until the process ends.
    """

    def __init__(self) -> None:
        self._num_bytes = 0

    def after(self, weight: Tensor) -> None:
        """``weight`` was worked on: what that took is free. Does nothing for those of other devices."""
        if weight.device.type != "cpu":
            return
        self._num_bytes += weight.nbytes
        if self._num_bytes >= _EVERY:
            self._num_bytes = 0
            _give_back()(0)


@functools.lru_cache
def _give_back() -> Callable[[int], int]:
    """glibc's call; other C libraries have none and need none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return int

"""Device work captured as a row of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


class GraphRow:
    """Work captured once, in one graph or in several that are replayed one behind the other.

    To launch a graph takes the host time for each of its kernels, and the device starts when all are launched: a
    thousand kernels leave it idle for most of a millisecond after each wait. Of several graphs it runs the first while
    the host launches the others.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """``stream``: which the work is captured on."""
        self._stream = stream
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # Replayed in the order of the capture, graphs may reuse each other's memory as parts of one would.
        self._pool = torch.cuda.graph_pool_handle()
        self._open = contextlib.ExitStack()

    def capture(self, work: Callable[[], object]) -> None:
        """Capture ``work``, a graph up to each :meth:`cut` that it makes and one behind the last."""
        with self._open:
            self.cut()
            work()

    def cut(self) -> None:
        """Let what follows be a graph of its own."""
        self._open.close()
        self._graphs.append(torch.cuda.CUDAGraph())
        self._open.enter_context(torch.cuda.graph(self._graphs[-1], pool=self._pool, stream=self._stream))

    def replay(self) -> None:
        """Do the work again."""
        for graph in self._graphs:
            graph.replay()

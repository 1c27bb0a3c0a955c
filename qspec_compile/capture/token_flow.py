"""Which tensors of a forward follow from what its tokens say, told as it runs; in an export its graph tells."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantspec.passes.token_counts import SHAPE_READERS, follows_tokens


class _Flow(TorchDispatchMode):
    """Marks the memory of token ids, and of all that is computed of marked memory, in place or not."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        # By address; held, so that no other memory gets it.
        self._marked: dict[int, Any] = {}
        self._mark(ids)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.overloadpacket not in SHAPE_READERS and any(map(self.is_marked, read)):
            # What is written in place is among the results.
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._mark(made)
        return result

    def is_marked(self, value: Tensor) -> bool:
        """Whether ``value`` follows from the token ids."""
        return value.untyped_storage()._cdata in self._marked

    def _mark(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self._marked[storage._cdata] = storage


_ACTIVE: contextvars.ContextVar[_Flow | None] = contextvars.ContextVar("token flow", default=None)


@contextlib.contextmanager
def flow_from(ids: Tensor) -> Iterator[None]:
    """Let :func:`follows` tell what follows from ``ids`` in what runs here, which is no export."""
    flow = _Flow(ids)
    token = _ACTIVE.set(flow)
    try:
        with flow:
            yield
    finally:
        _ACTIVE.reset(token)


def follows(value: Tensor) -> bool:
    """Whether the values of a tensor follow from those of the token ids, in an export or inside :func:`flow_from`."""
    flow = _ACTIVE.get()
    return follows_tokens(value) or (flow is not None and flow.is_marked(value))

"""How many bytes of tensors there are at most while something runs; no clock and no allocator has a say in it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_real(t)}
        for tensor in filter(_is_real, tree_leaves(out)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            # Views, of a mapped file too, are nothing new.
            if key not in self._known and key not in given:
                self._known.add(key)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return out

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.remove(key)
        self._live -= num_bytes


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu"

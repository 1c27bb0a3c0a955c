"""Damage to the cache, to see what reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantspec.cache import HierarchicalCache


def change_cache_after_prefill(monkeypatch: pytest.MonkeyPatch, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """From now on, ``change`` is applied to a part of the first layer's cache whenever a prompt is prefilled.

    A CPU's decoded copy follows.
    """
    advance = HierarchicalCache.advance_prefill

    def advance_and_change(cache: HierarchicalCache, num_new: Tensor) -> None:
        advance(cache, num_new)
        tensor = getattr(cache.layers[0], part)
        tensor.copy_(change(tensor))
        cache.decode(torch.zeros_like(cache.length))

    monkeypatch.setattr(HierarchicalCache, "advance_prefill", advance_and_change)

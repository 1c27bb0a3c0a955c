"""Attention kernels that sum two groups of value channels at a time, over heads that have more of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from .cache_layout import CACHE_PARTS

_AT_ONCE = 2
# Of each cached tensor of values, whether its last axis is channels, rather than groups of them.
_HAS_CHANNELS = {part.name: part.axes[-1] == "D" for part in CACHE_PARTS if part.holds == "values"} | {"value": True}


def two_value_parts_at_once(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``launch``, which takes the arguments of cached attention, for values of any number of groups of channels.

    Each launch attends anew; the scores of pages are the highest that any has found.
    """
    signature = inspect.signature(launch)

    @functools.wraps(launch)
    def launches(*args: object, **kwargs: object) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        parts = given["v_scale"].shape[-1]
        if parts <= _AT_ONCE:
            return launch(*args, **kwargs)
        width = given["value"].shape[-1] // parts
        values = {name: given[name] for name in _HAS_CHANNELS if given.get(name) is not None}
        page_scores = given.get("page_scores")
        outputs, scores = [], []
        for first in range(0, parts, _AT_ONCE):
            last = min(first + _AT_ONCE, parts)
            for name, tensor in values.items():
                step = width if _HAS_CHANNELS[name] else 1
                given[name] = tensor[..., first * step : last * step]
            if page_scores is not None:
                scores.append(page_scores.clone())
                given["page_scores"] = scores[-1]
            outputs.append(launch(**given))
        if page_scores is not None:
            page_scores.copy_(torch.stack(scores).amax(0))
        return torch.cat(outputs, -1)

    return launches

"""Triton launches on the current GPU, which need not be the one that holds the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_tensors_device(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """``launch`` with the GPU of its first tensor as the current one; nothing changes for tensors of a CPU."""

    @functools.wraps(launch)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.cuda.device_of(first):
            return launch(*args, **kwargs)

    return guarded

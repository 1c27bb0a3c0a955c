"""torch.compile for what reads a whole vocabulary or text, of sizes that vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Inductor of torch 2.11 fails to analyse how a reduction over rows of two symbolic sizes reads memory.
_UNSOUND = "triton.coalesce_tiling_analysis"


def fused(function: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
    """``function`` under torch.compile; as it is unless ``compiles``."""
    if not compiles:
        return function
    options: dict[str, Any] | None = {_UNSOUND: False} if _UNSOUND in torch._inductor.list_options() else None
    return torch.compile(function, options=options)

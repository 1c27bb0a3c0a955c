"""What a linear's launch may do with its result: the gate of an MLP, and the addition to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""By the names that ops take; :func:`quantspec.kernels.inline_asm.activated` has the same."""


def gated(y: Tensor, activation: str, gate_first: bool) -> Tensor:
    """``activation(gate) * factor``, ``(..., N/2)``, of the halves of ``(..., N)``."""
    gate, factor = y.chunk(2, -1) if gate_first else y.chunk(2, -1)[::-1]
    return ACTIVATIONS[activation](gate) * factor

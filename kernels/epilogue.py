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
# Neighbouring rows of a weight that are gates, and as many behind them that are their factors: half a tile of outputs.
GATE_ROWS = 8


def gated(y: Tensor, activation: str) -> Tensor:
    """``activation(gate) * factor``, ``(..., N/2)``, of ``(..., N)`` where :data:`GATE_ROWS` of each alternate."""
    gate, factor = y.unflatten(-1, (-1, 2, GATE_ROWS)).unbind(-2)
    return (ACTIVATIONS[activation](gate) * factor).flatten(-2)

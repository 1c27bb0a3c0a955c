"""``quantspec::row_linear``: a linear layer on a CPU that often has one row, ``y = x W^T + bias``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_op import cache_op


@cache_op("quantspec::row_linear", mutates_args=())
def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer that multiplies a single row as a vector.

    A CPU with native bfloat16 takes 1.3 to 1.6 times as long for a matrix of one row (Intel Xeon with AMX, two cores,
    torch 2.13, the linears of SmolLM2-135M); in float32 both take as long.

    Args:
        x: ``(..., K)`` of a float dtype.
        weight: ``(N, K)`` in the dtype of ``x``.
        bias: ``(N,)`` in the dtype of ``x``, or None.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    if x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return y.view(*x.shape[:-1], weight.shape[0])


@row_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])

"""``quantspec::int4_linear``: a linear layer with torchao-quantized 4-bit weights in the plain layout.

    y = x W^T + bias,   W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

torchao chooses scale and zero and rounds (its tinygemm convention, where zero is the value of code 8). Plain layout:
byte ``qdata[n, j]`` holds code ``W[n, 2j]`` in its low nibble and ``W[n, 2j + 1]`` in its high one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Codes ``(..., N, K)`` in 0..15 to bytes ``(..., N, K/2)`` uint8."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_int4(qdata: Tensor) -> Tensor:
    """Bytes ``(..., N, K/2)`` to codes ``(..., N, K)`` uint8."""
    return torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)


def dequantize_int4(qdata: Tensor, scale_and_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense weight ``(..., N, K)`` of plain-layout ``qdata (..., N, K/2)`` and ``scale_and_zero (..., K/g, N, 2)``."""
    scale, zero = scale_and_zero.to(dtype).transpose(-3, -2).unbind(-1)
    codes = unpack_int4(qdata).unflatten(-1, (scale.shape[-1], -1)).to(dtype) - 8
    return (codes * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2)


@torch.library.custom_op("quantspec::int4_linear", mutates_args=())
def int4_linear(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer over 4-bit weights; this implementation dequantizes, then multiplies.

    Args:
        x: ``(..., K)`` float.
        qdata: ``(N, K/2)`` uint8, plain layout.
        scale_and_zero: ``(K/g, N, 2)`` float; the group size g follows from its first axis.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)


@int4_linear.register_fake
def _(x, qdata, scale_and_zero, bias):
    return x.new_empty(*x.shape[:-1], qdata.shape[0])

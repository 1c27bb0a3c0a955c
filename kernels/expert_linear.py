"""``quantspec::expert_linear`` and ``quantspec::int4_expert_linear``: the linears of a mixture-of-experts layer.

    y[s] = x[s] W[e_s]^T + bias[e_s],   e_s = expert_ids[s]

Capture leaves two of them per layer with the model's own activation between; INT4 weights use the plain layout of
``quantspec::int4_linear`` with a leading expert axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .int4_linear import dequantize_int4


def _rows_by_expert(expert_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    for expert in expert_ids.unique().tolist():
        yield expert, (expert_ids == expert).nonzero().squeeze(-1)


@torch.library.custom_op("quantspec::expert_linear", mutates_args=())
def expert_linear(x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Apply each row's own expert.

    Args:
        x: ``(S, K)`` rows.
        expert_ids: ``(S,)`` int64 in ``0..E-1``.
        weight: ``(E, N, K)``, or ``(E, K, N)`` if ``transposed``.
        bias: ``(E, N)`` or None.

    Returns:
        ``(S, N)`` in the dtype of ``x``.
    """
    out = x.new_empty(x.shape[0], weight.shape[2] if transposed else weight.shape[1])
    for expert, rows in _rows_by_expert(expert_ids):
        matrix = weight[expert].t() if transposed else weight[expert]
        out[rows] = F.linear(x[rows], matrix, None if bias is None else bias[expert])
    return out


@expert_linear.register_fake
def _(x, expert_ids, weight, bias, transposed):
    return x.new_empty(x.shape[0], weight.shape[2] if transposed else weight.shape[1])


@torch.library.custom_op("quantspec::int4_expert_linear", mutates_args=())
def int4_expert_linear(
    x: Tensor, expert_ids: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None
) -> Tensor:
    """As ``quantspec::expert_linear`` with ``qdata (E, N, K/2)`` uint8 and ``scale_and_zero (E, K/g, N, 2)``."""
    out = x.new_empty(x.shape[0], qdata.shape[1])
    for expert, rows in _rows_by_expert(expert_ids):
        matrix = dequantize_int4(qdata[expert], scale_and_zero[expert], x.dtype)
        out[rows] = F.linear(x[rows], matrix, None if bias is None else bias[expert])
    return out


@int4_expert_linear.register_fake
def _(x, expert_ids, qdata, scale_and_zero, bias):
    return x.new_empty(x.shape[0], qdata.shape[1])

"""Read INT4 weights back out of a rewritten graph, linear by linear, whatever it does with them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .graph import aten, get_tensor
from .int4_weights import INT4_LINEARS
from .prepack_int4 import unpack_cpu_layout

# Where a call's arguments hold its codes and its scales and zeros.
_ARGUMENTS = {
    torch.ops.quantspec.int4_linear.default: (1, 2),
    torch.ops.quantspec.int4_expert_linear.default: (2, 3),
    aten._weight_int4pack_mm_for_cpu.default: (1, 3),
}


def plain_int4_weights(gm: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Every linear's INT4 weights as ``QuantizeWeights`` made them.

    Fused weights are views of their rows; what was laid out for the CPU's matmul is unpacked. A weight that serves
    several linears appears once.

    Args:
        gm: a draft's graph, whatever of the draft's passes it went through.

    Returns:
        By name of the linear, ``qdata (..., N, K/2)`` uint8 and ``scale_and_zero (..., K/g, N, 2)`` float16 or
        bfloat16.

    Raises:
        RuntimeError: this CPU's packed layout cannot be read back.
    """
    weights = {}
    for node in gm.graph.nodes:
        if INT4_LINEARS not in node.meta:
            continue
        codes, params = (get_tensor(gm, node.args[index]) for index in _ARGUMENTS[node.target])
        if node.target is aten._weight_int4pack_mm_for_cpu.default:
            codes = unpack_cpu_layout(codes)
        start = 0
        for name, rows in node.meta[INT4_LINEARS]:
            weights[name] = codes.narrow(-2, start, rows), params.narrow(-2, start, rows)
            start += rows
    return weights
